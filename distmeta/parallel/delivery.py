"""Tasks to workers through Ray Data: each rank gets the shards v ≡ r mod N of a task table (design §5b).

The parts are read once, by Ray Data's tasks on all nodes of the cluster (a small table by the driver), before the
workers start, and lie in the object store; a worker, and after a failure the next group of workers of whatever size,
takes its shards from there.
Reading inside `DataConfig.configure` instead needs CPUs that the workers hold already: it hangs.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from distmeta import draws, remote
from distmeta.data import pools
from distmeta.data import schema as dataset_schema
from distmeta.data.protocols import SPLITS
from distmeta.data.taskmaker import ROW_COHORT
from distmeta.data.tasktable import TaskTable
from distmeta.errors import RunError, UserError

SMALL = 64 << 20
"""Bytes of tasks that the driver reads itself."""


@dataclass(frozen=True)
class Part:
    """What one read task reads: a shard of a split, whole or some of its row groups."""

    split: str
    shard: int
    groups: Sequence[int] | None = None


class TaskParts(Datasource):
    """Ray Data's reader of a task table: one read task a part, with the checks of TaskTable.

    Not `read_parquet`: it has no switch for the page checksums, without which a third of flipped bits are read as
    other numbers, and it packs all parts of a small table into one task.
    """

    def __init__(self, table: TaskTable, parts: Sequence[Part], columns: Sequence[str]) -> None:
        self.table, self.parts, self.columns = table, parts, columns

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: Parquet is encoded and compressed."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One a part, in the order given."""
        meta = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_reader(self.table, part, self.columns), meta) for part in self.parts]


def _reader(table: TaskTable, part: Part, columns: Sequence[str]) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        try:
            if part.groups is None:
                yield from table.read(part.split, [part.shard], columns)
            else:
                yield from table.stream(part.split, [(part.shard, part.groups)], columns)
        except UserError:
            if (table.location / "tasks.json").exists():
                raise
            raise UserError(
                f"{table.location}: the node {ray.util.get_node_ip_address()} does not see this task table; put the"
                " dataset on storage that all nodes share"
            ) from None

    return read


def _columns(table: TaskTable) -> list[str]:
    """What a worker may ask for: all but the times and the user's index, which only protocols look at (and, of the
    users of a scenario's rows, methods)."""
    unasked = ("time",) if table.scenarios else ("user", "time")
    rows = [ROW_COHORT] if table.row_cohorts else []
    return [*(name for name in table.columns() if name not in unasked), *rows]


def read(table: TaskTable, parts: Sequence[Part], columns: Sequence[str]) -> Dataset:
    """The parts one after another, read when it is executed.

    The read tasks ask for no CPU: the workers hold them all, and tasks that want one would wait for ever, also those
    that read again what was lost with a node.
    """
    return ray.data.read_datasource(
        TaskParts(table, parts, columns),
        override_num_blocks=len(parts),
        num_cpus=0,
        concurrency=max(1, int(ray.cluster_resources().get("CPU", 1))),
    )


def materialise(
    table: TaskTable,
    dataset: dataset_schema.Dataset,
    memory: int,
    small: int = SMALL,
    splits: Sequence[str] = SPLITS,
) -> dict[str, Any]:
    """The tasks of a table in the object store: split -> Dataset of its shards, one after another, each as stored.

    Args:
        memory: bytes; splits that take more are left out, workers stream them.
        small: bytes; what takes no more in all is read here: it takes less time than starting read tasks elsewhere.

    Raises:
        UserError: a part is missing or damaged, or cannot be read on a node of the cluster.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns of what is meant so: no CPU is left to it
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    sizes = {split: table.sizes(split) for split in splits if _bytes(table, dataset, split) <= memory}
    sizes = {split: rows for split, rows in sizes.items() if sum(rows)}
    parts = [Part(split, v) for split, rows in sizes.items() for v in range(table.shards) if rows[v]]
    if not parts:
        return {}
    if sum(_bytes(table, dataset, split) for split in sizes) <= small:
        blocks = [block for p in parts for block in table.read(p.split, [p.shard], _columns(table))]
        whole = ray.data.from_arrow(blocks)
    else:
        whole = read(table, parts, _columns(table)).materialize()
    ends = np.cumsum([sum(rows) for rows in sizes.values()])[:-1].tolist()
    return dict(zip(sizes, _cut(whole, ends), strict=True))


def _bytes(table: TaskTable, dataset: dataset_schema.Dataset, split: str) -> int:
    count = table.counts[split]
    return pools.estimate(count["tasks"], count["rows"], dataset, table.scenarios)


def sentence(e: BaseException | None) -> UserError | RunError | None:
    """Our own sentence inside what Ray has wrapped around it and added to it, on further lines; if there is one."""
    while e is not None:
        inner = getattr(e, "cause", None)
        for candidate in (inner, e):
            if isinstance(candidate, UserError | RunError):
                said = str(inner or candidate).partition("\n")[0]
                return (UserError if isinstance(candidate, UserError) else RunError)(said)
            if refused := remote.explained(candidate) if candidate else None:
                return refused
        e = e.__cause__ or e.__context__
    return None


def _cut(dataset: Dataset, ends: list[int]) -> Sequence[Dataset]:
    """The dataset in pieces; at ends of blocks, as here always, nothing is copied and no task runs."""
    return dataset.split_at_indices(ends) if ends else [dataset]


class ShardConfig(ray.train.DataConfig):
    """Gives rank r of N, for each split, one iterator over the shards v ≡ r mod N in ascending order.

    Args:
        sizes: split -> tasks in each of all shards.
    """

    def __init__(self, sizes: dict[str, list[int]]) -> None:
        super().__init__(datasets_to_split=[])  # Ray's own splitting makes ranks wait for each other; this needs none
        self.sizes = sizes

    def configure(self, datasets: dict[str, Dataset], world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """[world_size] dicts of split -> DataIterator, None for a rank that has no shard of it."""
        ranks: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for split, dataset in datasets.items():
            shards = [v for v, n in enumerate(self.sizes[split]) if n]
            pieces = _cut(dataset, np.cumsum([self.sizes[split][v] for v in shards])[:-1].tolist())
            for rank, given in enumerate(ranks):
                mine = [piece for v, piece in zip(shards, pieces, strict=True) if v % world_size == rank]
                given[split] = _joined(mine).iterator() if mine else None
        return ranks


def _joined(pieces: Sequence[Dataset]) -> Dataset:
    return pieces[0].union(*pieces[1:]) if pieces[1:] else pieces[0]


@dataclass(frozen=True)
class DeliveredTable(TaskTable):
    """A task table in a worker: its manifest from disk, its rows from Ray Data."""

    delivered: frozenset[str] = frozenset()
    """Splits that Ray Train hands out; the worker has the others read when it wants them."""

    def read(
        self, split: str, shards: Sequence[int] | None = None, columns: Sequence[str] | None = None
    ) -> list[pa.Table]:
        """As TaskTable.read, of shards that were delivered to this worker; splits that were not are streamed.

        Raises:
            UserError: what came is not what the manifest says.
        """
        sizes = self.sizes(split)
        wanted = [v for v in (range(self.shards) if shards is None else shards) if sizes[v]]
        if not wanted:
            return []
        if split not in self.delivered:
            return list(self._ahead([Part(split, v) for v in wanted], [sizes[v] for v in wanted], columns))
        given: Any = ray.train.get_dataset_shard(split)
        whole = pa.concat_tables(given.iter_batches(batch_size=None, batch_format="pyarrow"))
        shard = draws.hashed(whole["task"].to_numpy(), purpose="shard") % np.uint64(self.shards)
        whole = whole.select(list(columns)) if columns else whole
        tables = [whole.filter(pa.array(shard == v)) for v in wanted]
        for v, table in zip(wanted, tables, strict=True):
            if len(table) != sizes[v]:
                raise UserError(self._changed(split, v, len(table), sizes[v]))
        return tables

    def stream(
        self, split: str, wanted: Iterable[tuple[int, Sequence[int]]], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """As TaskTable.stream, read by Ray Data's tasks some pieces ahead of their use."""
        parts = [Part(split, v, tuple(groups)) for v, groups in wanted]
        tasks = [[n for n, _ in groups] for groups in self.groups(split)]
        yield from self._ahead(parts, [sum(tasks[p.shard][g] for g in p.groups or ()) for p in parts], columns)

    def _ahead(self, parts: Sequence[Part], sizes: Sequence[int], columns: Sequence[str] | None) -> Iterator[pa.Table]:
        """One table a part; Ray Data hands out blocks, of which a large part has several."""
        if not parts:
            return
        plain = TaskTable(**{k: v for k, v in vars(self).items() if k != "delivered"})
        there: Any = read(plain, parts, columns or _columns(self))
        blocks = iter(there.iter_batches(batch_size=None, batch_format="pyarrow"))
        for part, size in zip(parts, sizes, strict=True):
            got: list[pa.Table] = []
            while (have := sum(map(len, got))) < size:
                try:
                    block = next(blocks, None)
                except Exception as e:
                    raise sentence(e) or e from None
                if block is None:
                    break
                got.append(block)
            if have != size:
                raise UserError(self._changed(part.split, part.shard, have, size))
            yield pa.concat_tables(got)

    def _changed(self, split: str, shard: int, have: int, want: int) -> str:
        return (
            f"{self.location}: {have} tasks of {split} shard {shard} came to this worker, not {want}; the table"
            " changed while it was read, start the run again"
        )
