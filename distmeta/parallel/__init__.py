"""Task delivery, gradient exchange, checkpoints and the trainer: the only place that may import ray or torch.distributed."""
