"""Task tables: a dataset under one protocol and split, as Parquet, one row a task (design §5b).

DATASET/tasks/PROTOCOL-VERSION-SPLITSEED-OPTHASH/
  tasks.json                 manifest, written last: protocol, options, counts, split hash, files
  SPLIT/part-NNNNN.parquet   one file a split and shard that has tasks: task int64, user int32, split, cohort,
                             the user's fields as in users/, and the lists item int32, label float32,
                             time int64, role int8 and maybe row_cohort int8, in time order; its row groups bound
                             what is read at a time. Where tasks are scenarios user is a list too, and the users'
                             fields are read from the dataset's users/, two folders up

Shard of a task = hash(task id) mod shards. taskmaker.py makes a table, once.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from distmeta.data import protocols
from distmeta.data.protocols import SPLITS
from distmeta.data.schema import Dataset, Label
from distmeta.data.tables import read_groups, read_part, read_side
from distmeta.data.taskmaker import FIXED, FORMAT, Maker
from distmeta.errors import UserError
from distmeta.storage import Location

SHARDS = 16
"""Shards of a new table, and so the most workers that can share it."""


@dataclass(frozen=True)
class TaskTable:
    """A task table on disk: what tasks.json says, and the way to its rows."""

    location: Location
    protocol: str
    version: int
    options: dict[str, Any]
    split_seed: int
    shards: int
    query_rows: float
    """Query rows that the loader draws of a task whose rows are all DRAWN; below 1: that share of its rows."""
    episode_rows: int
    """Rows that the loader draws of a longer such task for an epoch's episode; 0: all."""
    counts: dict[str, dict[str, int]]
    """Split -> {"tasks", "rows"}."""
    cohorts: dict[str, dict[str, dict[str, int]]]
    """Split -> cohort -> {"tasks", "rows"}."""
    dropped: dict[str, int]
    """Why -> how many users or states became no task."""
    split_hash: str
    """sha256 over the sorted (task, row, item, split, role): equal hashes, equal splits."""
    dataset: dict[str, Any]
    """What the table was made from, as `_origin` describes it."""
    files: list[dict[str, Any]]
    """{"split", "shard", "path", "rows", "bytes"} of every part; `rows` are its tasks."""
    row_cohorts: list[str] = field(default_factory=list)
    """Cohorts of query rows; the parts have the list column row_cohort (positions here) where there are any."""
    compared: list[list[str]] = field(default_factory=list)
    """Pairs of cohorts whose users' errors a t-test compares."""
    notes: dict[str, str] = field(default_factory=dict)
    """What the protocol decided from the data, in words."""
    scenarios: bool = False
    """Tasks are scenarios: each row has its user, labels are clicks, what is evaluated is ranked lists."""
    draws: int = 1
    """Episodes that an epoch draws of each training task."""
    names: dict[str, str] = field(default_factory=dict)
    """Test task's id -> what a report calls it, where tasks have names."""

    @classmethod
    def open(cls, where: Location) -> "TaskTable":
        """Read tasks.json; UserError where it is missing, damaged or of another format version."""
        manifest = where / "tasks.json"
        raw = manifest.read_json(_again(where))
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise UserError(f"{manifest}: not a task table of format {FORMAT}; {_again(where)}")
        try:
            table = cls(location=where, **raw)
            for split in SPLITS:
                if sum(table.sizes(split)) != table.counts[split]["tasks"]:
                    raise ValueError(f"its parts do not add up to its {split} tasks")
            return table
        except (TypeError, KeyError, ValueError, IndexError) as e:
            raise UserError(f"{manifest}: damaged ({e}); {_again(where)}") from None

    def sizes(self, split: str) -> list[int]:
        """Number of tasks in each shard of `split`."""
        sizes = [0] * self.shards
        for f in self.files:
            if f["split"] == split:
                sizes[f["shard"]] = f["rows"]
        return sizes

    def read(
        self, split: str, shards: Sequence[int] | None = None, columns: Sequence[str] | None = None
    ) -> list[pa.Table]:
        """The tasks of `split`, one table a shard that has any: of all shards, or of those listed.

        Raises:
            UserError: no such split; or a part is missing, not Parquet, or not as the manifest says.
        """
        parts = self._parts(split)
        wanted = sorted(parts) if shards is None else [s for s in shards if s in parts]
        names, again = self.columns(columns), _again(self.location)
        return [read_part(self.location / parts[s]["path"], names, parts[s]["rows"], again) for s in wanted]

    def groups(self, split: str) -> list[list[tuple[int, int]]]:
        """(tasks, rows) of each Parquet row group of each shard of `split`, from the parts' footers.

        Raises:
            UserError: as `read`.
        """
        parts, again = self._parts(split), _again(self.location)
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.shards)]
        for s, f in parts.items():
            found[s] = read_groups(self.location / f["path"], "item", f["rows"], again)
        return found

    def stream(
        self, split: str, wanted: Iterable[tuple[int, Sequence[int]]], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """The tasks of each (shard, row groups) in turn, one table each, read when it is asked for.

        Raises:
            UserError: as `read`; there is no such row group.
        """
        parts, names, again = self._parts(split), self.columns(columns), _again(self.location)
        for s, groups in wanted:
            yield read_part(self.location / parts[s]["path"], names, parts[s]["rows"], again, groups)

    def _parts(self, split: str) -> dict[int, dict[str, Any]]:
        """Shard -> its part of `split`."""
        if split not in SPLITS:
            raise UserError(f"{self.location}: no split {split!r}; splits: {' '.join(SPLITS)}")
        return {f["shard"]: f for f in self.files if f["split"] == split}

    def columns(self, listed: Sequence[str] | None = None) -> list[str]:
        """The columns to read: those listed, or all."""
        fields = [] if self.scenarios else [f["name"] for f in self.dataset["user_fields"]]
        return list(listed or (*FIXED, *fields))

    def users(self, dataset: Dataset) -> pa.Table:
        """The fields of all users, row i being user i, from the dataset that the table lies in.

        Raises:
            UserError: users/ is missing, damaged or not as the manifest says.
        """
        return read_side(self.location.parent.parent, dataset, "users", [f.name for f in dataset.user_fields])

    def seen(self, dataset: Dataset) -> Dataset:
        """The dataset as its tasks show it: labels of scenarios are clicks, whatever they were made from."""
        return replace(dataset, label=Label("click", 0.0, 1.0)) if self.scenarios else dataset


def make(
    dataset: Location, protocol: str, split_seed: int, options: Mapping[str, Any], shards: int = SHARDS
) -> TaskTable:
    """The task table of a dataset, opened where it was made before, else made.

    Args:
        options: of the protocol (`protocols.protocol_options`); those left out have the protocol's defaults.

    Raises:
        UserError: unknown protocol or option, a damaged dataset, no training tasks; or the table on disk was
            made from another state of the dataset.
    """
    chosen = protocols.protocol(protocol)
    unknown = sorted(set(options) - set(chosen.options))
    if unknown:
        known = " ".join(chosen.options) or "none"
        raise UserError(f"protocol {protocol} has no option {unknown[0]}; it has: {known}")
    given = {**chosen.options, **options}
    manifest = Dataset.open(dataset)
    named = {k: _content(v) if k == "cold_users" and v else v for k, v in given.items()}
    digest = hashlib.sha256(json.dumps([named, shards], sort_keys=True).encode()).hexdigest()[:8]
    where = dataset / "tasks" / f"{protocol}-{chosen.version}-{split_seed}-{digest}"
    origin = _origin(manifest)
    if not (where / "tasks.json").exists():
        Maker(dataset, manifest, chosen, split_seed, given, shards, where).make(named, origin)
    table = TaskTable.open(where)
    if table.dataset != origin:
        changed = next(k for k in origin if table.dataset.get(k) != origin[k])
        raise UserError(f"{where}: made from another state of the dataset (other {changed}); {_again(where)}")
    return table


def _content(path: str) -> str:
    """What a file option stands for in the table's name and manifest: its content, not where it lies."""
    return "sha256:" + hashlib.sha256(protocols.read_text(Location.of(path)).encode()).hexdigest()


def _origin(dataset: Dataset) -> dict[str, Any]:
    """What of a dataset decides its task tables; JSON-like, to compare with tasks.json."""
    return {
        "users": dataset.users,
        "items": dataset.items,
        "interactions": dataset.interactions,
        "user_fields": [asdict(f) for f in dataset.user_fields],
        "files": [[f["path"], f["rows"], f["bytes"]] for f in dataset.files.get("interactions", [])],
    }


def _again(where: Location) -> str:
    return f"delete {where} to have it made again"
