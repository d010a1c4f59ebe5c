"""Tasks as flat arrays -> TaskBatch: ragged rows, the query draw, blocks of similar length, unique items.

No Python loop over rows or tasks: a batch is a few dozen numpy calls whatever its size, so that input never
bounds training. Rows live in a flat domain (one position a row) until they are scattered into padded blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from distmeta import draws
from distmeta.data.encode import Encoded, encode_all, joined, ragged
from distmeta.data.protocols import DRAWN, QUERY
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

Ints = NDArray[np.int64]

BLOCK_LEAST = 32
"""Tasks that a block holds at least, where the batch has them: fewer do not pay for a block's own calls."""
BLOCK_MOST = 128
"""Tasks that a block holds at most: 128 tasks of 100 rows of 64 floats are 3 MB, a core's share of cache."""
BLOCK_STRETCH, BLOCK_SLACK = 1.25, 4
"""A block's longest task may have 1.25 times its shortest's rows plus 4; beyond that, padding costs more."""
BLOCK_WORTH = 1200
"""Padded rows for whose sake a block is halved, BLOCK_LEAST or not: they cost more than another block's calls."""


def block_bounds(length: Ints) -> list[tuple[int, int]]:
    """[start, end) of the blocks of tasks whose lengths are sorted ascending.

    A block ends before a task longer than its shortest allows, within BLOCK_LEAST and BLOCK_MOST tasks. A
    rest smaller than BLOCK_LEAST joins the block before it where BLOCK_MOST allows, else the two share evenly.
    A block of which that leaves much to padding is halved.
    """
    bounds, start, n = [], 0, len(length)
    while start < n:
        limit = BLOCK_STRETCH * length[start] + BLOCK_SLACK
        end = int(np.searchsorted(length, limit, side="right"))
        end = min(max(end, start + BLOCK_LEAST), start + BLOCK_MOST, n)
        if 0 < n - end < BLOCK_LEAST:
            end = n if n - start <= BLOCK_MOST else start + (n - start + 1) // 2
        bounds += _halved(length, start, end)
        start = end
    return bounds


def _halved(length: Ints, start: int, end: int) -> list[tuple[int, int]]:
    """[start, end), cut in two as long as that saves BLOCK_WORTH padded rows."""
    middle = (start + end) // 2
    if (middle - start) * (length[end - 1] - length[max(middle, 1) - 1]) < BLOCK_WORTH:
        return [(start, end)]
    return _halved(length, start, middle) + _halved(length, middle, end)


@dataclass(frozen=True)
class Tasks:
    """Tasks of some shards, flat: task i has the rows offsets[i] to offsets[i + 1], in time order."""

    task: Ints
    """[T] task ids."""
    offsets: Ints
    """[T + 1]."""
    item: NDArray[np.int32]
    label: NDArray[np.float32]
    role: NDArray[np.int8]
    """[rows] each."""
    stored_query: Ints
    """[T]: rows whose stored role is query."""
    drawn: NDArray[np.bool_]
    """[T]: the query is drawn by the loader."""
    user: dict[str, Encoded]
    """The users' fields, [T, M] each."""

    def __len__(self) -> int:
        return len(self.task)

    @classmethod
    def of(cls, table: pa.Table, dataset: Dataset, where: object) -> "Tasks":
        """From rows of a task table.

        Raises:
            UserError: an item is not in the dataset, lists differ in length, or a role is wrong.
        """
        item, count = ragged(table["item"], pa.int32())
        label, labels = ragged(table["label"], pa.float32())
        role, roles = ragged(table["role"], pa.int8())
        again = f"delete {where} to have it made again"
        if not (np.array_equal(count, labels) and np.array_equal(count, roles)):
            raise UserError(f"{where}: the lists item, label and role of a task differ in length; {again}")
        if len(item) and not 0 <= int(item.min()) <= int(item.max()) < dataset.items:
            raise UserError(f"{where}: an item is not among the dataset's {dataset.items:,}; {again}")
        offsets = np.r_[0, np.cumsum(count)].astype(np.int64)
        stored, open_rows = (_count(role == code, offsets) for code in (QUERY, DRAWN))
        drawn = open_rows > 0
        mixed = (open_rows != 0) & (open_rows != count)
        if mixed.any() or (len(role) and not 0 <= role.min() <= role.max() <= DRAWN):
            raise UserError(f"{where}: a task's roles are neither 0 and 1 nor 2 throughout; {again}")
        fields = encode_all(dataset.user_fields, table, where)
        return cls(table["task"].to_numpy(), offsets, item, label, role, stored, drawn, fields)

    def take(self, chosen: Ints) -> "Tasks":
        """Copies of the tasks at positions `chosen`, in that order."""
        count = np.diff(self.offsets)[chosen]
        rows = spans(self.offsets[chosen], count)
        return Tasks(
            task=self.task[chosen],
            offsets=np.r_[0, np.cumsum(count)],
            item=self.item[rows],
            label=self.label[rows],
            role=self.role[rows],
            stored_query=self.stored_query[chosen],
            drawn=self.drawn[chosen],
            user={n: (i[chosen], None if w is None else w[chosen]) for n, (i, w) in self.user.items()},
        )

    @classmethod
    def join(cls, parts: Sequence["Tasks"]) -> "Tasks":
        """The tasks of all parts, one after the other."""
        count = np.concatenate([np.diff(p.offsets) for p in parts])
        return cls(
            task=np.concatenate([p.task for p in parts]),
            offsets=np.r_[0, np.cumsum(count)],
            item=np.concatenate([p.item for p in parts]),
            label=np.concatenate([p.label for p in parts]),
            role=np.concatenate([p.role for p in parts]),
            stored_query=np.concatenate([p.stored_query for p in parts]),
            drawn=np.concatenate([p.drawn for p in parts]),
            user={name: joined([p.user[name] for p in parts]) for name in parts[0].user},
        )


def spans(start: Ints, count: Ints) -> Ints:
    """start[0], start[0] + 1, …: `count[i]` numbers from start[i] on, for each i in turn."""
    return np.arange(int(count.sum())) + np.repeat(start - (np.cumsum(count) - count), count)


def _count(flags: NDArray[np.bool_], offsets: Ints) -> Ints:
    """[T]: how many of each task's rows are flagged."""
    many = np.zeros(len(offsets) - 1, np.int64)
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):
        many[filled] = np.add.reduceat(flags, offsets[filled], dtype=np.int32)  # casts all flags first
    return many


class Collator:
    """Makes TaskBatches of `tasks`. Holds scratch memory: one thread at a time."""

    def __init__(self, tasks: Tasks, items: int, query_rows: float, episode_rows: int, seed: int, redraw: bool) -> None:
        self.tasks, self.seed, self.redraw = tasks, seed, redraw
        self.episode_rows = episode_rows
        self._rows = np.diff(tasks.offsets)
        bounded = np.minimum(self._rows, episode_rows) if episode_rows else self._rows
        self._count = np.where(tasks.drawn, bounded, self._rows)
        """[T]: rows of each task's episode."""
        share = query_rows < 1
        most = np.maximum(1, np.rint(query_rows * self._count)) if share else np.minimum(query_rows, self._count // 2)
        self._query_count = np.where(tasks.drawn, most, tasks.stored_query).astype(np.int64)
        """[T]: query rows of it."""
        self._unique = Distinct(items)

    def batch(self, chosen: Ints, epoch: int) -> TaskBatch:
        """The tasks at positions `chosen`, in blocks; `epoch` decides a drawn query unless redraw is off."""
        t = self.tasks
        order = np.lexsort((self._query_count[chosen], self._count[chosen] - self._query_count[chosen]))
        chosen = chosen[order]
        count, query_count = self._count[chosen], self._query_count[chosen]
        support_count = count - query_count

        before = np.cumsum(count) - count
        source = self._episode(chosen, epoch)
        query = self._query(chosen, count, before, source, epoch)
        unique, inverse = self._unique(t.item[source])
        label = t.label[source]

        bounds = block_bounds(support_count)
        sides = []
        for mask, n in ((~query, support_count), (query, query_count)):
            rows = np.flatnonzero(mask)
            sides.append(padded(inverse[rows], label[rows], n, bounds))
        blocks = tuple(
            TaskBlock(torch.from_numpy(t.task[chosen[a:b]]), self._users(chosen[a:b]), support, query_side)
            for (a, b), support, query_side in zip(bounds, *sides, strict=True)
        )
        return TaskBatch(torch.from_numpy(unique), blocks, self.seed, epoch)

    def _episode(self, chosen: Ints, epoch: int) -> Ints:
        """Positions (flat) of the episodes' rows: all of a task's, or of a long task `episode_rows` in succession.

        In succession, because what a new user rates first is such a run too: neighbours in time are alike.
        """
        count = self._count[chosen]
        spare = self._rows[chosen] - count
        start = self.tasks.offsets[chosen]
        if spare.any():
            u = draws.uniform(self.seed, epoch if self.redraw else 0, self.tasks.task[chosen], purpose="episode")
            start = start + (u * (spare + 1)).astype(np.int64)
        return spans(start, count)

    def _query(self, chosen: Ints, count: Ints, before: Ints, source: Ints, epoch: int) -> NDArray[np.bool_]:
        """Which rows (flat) are query rows: as stored, or where drawn those with the task's lowest keys."""
        drawn = self.tasks.drawn[chosen]
        query = self.tasks.role[source] == QUERY
        if not drawn.any():
            return query
        which = np.flatnonzero(drawn)
        n, width = count[which], int(count[which].max())
        row = np.arange(width)
        keys = draws.hashed(
            self.seed, epoch if self.redraw else 0, self.tasks.task[chosen[which], None], row, purpose="query"
        )
        keys[row >= n[:, None]] = np.iinfo(np.uint64).max
        # The hash is a bijection of the row, so a task's keys are distinct and the threshold takes exactly k.
        k = self._query_count[chosen[which]]
        few = max(1, int(k.max()))
        lowest = np.sort(np.partition(keys, few - 1, axis=1)[:, :few], axis=1)
        threshold = lowest[np.arange(len(which)), np.maximum(k, 1) - 1]
        taken = (keys <= threshold[:, None]) & (k > 0)[:, None]
        real = row < n[:, None]
        if len(which) == len(chosen):
            return taken[real]
        query[(before[which, None] + row)[real]] = taken[real]
        return query

    def _users(self, chosen: Ints) -> dict[str, Bag]:
        return {
            name: Bag(
                torch.from_numpy(index[chosen].astype(np.int64)),
                None if weight is None else torch.from_numpy(weight[chosen]),
            )
            for name, (index, weight) in self.tasks.user.items()
        }


class Distinct:
    """Which of 0 … size − 1 stand in an array; no sort, and no cost in `size`. Scratch memory: one thread at a time."""

    def __init__(self, size: int) -> None:
        self._last = np.empty(size, np.int32)

    def __call__(self, values: NDArray[np.int32]) -> tuple[Ints, Ints]:
        """The distinct values, and each one's position in them.

        The last row to write a value's cell of the scratch array owns the value.
        """
        last, rows = self._last, np.arange(len(values), dtype=np.int32)
        last[values] = rows
        unique = values[last[values] == rows]
        last[unique] = np.arange(len(unique), dtype=np.int32)
        return unique.astype(np.int64), last[values].astype(np.int64)


def padded(
    item: Ints, label: NDArray[np.float32], count: Ints, bounds: list[tuple[int, int]], user: Ints | None = None
) -> list[Rows]:
    """Flat rows of one side (`count` of each task) as one padded Rows a block."""
    widths = np.array([count[a:b].max() for a, b in bounds], np.int64)
    sizes = np.array([b - a for a, b in bounds], np.int64)
    width = np.repeat(widths, sizes)
    start = np.cumsum(width) - width  # where each task's row of the padded matrices begins
    target = np.arange(len(item)) + np.repeat(start - (np.cumsum(count) - count), count)
    total = int(width.sum())
    items, labels, masks = np.zeros(total, np.int64), np.zeros(total, np.float32), np.zeros(total, bool)
    items[target], labels[target], masks[target] = item, label, True
    columns = [items, labels, masks]
    if user is not None:
        columns.append(np.zeros(total, np.int64))
        columns[-1][target] = user
    ends = np.cumsum(widths * sizes)
    return [
        Rows(*(torch.from_numpy(flat[e - w * s : e].reshape(s, w)) for flat in columns))
        for e, w, s in zip(ends.tolist(), widths.tolist(), sizes.tolist(), strict=True)
    ]
