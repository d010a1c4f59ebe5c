"""A task table in Ray's object store: read once by a search's driver, mapped by its trials instead of the files.

Ray hands Arrow's buffers to a process as they lie in the store: all trials of a node look at the same memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from distmeta.data import pools
from distmeta.data.encode import item_bags
from distmeta.data.schema import Dataset
from distmeta.data.tables import read_side
from distmeta.data.tasktable import TaskTable
from distmeta.storage import Location
from distmeta.tasks import Bag

SPLITS = ("train", "valid")
"""What trials look at: no trial sees the test."""


@dataclass(frozen=True)
class StoredTable(TaskTable):
    """A task table some of whose splits are in memory, each shard as it was read; the others are streamed."""

    splits: dict[str, dict[int, pa.Table]] | None = None
    """Split -> shard -> its tasks."""
    people: pa.Table | None = None
    """The fields of all users, where tasks are scenarios."""

    def read(
        self, split: str, shards: Sequence[int] | None = None, columns: Sequence[str] | None = None
    ) -> list[pa.Table]:
        """As TaskTable.read."""
        tables = (self.splits or {}).get(split)
        if tables is None:
            return super().read(split, shards, columns)
        wanted = sorted(tables) if shards is None else [v for v in shards if v in tables]
        return [tables[v].select(list(columns)) if columns else tables[v] for v in wanted]

    def users(self, dataset: Dataset) -> pa.Table:
        """As TaskTable.users."""
        return super().users(dataset) if self.people is None else self.people


@dataclass(frozen=True)
class ForWorkers:
    """What trials that train on workers of their own have in common besides."""

    leash: Any
    """Handle of the search's Leash."""
    datasets: dict[str, Any]
    """The splits as `delivery.materialise` gives them."""


@dataclass(frozen=True)
class Stored:
    """What all trials of a search have in common."""

    table: StoredTable
    dataset: Dataset
    """As its tasks show it."""
    place: Location
    """Where the dataset lies."""
    fields: pa.Table
    """The items' fields."""
    workers: "ForWorkers | None" = None
    """What trials need that train on workers of their own."""

    @classmethod
    def read(cls, table: TaskTable, dataset: Dataset, place: Location, memory: int) -> "Stored":
        """From the files.

        Args:
            memory: bytes; splits that take more stay in the files, from which trials stream them.

        Raises:
            UserError: a part is missing, damaged, or not as its manifest says.
        """
        splits = {name: table.counts[name] for name in SPLITS}
        kept = {
            name: dict(zip(_shards(table, name), table.read(name, None, _columns(table)), strict=True))
            for name, n in splits.items()
            if pools.estimate(n["tasks"], n["rows"], dataset, table.scenarios) <= memory
        }
        people = table.users(dataset) if table.scenarios and dataset.user_fields else None
        fields = read_side(place, dataset, "items", [f.name for f in dataset.item_fields])
        return cls(StoredTable(**vars(table), splits=kept, people=people), table.seen(dataset), place, fields)

    def items(self) -> dict[str, Bag]:
        """The items' fields as trainer.train takes them."""
        return item_bags(self.fields, self.dataset, self.place / "items")


def _shards(table: TaskTable, split: str) -> list[int]:
    return [v for v, n in enumerate(table.sizes(split)) if n]


def _columns(table: TaskTable) -> list[str]:
    """What training asks for: all but the times, and the users' numbers where only protocols look at them."""
    unasked = ("time", "split") if table.scenarios else ("user", "time", "split")
    return [name for name in table.columns() if name not in unasked]
