"""Scenarios: ranked lists of candidates, one a user and scenario, and the floors that rank by popularity.

Recall@N of a list is the share of the user's positives among the N candidates with the highest scores, 1 where there
are no more than N; what is reported is the mean over (scenario, user) lists, as in s²Meta (Du et al., KDD 2019).
Scores are ranked as they are, not clipped to labels: a hinge loss has no range. Tied candidates share the places that
they occupy (`metrics.recall`), which is what breaking ties by a seed comes to on average over seeds. Lists of one
scenario have its support in common: intervals resample scenarios.
"""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from distmeta.data.loader import Loader
from distmeta.data.scenarios import training_pairs
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.evaluation.measured import ErrorHistogram, Measured
from distmeta.evaluation.metrics import RECALL_CUTOFFS, recall
from distmeta.exchange import Exchange
from distmeta.methods.itempop import times_taken, took
from distmeta.tasks import TaskBatch, TaskBlock

METRICS = tuple(f"recall@{n}" for n in RECALL_CUTOFFS)
BATCH = 4
"""Scenarios at a time: each has many thousand rows. No number depends on it."""
FLOORS = ("support-popularity", "train-popularity")
"""By how often the support, or all training scenarios together, took an item (CMML's ItemPop, and the global one)."""

Score = Callable[[TaskBatch], Sequence[Tensor]]
"""TaskBatch -> scores [b, Q] of the query rows of each block, finite on real rows."""


def cut(block: TaskBlock, score: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The lists of a block: runs of query rows of one task and user.

    Returns:
        task int64 [L], user int64 [L] (position in TaskBatch.users), score, label and mask [L, C], padded.
    """
    query = block.query
    assert query.user is not None  # what is ranked are scenarios
    which, at = query.mask.nonzero(as_tuple=True)
    user = query.user[which, at]
    new = torch.ones(len(user), dtype=torch.bool, device=user.device)
    new[1:] = (user[1:] != user[:-1]) | (which[1:] != which[:-1])
    first = new.nonzero()[:, 0]
    of = new.cumsum(0) - 1
    place = torch.arange(len(user), device=user.device) - first[of]
    shape = len(first), int(place.max()) + 1 if len(user) else 0
    scores, labels = score.new_zeros(shape, dtype=torch.float64), query.label.new_zeros(shape)
    mask = torch.zeros(shape, dtype=torch.bool, device=user.device)
    scores[of, place], labels[of, place] = score[which, at].double(), query.label[which, at]
    mask[of, place] = True
    return block.task[which[first]], user[first], scores, labels, mask


def frame(score: Score, batches: Sequence[TaskBatch] | Loader) -> pl.DataFrame:
    """task, user (of the dataset), n (candidates), positives and METRICS of each list, by (task, user)."""
    tasks, users, numbers = [], [], [torch.zeros(0, 2 + len(METRICS), dtype=torch.float64)]
    for batch in batches.evaluation() if isinstance(batches, Loader) else batches:
        assert batch.users is not None
        for block, scores in zip(batch, score(batch), strict=True):
            task, user, ranked, label, mask = cut(block, scores)
            tasks.append(task.cpu())
            users.append(batch.users[user.to(batch.users.device)].cpu())
            positives = (mask & (label > 0)).sum(1)
            parts = mask.sum(1).double(), positives.double(), recall(ranked, label, mask)
            numbers.append(torch.column_stack(parts).cpu())
    none = torch.zeros(0, dtype=torch.int64)
    counted = pl.DataFrame(torch.cat(numbers).numpy(), schema=["n", "positives", *METRICS])
    ids = {"task": torch.cat([none, *tasks]).numpy(), "user": torch.cat([none, *users]).numpy()}
    return pl.DataFrame(ids).hstack(counted.with_columns(pl.col("n", "positives").cast(pl.Int64))).sort("task", "user")


def measure(score: Score, loader: Loader, dataset: Dataset, split: str, device: torch.device) -> Measured:
    """Rank every list of the loader's scenarios; `Measured.tasks` has a row a list."""

    def moved(batch: TaskBatch) -> Sequence[Tensor]:
        return [s.to(batch.items.device) for s in score(batch.to(device))]

    with torch.no_grad():
        lists = frame(moved, loader)
    lists = lists.join(loader.tasks(), on="task", how="left", validate="m:1", maintain_order="left")
    lists = lists.select("task", "user", pl.lit(split).alias("split"), "cohort", "n", "positives", *METRICS)
    return Measured(lists, None, ErrorHistogram.of(dataset.label))


def support_popularity(batch: TaskBatch) -> list[Tensor]:
    """How many support rows of the scenario are positives of the item."""
    return [times_taken(took(b.support, batch.items), batch.items[b.query.item]) for b in batch]


def train_popularity(table: TaskTable, dataset: Dataset, exchange: Exchange) -> Score:
    """How many users took the item in any training scenario: overlapping scenarios count a user once."""
    _, item = training_pairs(table, dataset, exchange)
    counts = torch.from_numpy(np.bincount(item, minlength=dataset.items))

    def score(batch: TaskBatch) -> list[Tensor]:
        of = counts.to(batch.items.device)[batch.items]
        return [of[block.query.item] for block in batch]

    return score


def floors(table: TaskTable, dataset: Dataset, exchange: Exchange, memory: int | None) -> dict[str, Measured]:
    """What FLOORS measure on the split test, by name; all workers' together."""
    scores: dict[str, Score] = {
        FLOORS[0]: support_popularity,
        FLOORS[1]: train_popularity(table, dataset, exchange),
    }
    found = {}
    for name, score in scores.items():
        loader = Loader(table, dataset, "test", BATCH, rank=exchange.rank, world=exchange.world, memory=memory)
        mine = measure(score, loader, dataset, "test", torch.device("cpu"))
        found[name] = Measured.concat([Measured.from_ipc(data) for data in exchange.gather(mine.to_ipc())])
    return found
