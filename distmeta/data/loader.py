"""Task table -> TaskBatches: which tasks stand in which batch (design §5b), collated ahead of their use."""

import contextlib
import itertools
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from distmeta import draws
from distmeta.data import pools
from distmeta.data.collate import Collator, Tasks
from distmeta.data.encode import Encoded, encode_all, read_items
from distmeta.data.epochs import Epochs
from distmeta.data.pools import Pool
from distmeta.data.prefetch import ahead
from distmeta.data.scenarios import ScenarioCollator, Scenarios
from distmeta.data.schema import Dataset
from distmeta.data.tables import to_polars
from distmeta.data.taskmaker import task_schema
from distmeta.errors import UserError
from distmeta.tasks import Packed, TaskBatch

__all__ = ["Loader", "TaskSource", "read_items"]

COLUMNS = ("task", "item", "label", "role")
"""What is read of a task table besides the users' fields; of scenarios also user."""

AnyTasks = Tasks | Scenarios
AnyCollator = Collator | ScenarioCollator


class TaskSource(Protocol):
    """What a Loader reads: a TaskTable, or anything else that hands out shards of tasks as Arrow tables."""

    @property
    def shards(self) -> int: ...

    @property
    def query_rows(self) -> float: ...

    @property
    def episode_rows(self) -> int: ...

    @property
    def scenarios(self) -> bool: ...

    @property
    def draws(self) -> int: ...

    @property
    def location(self) -> object: ...

    def users(self, dataset: Dataset) -> pa.Table:
        """The fields of all users, where tasks are scenarios."""
        ...

    @property
    def counts(self) -> Mapping[str, Mapping[str, int]]:
        """Split -> {"tasks", "rows"}."""
        ...

    def sizes(self, split: str) -> list[int]:
        """Number of tasks in each of all shards."""
        ...

    def read(
        self, split: str, shards: Sequence[int] | None = None, columns: Sequence[str] | None = None
    ) -> list[pa.Table]:
        """One table a listed shard that has tasks, in that order."""
        ...

    def groups(self, split: str) -> list[list[tuple[int, int]]]:
        """(tasks, rows) of each row group of each of all shards, in stored order; no task is read."""
        ...

    def stream(
        self, split: str, wanted: Iterable[tuple[int, Sequence[int]]], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """One table for each (shard, row groups): these groups' tasks, in the order of the groups listed.

        Lazy: what comes after a table is not read before it is asked for.
        """
        ...


class Loader:
    """TaskBatches of one split, for one of `world` workers.

    Epoch order: each shard is permuted by (seed, epoch), then the shards are dealt round-robin; batch b is
    positions [b·batch_size, (b+1)·batch_size). Worker r owns the shards v ≡ r (mod world) and gets its tasks
    of each batch, possibly none: so a batch, all workers taken together, does not depend on their number.
    A split within `memory` is read once and kept as flat arrays. A larger one is streamed in every epoch, pool
    by pool (data/pools.py): each pool is ordered as above, the next one is read while one is used, and a batch
    may take the last tasks of one pool and the first of the next.
    Of scenarios a pass is `draws` passes over the split, each in an order and with episodes of its own; the batches'
    `epoch` counts these.

    Args:
        redraw: draw the episodes of tasks without a fixed query anew each epoch; else always as in epoch 0.
        prefetch: batches collated ahead in a thread; 0 reads and collates when asked.
        memory: bytes that the tasks may take in one worker while they are read and used; None: no bound.
        episodes: of validation or test scenarios, draw an epoch of so many episodes each, as of training ones, from
            what the users took whose lists are ranked.
        epoch_tasks: tasks that a training epoch has at most (data/epochs.py); 0: all.
        most: take only so many of the split's tasks, the same ones for every seed and number of workers, and keep
            them in memory; 0: all.
        device: where the batches are wanted; made ready for a GPU's copy where they are collated ahead.

    Raises:
        UserError: a part is missing or damaged, there are more workers than shards, or `memory` is too small.
            Streaming raises it from the iterators too.
    """

    def __init__(
        self,
        table: TaskSource,
        dataset: Dataset,
        split: str,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        redraw: bool = True,
        prefetch: int = 2,
        memory: int | None = None,
        episodes: int = 0,
        epoch_tasks: int = 0,
        most: int = 0,
        device: torch.device | None = None,
    ) -> None:
        if world > table.shards:
            raise UserError(f"{table.location}: {world} workers for {table.shards} shards; use fewer workers")
        self.table, self.dataset, self.split = table, dataset, split
        self.batch_size, self.seed, self.redraw, self.prefetch = batch_size, seed, redraw, prefetch
        self._gpu = device if device is not None and device.type == "cuda" else None
        self.wait_seconds = 0.0
        """Time that the consumer has waited for batches, over all iterators."""
        full = table.sizes(split)
        sizes = _dealt(full, most) if most else full
        self.n_tasks = sum(sizes)
        """Tasks of all workers."""
        self._pass = -(-self.n_tasks // batch_size)
        self.draws, self._asked = episodes or table.draws, bool(episodes)
        self.steps = self.draws * self._pass
        """Batches of a whole pass, the same number for every worker and pass."""
        self.epochs = Epochs.of(self.draws * self.n_tasks, self.steps, batch_size, epoch_tasks)
        self._shards = [v for v in range(table.shards) if v % world == rank and sizes[v]]
        self._columns = [*COLUMNS, *(["user"] if table.scenarios else [f.name for f in dataset.user_fields])]
        self._users: dict[str, Encoded] = {}
        if table.scenarios and dataset.user_fields:
            self._users = encode_all(dataset.user_fields, table.users(dataset), table.location)
        count = table.counts.get(split, {"tasks": 0, "rows": 0})
        some = sizes != full
        if some or memory is None or pools.estimate(count["tasks"], count["rows"], dataset, table.scenarios) <= memory:
            self._plan = pools.whole(sizes)
            tables = self._some(sizes, memory) if some else table.read(split, self._shards, self._columns)
            self._kept = self._tasks(tables, self._plan.pools()[0])
        else:
            groups = table.groups(split)
            self._plan = pools.plan(split, groups, dataset, memory, table.location, table.scenarios)
            self._kept = None

    @property
    def note(self) -> str:
        """What there is to say of a split that is streamed; else nothing."""
        return self._plan.note

    def epoch(self, epoch: int, start: int = 0) -> Iterator[TaskBatch]:
        """The batches of training epoch `epoch` from batch `start` on. Close the iterator to end it early."""
        number, first, end = self.epochs.at(epoch)
        return self._waited(self._passes(number, first + start, end))

    def evaluation(self) -> Iterator[TaskBatch]:
        """Every task once with all its rows, in stored order and roles; a drawn query is that of epoch 0.

        Of a training scenario: the episode of epoch 0.
        """
        rows = self.table.episode_rows if self.table.scenarios else 0
        return self._waited(self._batches(None, 0, self._pass, rows))

    def tasks(self) -> pl.DataFrame:
        """This worker's tasks of the split: columns task, cohort."""
        tables = self.table.read(self.split, self._shards, ["task", "cohort"])
        whole = pa.concat_tables(tables) if tables else _schema(self.dataset, ["task", "cohort"]).empty_table()
        return to_polars(whole)

    def _waited(self, batches: Generator[TaskBatch]) -> Iterator[TaskBatch]:
        """The batches, `prefetch` of them made ahead, with the time that is waited for them counted."""
        made = self._packed(batches) if self._gpu else batches
        # one that is ready waits for room beside the others
        with contextlib.closing(ahead(made, self.prefetch + 1) if self.prefetch else made) as ready:
            while True:
                began = time.perf_counter()
                batch = next(ready, None)
                self.wait_seconds += time.perf_counter() - began
                if batch is None:
                    return
                if isinstance(batch, Packed):
                    assert self._gpu
                    batch = batch.to(self._gpu)
                yield batch

    def _packed(self, batches: Generator[TaskBatch]) -> Generator[Packed]:
        with contextlib.closing(batches):
            for batch in batches:
                yield Packed(batch)

    def _passes(self, number: int, start: int, end: int) -> Generator[TaskBatch]:
        """The batches from `start` to `end` of a pass, which is `draws` passes over the split."""
        size, rows = max(self._pass, 1), self.table.episode_rows
        for draw in range(start // size, -(-end // size)):
            within = max(start - draw * size, 0), min(end - draw * size, size)
            with contextlib.closing(self._batches(number * self.draws + draw, *within, rows)) as batches:
                yield from batches

    def _batches(self, epoch: int | None, start: int, end: int, episode_rows: int) -> Generator[TaskBatch]:
        """Batches from `start` to `end` of a pass over the split, or of an evaluation (None)."""
        order, size = self._plan.pools(self.seed, epoch), self.batch_size
        order = [pool for pool in order if pool.end > start * size and pool.start < end * size]
        rest: list[AnyTasks] = []
        with contextlib.closing(self._loaded(order)) as loaded:
            for pool, tasks in zip(order, loaded, strict=True):
                yield from self._of_pool(pool, tasks, rest, epoch, range(start, end), episode_rows)

    def _of_pool(
        self, pool: Pool, tasks: AnyTasks, rest: list[AnyTasks], epoch: int | None, wanted: range, episode_rows: int
    ) -> Generator[TaskBatch]:
        """The batches that end in this pool. `rest`: of the batch under way, what each pool so far gave."""
        size, positions = self.batch_size, pool.positions(self._shards)
        chosen = np.arange(len(tasks))
        if epoch is not None:
            shard = np.repeat(self._shards, pool.sizes[self._shards])
            chosen = np.lexsort((draws.hashed(self.seed, epoch, tasks.task, purpose="order"), shard))
        dealt = np.argsort(positions)
        chosen, positions = chosen[dealt], positions[dealt]
        steps = range(max(wanted.start, pool.start // size), min(wanted.stop, -(-pool.end // size)))
        cuts = np.searchsorted(positions, np.arange(steps.start, steps.stop + 1) * size)
        collator = self._collator(tasks, episode_rows)
        for step, a, b in zip(steps, cuts[:-1], cuts[1:], strict=True):
            ends = min((step + 1) * size, self.n_tasks) <= pool.end
            if ends and step * size >= pool.start:
                yield collator.batch(chosen[a:b], epoch or 0)
                continue
            rest.append(tasks.take(chosen[a:b]))
            if ends:
                joined = type(tasks).join(rest)  # type: ignore[arg-type]  # all of one kind
                rest.clear()
                yield self._collator(joined, episode_rows).batch(np.arange(len(joined)), epoch or 0)

    def _some(self, sizes: Sequence[int], memory: int | None) -> list[pa.Table]:
        """Of each of this worker's shards the tasks with the `sizes[v]` lowest hashes, a row group read at a time.

        Raises:
            UserError: those of all workers would not fit into `memory`.
        """
        count, share = self.table.counts[self.split], self.n_tasks / sum(self.table.sizes(self.split))
        need = pools.estimate(self.n_tasks, round(share * count["rows"]), self.dataset, self.table.scenarios)
        if memory is not None and need > memory:
            raise UserError(
                f"{self.table.location}: {self.n_tasks:,} of its {self.split} tasks take {-(-need // pools.MB)} MB,"
                f" more than --memory-mb {memory // pools.MB}; take fewer, or give --memory-mb {-(-need // pools.MB)}"
            )
        groups = self.table.groups(self.split)
        wanted = [(v, [g]) for v in self._shards for g in range(len(groups[v]))]
        found: dict[int, pa.Table] = {}
        for (v, _), tasks in zip(wanted, self.table.stream(self.split, wanted, self._columns), strict=True):
            found[v] = _lowest(pa.concat_tables([found[v], tasks]) if v in found else tasks, sizes[v])
        return list(found.values())

    def _loaded(self, order: Sequence[Pool]) -> Generator[AnyTasks]:
        """This worker's tasks of each pool; one pool is read ahead."""
        if self._kept is not None:
            return (tasks for tasks in [self._kept] * len(order))
        read = self._read(order)
        return ahead(read, 1) if self.prefetch else read

    def _read(self, order: Sequence[Pool]) -> Generator[AnyTasks]:
        wanted = ((v, pool.groups[v]) for pool in order for v in self._shards if pool.groups[v])
        tables = self.table.stream(self.split, wanted, self._columns)
        for pool in order:
            count = sum(bool(pool.groups[v]) for v in self._shards)
            yield self._tasks(list(itertools.islice(tables, count)), pool)

    def _tasks(self, tables: list[pa.Table], pool: Pool) -> AnyTasks:
        """The tables of a pool's shards as flat arrays."""
        where = self.table.location
        if sum(t.num_rows for t in tables) != pool.sizes[self._shards].sum():
            raise UserError(f"{where}: the parts of split {self.split} changed while they were read; start a new run")
        empty = _schema(self.dataset, self._columns, self.table.scenarios).empty_table()
        whole = pa.concat_tables(tables) if tables else empty
        if not self.table.scenarios:
            return Tasks.of(whole, self.dataset, where)
        tasks = Scenarios.of(whole, self.dataset, where)
        return tasks.asked() if self._asked else tasks

    def _collator(self, tasks: AnyTasks, episode_rows: int) -> AnyCollator:
        if isinstance(tasks, Scenarios):
            query = int(self.table.query_rows)
            return ScenarioCollator(tasks, self.dataset, self._users, query, episode_rows, self.seed, self.redraw)
        return Collator(tasks, self.dataset.items, self.table.query_rows, episode_rows, self.seed, self.redraw)


def _dealt(sizes: Sequence[int], most: int) -> list[int]:
    """Tasks of each shard where `most` of all are dealt round-robin over the shards."""
    there = np.arange(max(sizes, default=0))[:, None] < np.array(sizes)
    return (there & (np.cumsum(there.ravel()).reshape(there.shape) <= most)).sum(0).tolist()


def _lowest(tasks: pa.Table, count: int) -> pa.Table:
    """The `count` tasks whose ids have the lowest hashes, in the order in which they stand."""
    keys = draws.hashed(tasks["task"].to_numpy(), purpose="some tasks")
    return tasks.take(pa.array(np.sort(np.argsort(keys, kind="stable")[:count])))


def _schema(dataset: Dataset, columns: Sequence[str], scenarios: bool = False) -> pa.Schema:
    schema = task_schema(dataset, scenarios=scenarios)
    return pa.schema([schema.field(name) for name in columns])
