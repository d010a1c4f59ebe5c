"""Task table -> TaskBatches: which tasks stand in which batch (design §5b), collated ahead of their use."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import polars as pl
import pyarrow as pa

from distmeta import draws
from distmeta.data.collate import Collator, Ints, Tasks
from distmeta.data.encode import read_items
from distmeta.data.schema import Dataset
from distmeta.data.taskmaker import task_schema
from distmeta.errors import UserError
from distmeta.tasks import TaskBatch

__all__ = ["Loader", "TaskSource", "read_items"]


class TaskSource(Protocol):
    """What a Loader reads: a TaskTable, or anything else that hands out shards of tasks as Arrow tables."""

    @property
    def shards(self) -> int: ...

    @property
    def query_rows(self) -> int: ...

    @property
    def episode_rows(self) -> int: ...

    @property
    def location(self) -> object: ...

    def sizes(self, split: str) -> list[int]:
        """Number of tasks in each of all shards."""
        ...

    def read(
        self, split: str, shards: Sequence[int] | None = None, columns: Sequence[str] | None = None
    ) -> list[pa.Table]:
        """One table a listed shard that has tasks, in that order."""
        ...


class Loader:
    """TaskBatches of one split, for one of `world` workers.

    Epoch order: each shard is permuted by (seed, epoch), then the shards are dealt round-robin; batch b is
    positions [b·batch_size, (b+1)·batch_size). Worker r owns the shards v ≡ r (mod world) and gets its tasks
    of each batch, possibly none: so a batch, all workers taken together, does not depend on their number.
    The shards are read once and kept as flat arrays.

    Args:
        redraw: draw the episodes of tasks without a fixed query anew each epoch; else always as in epoch 0.
        prefetch: batches collated ahead in a thread; 0 collates when asked.

    Raises:
        UserError: a part is missing or damaged, or there are more workers than shards.
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
    ) -> None:
        if world > table.shards:
            raise UserError(f"{table.location}: {world} workers for {table.shards} shards; use fewer workers")
        self.batch_size, self.seed, self.prefetch = batch_size, seed, prefetch
        self.wait_seconds = 0.0
        """Time that the consumer has waited for batches, over all iterators."""
        sizes = np.array(table.sizes(split), np.int64)
        self.n_tasks = int(sizes.sum())
        """Tasks of all workers."""
        self.steps = -(-self.n_tasks // batch_size)
        """Batches of an epoch, the same number for every worker."""
        mine = [v for v in range(table.shards) if v % world == rank and sizes[v]]
        self._shard = np.repeat(np.array(mine, np.int64), sizes[mine])
        self._place = _places(sizes)[:, mine]
        self._sizes = sizes[mine]
        tables = table.read(split, mine)
        self._cohort = pl.concat([pl.Series([], dtype=pl.String), *(pl.Series(t["cohort"]) for t in tables)])
        self._tasks = _tasks(tables, dataset, table)
        self._make = lambda most: Collator(self._tasks, dataset.items, table.query_rows, most, seed, redraw)
        self._episode_rows = table.episode_rows

    def epoch(self, epoch: int, start: int = 0) -> Iterator[TaskBatch]:
        """The batches of training epoch `epoch` from batch `start` on. Close the iterator to end it early."""
        keys = draws.hashed(self.seed, epoch, self._tasks.task, purpose="order")
        return self._batches(np.lexsort((keys, self._shard)), epoch, start, self._episode_rows)

    def evaluation(self) -> Iterator[TaskBatch]:
        """Every task once with all its rows, in stored order and roles; a drawn query is that of epoch 0."""
        return self._batches(np.arange(len(self._tasks)), 0, 0, 0)

    def tasks(self) -> pl.DataFrame:
        """This worker's tasks: columns task, cohort."""
        return pl.DataFrame({"task": self._tasks.task, "cohort": self._cohort})

    def _batches(self, order: Ints, epoch: int, start: int, episode_rows: int) -> Iterator[TaskBatch]:
        """Batches of `order`, this worker's tasks shard by shard."""
        places = [self._place[:n, j] for j, n in enumerate(self._sizes.tolist())]
        place = np.concatenate([np.zeros(0, np.int64), *places])
        dealt = np.argsort(place)
        cuts = np.searchsorted(place[dealt], np.arange(self.steps + 1) * self.batch_size)
        collator = self._make(episode_rows)
        chosen = order[dealt]

        def make(step: int) -> TaskBatch:
            return collator.batch(chosen[cuts[step] : cuts[step + 1]], epoch)

        return self._ahead(make, range(start, self.steps))

    def _ahead(self, make: Callable[[int], TaskBatch], steps: range) -> Iterator[TaskBatch]:
        """make(step) of each step, collated by a thread that stays `prefetch` batches ahead."""
        if not self.prefetch:
            for step in steps:
                began = time.perf_counter()
                batch = make(step)
                self.wait_seconds += time.perf_counter() - began
                yield batch
            return
        worker = _Prefetch(make, steps, self.prefetch)
        try:
            for _ in steps:
                began = time.perf_counter()
                batch = worker.next()
                self.wait_seconds += time.perf_counter() - began
                yield batch
        finally:
            worker.stop()


class _Prefetch:
    """A daemon thread that makes values ahead of their use; what it raises is raised by `next`."""

    def __init__(self, make: Callable[[int], TaskBatch], steps: range, ahead: int) -> None:
        self._make, self._steps = make, steps
        self._ready: queue.Queue[TaskBatch | BaseException] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distmeta-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for step in self._steps:
                if self._stopped.is_set():
                    return
                self._ready.put(self._make(step))
        except BaseException as e:  # handed to the consumer, whose loop it must end
            self._ready.put(e)

    def next(self) -> TaskBatch:
        """The next value; raises what making it raised."""
        value = self._ready.get()
        if isinstance(value, BaseException):
            raise value
        return value

    def stop(self) -> None:
        """End the thread, whatever it is at, and wait for it."""
        self._stopped.set()
        while self._thread.is_alive():
            try:  # a put that waits for room must go through before the thread can see that it is stopped
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.005)


def _places(sizes: Ints) -> Ints:
    """[longest shard, shards]: position in the epoch of the k-th task of each shard, dealt round-robin."""
    there = np.arange(sizes.max(initial=0))[:, None] < sizes
    return (np.cumsum(there.ravel()) - 1).reshape(there.shape)


def _tasks(tables: list[pa.Table], dataset: Dataset, table: TaskSource) -> Tasks:
    whole = pa.concat_tables(tables) if tables else task_schema(dataset).empty_table()
    return Tasks.of(whole, dataset, table.location)
