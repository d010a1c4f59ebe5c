"""TaskBatches back to plain Python, and what they must hold by definition."""

from typing import Any

import torch

from distmeta.data.tasktable import TaskTable
from distmeta.draws import hashed, uniform
from distmeta.tasks import TaskBatch


def unpacked(batch: TaskBatch) -> dict[int, Any]:
    """Task id -> (support, query), each a list of (item, label); checks padding and the item mapping on the way."""
    found: dict[int, Any] = {}
    items = batch.items.tolist()
    assert len(set(items)) == len(items)
    used: set[int] = set()
    for block in batch:
        for side in (block.support, block.query):
            assert side.item.dtype == torch.int64
            assert side.label.dtype == torch.float32
            assert side.mask.dtype == torch.bool
            assert not side.item[~side.mask].any()
            assert not side.label[~side.mask].any()
            assert (side.mask.int().diff(dim=1) <= 0).all()  # a task's rows stand first
            assert side.mask.sum(1).max() == side.mask.shape[1]  # no wider than needed
            used |= set(side.item[side.mask].tolist())
        for i, task in enumerate(block.task.tolist()):
            assert task not in found
            found[task] = tuple(
                list(zip((items[r] for r in s.item[i][s.mask[i]]), s.label[i][s.mask[i]].tolist(), strict=True))
                for s in (block.support, block.query)
            )
    assert used == set(range(len(items)))
    return found


def stored(table: TaskTable, split: str) -> dict[int, dict[str, Any]]:
    return {r["task"]: r for t in table.read(split) for r in t.to_pylist()}


def drawn(row: dict[str, Any], seed: int, epoch: int, most: int) -> Any:
    """The definition: an episode is `most` rows in succession from a drawn one on; of its n rows the min(10, n // 2)
    with the lowest keys are query; both sides in time order."""
    rows = len(row["item"])
    first = int(uniform(seed, epoch, row["task"], purpose="episode") * (rows - min(rows, most) + 1))
    kept = range(first, first + min(rows, most))
    n = len(kept)
    keys = [int(hashed(seed, epoch, row["task"], r, purpose="query")) for r in range(n)]
    query = set(sorted(range(n), key=keys.__getitem__)[: min(10, n // 2)])
    rows = [(row["item"][r], row["label"][r]) for r in kept]
    return [rows[r] for r in range(n) if r not in query], [rows[r] for r in sorted(query)]
