"""Trainer, gradient exchange, checkpoints: the only place that may import ray or torch.distributed."""
