"""Tasks to workers through Ray Data: each rank gets the shards v ≡ r mod N of a task table (design §5b).

The parts are read once, by Ray Data's tasks on all nodes of the cluster, before the workers start, and lie in the
object store; a worker, and after a failure the next group of workers of whatever size, takes its shards from there.
Reading inside `DataConfig.configure` instead needs CPUs that the workers hold already: it hangs.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from distmeta import draws
from distmeta.data.protocols import SPLITS
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError

Part = tuple[str, int]
"""Split and shard."""


class TaskParts(Datasource):
    """Ray Data's reader of a task table: one read task a part, with the checks of TaskTable.read.

    Not `read_parquet`: it has no switch for the page checksums, without which a third of flipped bits are read as
    other numbers, and it packs all parts of a small table into one task.
    """

    def __init__(self, table: TaskTable, parts: Sequence[Part]) -> None:
        self.table, self.parts = table, parts

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: Parquet is encoded and compressed."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One a part, in the order given."""
        rows = {(f["split"], f["shard"]): f["rows"] for f in self.table.files}
        tasks = []
        for split, shard in self.parts:
            meta = BlockMetadata(num_rows=rows[split, shard], size_bytes=None, input_files=None, exec_stats=None)
            tasks.append(ReadTask(_reader(self.table, split, shard), meta))
        return tasks


def _reader(table: TaskTable, split: str, shard: int) -> Callable[[], Iterable[pa.Table]]:
    return lambda: table.read(split, [shard])


def read(table: TaskTable, parts: Sequence[Part]) -> Dataset:
    """The parts one after another, read when it is executed.

    The read tasks ask for no CPU: the workers hold them all, and tasks that want one would wait for ever, also those
    that read again what was lost with a node.
    """
    return ray.data.read_datasource(
        TaskParts(table, parts),
        override_num_blocks=len(parts),
        num_cpus=0,
        concurrency=max(1, int(ray.cluster_resources().get("CPU", 1))),
    )


def materialise(table: TaskTable) -> dict[str, Any]:
    """All tasks of a table in the object store: split -> Dataset of its shards, one after another, each as stored.

    Raises:
        UserError: a part is missing or damaged, or cannot be read on a node of the cluster.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns of what is meant so: no CPU is left to it
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    sizes = {split: table.sizes(split) for split in SPLITS if sum(table.sizes(split))}
    parts = [(split, v) for split, rows in sizes.items() for v in range(table.shards) if rows[v]]
    whole = read(table, parts).materialize()
    ends = np.cumsum([sum(rows) for rows in sizes.values()])[:-1].tolist()
    return dict(zip(sizes, _cut(whole, ends), strict=True))


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
                given[split] = mine[0].union(*mine[1:]).iterator() if mine else None
        return ranks


@dataclass(frozen=True)
class DeliveredTable(TaskTable):
    """A task table in a worker: its manifest from disk, its rows from Ray Data."""

    def read(
        self, split: str, shards: Sequence[int] | None = None, columns: Sequence[str] | None = None
    ) -> list[pa.Table]:
        """As TaskTable.read, of shards that were delivered to this worker.

        Raises:
            UserError: what came is not what the manifest says.
        """
        sizes = self.sizes(split)
        wanted = [v for v in (range(self.shards) if shards is None else shards) if sizes[v]]
        if not wanted:
            return []
        shard_of_rank: Any = ray.train.get_dataset_shard(split)
        blocks = shard_of_rank.iter_batches(batch_size=None, batch_format="pyarrow")
        whole = pa.concat_tables(blocks).combine_chunks()
        shard = draws.hashed(whole["task"].to_numpy(), purpose="shard") % np.uint64(self.shards)
        whole = whole.select(list(columns)) if columns else whole
        tables = [whole.filter(pa.array(shard == v)) for v in wanted]
        for v, table in zip(wanted, tables, strict=True):
            if len(table) != sizes[v]:
                raise UserError(
                    f"{self.location}: {len(table)} tasks of {split} shard {v} came to this worker, not {sizes[v]};"
                    " the table changed while it was read, start the run again"
                )
        return tables
