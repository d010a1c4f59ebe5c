"""Scenarios as flat arrays -> TaskBatch: the episodes of training tasks, and the ranked lists of the others.

No Python loop over rows. A loop over blocks only: a block of lists has some thousand rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from numpy.typing import NDArray

from distmeta import draws
from distmeta.data.absent import Taken
from distmeta.data.collate import Distinct, Ints, block_bounds, padded, spans
from distmeta.data.encode import Encoded, bag, ragged
from distmeta.data.protocols import DRAWN, OFFERED, QUERY, SUPPORT
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError
from distmeta.exchange import Exchange
from distmeta.tasks import TaskBatch, TaskBlock

LIST_ROWS = 1 << 14
"""Query rows that a block of lists holds at most, one list at least: 16,384 rows of 64 floats are 4 MB."""


@dataclass(frozen=True)
class Scenarios:
    """Scenarios of some shards, flat: task i has the rows offsets[i] to offsets[i + 1]."""

    task: Ints
    """[T] task ids."""
    offsets: Ints
    """[T + 1]."""
    user: NDArray[np.int32]
    """[rows] each, as item, label and role; by (user, item) but for support rows, which stand first."""
    item: NDArray[np.int32]
    label: NDArray[np.float32]
    role: NDArray[np.int8]
    """OFFERED rows stand last."""

    def __len__(self) -> int:
        return len(self.task)

    @cached_property
    def candidates(self) -> "Candidates":
        """The items of each task, in order of their index."""
        width = int(self.item.max(initial=0)) + 1
        of = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        key = of * width + self.item
        keys = np.unique(key)
        start = np.searchsorted(keys, np.arange(len(self) + 1) * width)
        return Candidates((keys % width).astype(np.int32), start, np.searchsorted(keys, key) - start[of])

    @cached_property
    def taken(self) -> tuple[Ints, Taken]:
        """What each user has taken in each scenario, and the user in the scenario that each row is of."""
        of = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        first = np.flatnonzero(np.r_[True, (of[1:] != of[:-1]) | (self.user[1:] != self.user[:-1])])
        count = np.diff(np.r_[first, len(of)]) if len(of) else np.zeros(0, np.int64)
        width = int(np.diff(self.candidates.start).max(initial=0)) + 1
        group = np.repeat(np.arange(len(count)), count)
        return group, Taken.of(count, self.candidates.place, width)

    @classmethod
    def of(cls, table: pa.Table, dataset: Dataset, where: object) -> "Scenarios":
        """From rows of a task table.

        Raises:
            UserError: a user or item is not in the dataset, lists differ in length, or roles are wrong.
        """
        item, count = ragged(table["item"], pa.int32())
        user, users = ragged(table["user"], pa.int32())
        label, labels = ragged(table["label"], pa.float32())
        role, roles = ragged(table["role"], pa.int8())
        again = f"delete {where} to have it made again"
        if not all(np.array_equal(count, n) for n in (users, labels, roles)):
            raise UserError(f"{where}: the lists user, item, label and role of a task differ in length; {again}")
        if len(item) and not 0 <= int(item.min()) <= int(item.max()) < dataset.items:
            raise UserError(f"{where}: an item is not among the dataset's {dataset.items:,}; {again}")
        asked = user[role != OFFERED]
        if len(asked) and not 0 <= int(asked.min()) <= int(asked.max()) < dataset.users:
            raise UserError(f"{where}: a user is not among the dataset's {dataset.users:,}; {again}")
        if len(role) and (role == DRAWN).any() and not (role == DRAWN).all():
            raise UserError(f"{where}: tasks to draw from and fixed ones stand together; {again}")
        return cls(table["task"].to_numpy(), np.r_[0, np.cumsum(count)].astype(np.int64), user, item, label, role)

    def take(self, chosen: Ints) -> "Scenarios":
        """Copies of the tasks at positions `chosen`, in that order."""
        count = np.diff(self.offsets)[chosen]
        rows = spans(self.offsets[chosen], count)
        offsets = np.r_[0, np.cumsum(count)]
        return Scenarios(
            self.task[chosen], offsets, self.user[rows], self.item[rows], self.label[rows], self.role[rows]
        )

    def asked(self) -> "Scenarios":
        """Validation or test tasks as tasks to draw from: what the users took whose lists are ranked, then each
        task's candidates as OFFERED rows."""
        asked, offered = self.role == QUERY, self.candidates
        of = np.repeat(np.arange(len(self)), np.diff(self.offsets))[asked]
        task = np.concatenate([of, np.repeat(np.arange(len(self)), np.diff(offered.start))])
        order, more = np.argsort(task, kind="stable"), len(offered.item)
        user = np.concatenate([self.user[asked], np.full(more, -1, np.int32)])
        item = np.concatenate([self.item[asked], offered.item])
        label = np.concatenate([self.label[asked], np.zeros(more, np.float32)])
        role = np.repeat(np.array([DRAWN, OFFERED], np.int8), (len(of), more))
        offsets = np.searchsorted(task[order], np.arange(len(self) + 1))
        return Scenarios(self.task, offsets, user[order], item[order], label[order], role[order])

    @classmethod
    def join(cls, parts: Sequence["Scenarios"]) -> "Scenarios":
        """The tasks of all parts, one after the other."""
        count = np.concatenate([np.diff(p.offsets) for p in parts])
        return cls(
            np.concatenate([p.task for p in parts]),
            np.r_[0, np.cumsum(count)],
            *(np.concatenate([getattr(p, name) for p in parts]) for name in ("user", "item", "label", "role")),
        )


@dataclass(frozen=True)
class Candidates:
    """Items of tasks, one task after another: task i has item[start[i]] to item[start[i + 1]], ascending."""

    item: NDArray[np.int32]
    start: Ints
    """[T + 1]."""
    place: Ints
    """[rows]: of each row's item among its task's."""


def training_pairs(table: TaskTable, dataset: Dataset, exchange: Exchange | None = None) -> tuple[Ints, Ints]:
    """The positives of all training scenarios, each user and item once: users and items, by (user, item).

    What overlapping scenarios have in common counts once. Every worker of `exchange` reads its shards and gets all.

    Raises:
        UserError: a part is missing or damaged.
    """
    e = exchange or Exchange()
    groups = [range(len(g)) for g in table.groups("train")]
    mine = [(v, groups[v]) for v in range(table.shards) if v % e.world == e.rank and groups[v]]
    found = pl.Series(dtype=pl.Int64)
    for part in table.stream("train", mine, ["user", "item"]):
        (user, _), (item, _) = (ragged(part[name], pa.int32()) for name in ("user", "item"))
        found = pl.concat([found, pl.Series(user.astype(np.int64) * dataset.items + item)]).unique()
    everyone = [pl.Series(np.frombuffer(data, np.int64)) for data in e.gather(found.to_numpy().tobytes())]
    keys = pl.concat(everyone).unique().sort().to_numpy()  # numpy's own unique is ten times slower
    return keys // dataset.items, keys % dataset.items


def unasked_pairs(table: TaskTable, dataset: Dataset, exchange: Exchange | None = None) -> tuple[Ints, Ints]:
    """`training_pairs` without those that a list of a validation or test scenario asks about.

    Scenarios overlap: a pair that is asked about may be a positive of a training scenario too (of MovieLens' genres
    most are), and what learns pairs by heart would be measured by what it was told.

    Raises:
        UserError: a part is missing or damaged.
    """
    user, item = training_pairs(table, dataset, exchange)
    asked, columns = [pl.Series(dtype=pl.Int64)], ["user", "item", "role"]
    for split in ("valid", "test"):
        groups = [(v, range(len(g))) for v, g in enumerate(table.groups(split)) if g]
        for part in table.stream(split, groups, columns):
            asking, of, role = (ragged(part[name], pa.int32())[0] for name in columns)
            query = role == QUERY
            asked.append(pl.Series(asking[query].astype(np.int64) * dataset.items + of[query]))
    left = ~pl.Series(user * dataset.items + item).is_in(pl.concat(asked).unique().implode()).to_numpy()
    return user[left], item[left]


class ScenarioCollator:
    """Makes TaskBatches of `tasks`. Holds scratch memory: one thread at a time.

    Args:
        users: the fields of all users of the dataset.
        query_rows, episode_rows: positives of an episode's query, and of support and query together.
        redraw: draw episodes anew each epoch; else always as in epoch 0.
    """

    def __init__(
        self,
        tasks: Scenarios,
        dataset: Dataset,
        users: dict[str, Encoded],
        query_rows: int,
        episode_rows: int,
        seed: int,
        redraw: bool,
    ) -> None:
        self.tasks, self.users, self.seed, self.redraw = tasks, users, seed, redraw
        self._count = np.diff(np.r_[0, np.cumsum(tasks.role == DRAWN)][tasks.offsets])
        self._query = np.minimum(query_rows, self._count // 2)
        self._support = np.clip(episode_rows - self._query, 1, np.maximum(self._count - self._query, 0))
        self._items, self._people = Distinct(dataset.items), Distinct(dataset.users)
        self._drawn = len(tasks.role) > 0 and tasks.role[0] == DRAWN

    def batch(self, chosen: Ints, epoch: int) -> TaskBatch:
        """The tasks at positions `chosen`, in blocks; `epoch` decides the episodes unless redraw is off."""
        make = self._episodes if self._drawn else self._lists
        task, bounds, sides = make(chosen, epoch if self.redraw else 0)
        users, user = self._people(np.concatenate([s.user for s in sides]).astype(np.int32))
        items, item = self._items(np.concatenate([s.item for s in sides]).astype(np.int32))
        cut, rows = len(sides[0].item), []
        for side, part in zip(sides, (slice(cut), slice(cut, None)), strict=True):
            rows.append(padded(item[part], side.label, side.count, bounds, user[part]))
        blocks = tuple(
            TaskBlock(torch.from_numpy(task[a:b]), {}, support, query)
            for (a, b), support, query in zip(bounds, *rows, strict=True)
        )
        fields = {n: bag((i[users], None if w is None else w[users])) for n, (i, w) in self.users.items()}
        return TaskBatch(torch.from_numpy(items), blocks, self.seed, epoch, torch.from_numpy(users), fields)

    def _episodes(self, chosen: Ints, epoch: int) -> "_Made":
        """Positives drawn of each task, each followed by its negative."""
        order = np.lexsort((self._query[chosen], self._support[chosen]))
        chosen = chosen[order]
        support, query = self._support[chosen], self._query[chosen]
        many = support + query
        task, of = self.tasks.task[chosen], np.repeat(np.arange(len(chosen)), many)
        number = spans(np.zeros(len(chosen), np.int64), many)
        drawn = draws.permuted(number, self._count[chosen][of], self.seed, epoch, task[of], purpose="scenario/episode")
        row = self.tasks.offsets[chosen][of] + drawn
        u = draws.uniform(self.seed, epoch, task[of], number, purpose="scenario/negative")
        offered, (group, taken) = self.tasks.candidates, self.tasks.taken
        start, end = offered.start[chosen][of], offered.start[chosen + 1][of]
        absent = offered.item[start + taken.absent(group[row], end - start, u)]
        item = np.stack((self.tasks.item[row], absent), 1)
        user, label = np.repeat(self.tasks.user[row], 2).reshape(-1, 2), np.ones_like(item, np.float32)
        label[:, 1] = 0
        first = number < support[of]
        sides = (
            _Side(user[mask].ravel(), item[mask].ravel(), label[mask].ravel(), 2 * n)
            for mask, n in ((first, support), (~first, query))
        )
        return task, block_bounds(2 * support), tuple(sides)

    def _lists(self, chosen: Ints, epoch: int) -> "_Made":
        """Stored support rows, and for each user of the query all candidates; a task has a block for each LIST_ROWS."""
        task, supports, queries = [], [], []
        for t in chosen.tolist():
            rows = slice(self.tasks.offsets[t], self.tasks.offsets[t + 1])
            role, user, item = self.tasks.role[rows], self.tasks.user[rows], self.tasks.item[rows]
            offered = self.tasks.candidates
            candidates = offered.item[offered.start[t] : offered.start[t + 1]]
            people, list_of = np.unique(user[role == QUERY], return_inverse=True)
            label = np.zeros((len(people), len(candidates)), np.float32)
            label[list_of, np.searchsorted(candidates, item[role == QUERY])] = 1
            support = role == SUPPORT
            given = _Side(user[support], item[support], self.tasks.label[rows][support], np.array([support.sum()]))
            size = max(1, LIST_ROWS // max(len(candidates), 1))
            for first in range(0, max(len(people), 1), size):
                some = people[first : first + size]
                asked = np.repeat(some, len(candidates)), np.tile(candidates, len(some))
                task.append(self.tasks.task[t])
                supports.append(given)
                queries.append(_Side(*asked, label[first : first + size].ravel(), np.array([len(asked[0])])))
        bounds = [(i, i + 1) for i in range(len(task))]
        return np.array(task, np.int64), bounds, (_joined(supports), _joined(queries))


@dataclass(frozen=True)
class _Side:
    """Support or query rows of several tasks, flat: `count` of each."""

    user: NDArray[np.int32]
    item: NDArray[np.int32]
    label: NDArray[np.float32]
    count: Ints


_Made = tuple[Ints, list[tuple[int, int]], tuple[_Side, ...]]
"""Task of each entry, [start, end) of the blocks, and the two sides."""


def _joined(sides: Sequence[_Side]) -> _Side:
    empty = _Side(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    names = ("user", "item", "label", "count")
    return _Side(*(np.concatenate([getattr(s, name) for s in (empty, *sides)]) for name in names))
