"""Which tasks are in memory together: the pools of a split that is larger than its budget.

A part of a task table consists of row groups. An epoch permutes each shard's groups by (seed, epoch) and cuts
them into windows of equally many; pool p is window p of every shard. Pools follow one another in the epoch's
order. The window follows from the budget, the shards and the largest group, never from the number of workers,
so neither does the order. A split within the budget is one pool.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distmeta import draws
from distmeta.data.schema import Dataset
from distmeta.errors import UserError

Ints = NDArray[np.int64]
Group = tuple[int, int]
"""(tasks, rows) of a row group."""
MB = 2**20

ROW_BYTES = 32
"""Of an interaction. Item, label and role, as Arrow hands them over and as the loader keeps them, are 18; the rest is
what decoding them takes and what allocators hold back. Measured, two pools: 29 to 33 of resident memory a row."""
SCENARIO_ROW_BYTES = 80
"""Of a scenario's: besides, its user, its place among the scenario's items, and the key that negatives are drawn by."""
TASK_BYTES = 120
"""Of a task, besides its rows and fields: ids, offsets, counts and its place in the order."""
FIELD_BYTES: Mapping[str, int] = {"categorical": 8, "numeric": 12, "multi_categorical": 96}
"""Of a task's user field, Arrow's copy included; a multi_categorical one is padded, here taken for 8 values."""


@dataclass(frozen=True)
class Pool:
    """Tasks that stand next to each other in an epoch's order, dealt round-robin over the shards."""

    start: int
    """Position of its first task in the order of all workers' tasks."""
    sizes: Ints
    """[shards]: its tasks in each."""
    groups: list[list[int]]
    """Its row groups in each shard, in the order read."""

    @property
    def end(self) -> int:
        """Position after its last task."""
        return self.start + int(self.sizes.sum())

    def positions(self, shards: Sequence[int]) -> Ints:
        """The positions of the listed shards' tasks, shard by shard, the k-th of a shard being dealt in turn k."""
        there = np.arange(self.sizes.max(initial=0))[:, None] < self.sizes
        dealt = (self.start + np.cumsum(there.ravel()) - 1).reshape(there.shape)
        mine = list(shards)
        return dealt.T[mine][there.T[mine]]


@dataclass(frozen=True)
class Plan:
    """How a split is read: whole, or pool by pool."""

    groups: list[list[int]]
    """Tasks of each row group, by shard; of a split that is read whole, all of a shard's as one group."""
    window: int
    """Groups of a shard in a pool."""
    whole: bool
    note: str
    """What there is to say of a split that is streamed; else nothing."""

    def pools(self, seed: int = 0, epoch: int | None = None) -> list[Pool]:
        """The pools of an epoch; None: those of an evaluation, in stored order."""
        orders = [np.arange(len(tasks)) for tasks in self.groups]
        if epoch is not None:
            orders = [np.argsort(draws.hashed(seed, epoch, v, o, purpose="groups")) for v, o in enumerate(orders)]
        pools, start = [], 0
        for first in range(0, max(map(len, orders), default=0), self.window):
            chosen = [o[first : first + self.window].tolist() for o in orders]
            sizes = np.array([sum(self.groups[v][g] for g in gs) for v, gs in enumerate(chosen)], np.int64)
            pools.append(Pool(start, sizes, chosen))
            start = pools[-1].end
        return pools


def whole(sizes: Sequence[int]) -> Plan:
    """Everything at once; `sizes` are the tasks of each shard."""
    return Plan([[n] for n in sizes], 1, True, "")


def plan(
    split: str, groups: Sequence[Sequence[Group]], dataset: Dataset, memory: int, where: object, scenarios: bool = False
) -> Plan:
    """Pools of which two, one in use and one being read, fit into `memory` bytes of one worker.

    Raises:
        UserError: the budget is too small for pools of one row group a shard.
    """
    filled = [shard for shard in groups if shard]
    largest = max(estimate(*group, dataset, scenarios) for shard in filled for group in shard)
    least = 2 * len(filled) * largest
    window = memory // least
    if not window:
        raise UserError(
            f"{where}: its {split} tasks are read a row group of each shard at a time, which takes"
            f" {-(-least // MB)} MB, more than --memory-mb {memory // MB}; give --memory-mb {-(-least // MB)}"
        )
    total = sum(estimate(*group, dataset, scenarios) for shard in filled for group in shard)
    count = -(-max(map(len, filled)) // window)
    note = (
        f"{split}: {_mb(total)} MB of tasks, streamed in {count} pools of {_mb(total / count)} MB"
        f" (--memory-mb {memory // MB})"
    )
    return Plan([[tasks for tasks, _ in shard] for shard in groups], window, False, note)


def estimate(tasks: int, rows: int, dataset: Dataset, scenarios: bool = False) -> int:
    """Bytes that so many tasks (users, or scenarios) take while they are read and used."""
    if scenarios:
        return rows * SCENARIO_ROW_BYTES + tasks * TASK_BYTES
    return rows * ROW_BYTES + tasks * (TASK_BYTES + sum(FIELD_BYTES[f.type] for f in dataset.user_fields))


def _mb(size: float) -> str:
    return f"{size / MB:,.0f}" if size >= 10 * MB else f"{size / MB:.1f}"
