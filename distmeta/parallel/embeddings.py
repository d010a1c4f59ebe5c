"""What a trained run makes of its test users' fields: their embeddings, to look at."""

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from distmeta.config import Config
from distmeta.data.loader import Loader, read_items
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.networks import Embedding
from distmeta.parallel import checkpoint
from distmeta.parallel.assessment import best_step
from distmeta.parallel.update import build_method, device_of, numerics
from distmeta.storage import Location

BATCH = 256


@torch.no_grad()
def of_users(
    config: Config, run: Location, dataset: Dataset, place: Location, table: TaskTable
) -> tuple[list[str], NDArray[np.float64]] | None:
    """Cohort [n] and embedding [n, width] of each test task's user by the run's best checkpoint, by task.

    None for a method that has no embedding of users, or a data set without user fields.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    device = device_of(config.train)
    with numerics(config.train, device):
        method = build_method(config, dataset, read_items(place, dataset), device)
        embedding = getattr(method, "embedding", None)
        if not isinstance(embedding, Embedding) or not embedding.user_width:
            return None
        checkpoint.restore_params(run, checkpoint.read(run, best_step(run)), method, config.method)
        loader = Loader(table, dataset, "test", BATCH, memory=config.train.memory_mb << 20)
        tasks, rows = [], []
        for batch in loader.evaluation():
            for block in batch.to(device):
                tasks.append(block.task.cpu())
                rows.append(embedding.user_place(block).base().rows().squeeze(1).double().cpu())
    cohort = loader.tasks().select("task", "cohort")
    found = pl.DataFrame({"task": torch.cat(tasks).numpy()}).with_row_index("at").join(cohort, on="task").sort("task")
    return found["cohort"].to_list(), torch.cat(rows).numpy()[found["at"].to_numpy()]
