"""A `TorchTrainer.fit()` whose workers do nothing, with Ray's own settings: what a start costs without distmeta."""

import logging
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def fit(workers: int, folder: str) -> None:
    """On a cluster of its own; FOLDER/started is made when all workers have begun."""
    ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    TorchTrainer(
        _begin,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=folder),
    ).fit()
    ray.shutdown()


def _begin(settings: dict[str, Any]) -> None:
    if dist.is_initialized():
        dist.barrier()
    if not dist.is_initialized() or dist.get_rank() == 0:
        (Path(settings["folder"]) / "started").touch()
