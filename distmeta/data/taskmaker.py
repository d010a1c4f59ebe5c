"""Making a task table: a dataset's parts -> a protocol's tasks -> Parquet parts, manifest last."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distmeta import draws
from distmeta.data.protocols import SPLITS, Protocol
from distmeta.data.reading import Reading
from distmeta.data.schema import Dataset
from distmeta.data.tables import PARQUET, read_side
from distmeta.errors import UserError
from distmeta.storage import Location, writing

FORMAT = 1
LISTS = {"item": pa.int32(), "label": pa.float32(), "time": pa.int64(), "role": pa.int8()}
"""List columns of a task table and their element types."""
FIXED = ("task", "user", "split", "cohort", *LISTS)
"""Its columns besides the user's fields. Where tasks are scenarios user is one of the lists and there are no fields."""
GROUP_TASKS, GROUP_ROWS = 4096, 2**17
"""Tasks, and rows of their lists, that a Parquet row group holds at most (one task at least): what a loader that
streams reads at a time of each shard. 2^17 rows are 2 MB in memory."""
ROW_COHORT = "row_cohort"
"""One more list column, int8, where the protocol has cohorts of rows: positions in the manifest's row_cohorts."""

_ARROW = {"categorical": pa.int32(), "multi_categorical": pa.list_(pa.int32()), "numeric": pa.float32()}


def task_schema(dataset: Dataset, row_cohorts: bool = False, scenarios: bool = False) -> pa.Schema:
    """The columns of a task table of this dataset, by a protocol with or without cohorts of rows, or of scenarios."""
    user = pa.list_(pa.int32()) if scenarios else pa.int32()
    fields = [("task", pa.int64()), ("user", user), ("split", pa.string()), ("cohort", pa.string())]
    fields += [(f.name, _ARROW[f.type]) for f in dataset.user_fields if not scenarios]
    lists = {**LISTS, ROW_COHORT: pa.int8()} if row_cohorts else LISTS
    return pa.schema(fields + [(name, pa.list_(kind)) for name, kind in lists.items()])


Cohorts = dict[str, dict[str, dict[str, int]]]
"""Split -> cohort -> {"tasks", "rows"}."""


class Maker:
    """One making of a task table. Streams over the parts of interactions/: a part bounds the memory."""

    def __init__(
        self,
        dataset: Location,
        manifest: Dataset,
        protocol: Protocol,
        split_seed: int,
        options: Mapping[str, Any],
        shards: int,
        where: Location,
    ) -> None:
        self.dataset, self.manifest, self.protocol = dataset, manifest, protocol
        self.split_seed, self.options, self.shards, self.where = split_seed, options, shards, where
        self.user_fields = [f.name for f in manifest.user_fields]
        self.scenarios = protocol.chunks is not None
        self.schema = task_schema(manifest, bool(protocol.row_cohorts), self.scenarios)
        clash = sorted(set(self.user_fields) & {*FIXED, ROW_COHORT})
        if clash:
            raise UserError(f"{dataset}: a user field cannot be called {clash[0]}; rename it and prepare again")

    def make(self, options: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        """Write the table; `options` and `origin` go into the manifest.

        Raises:
            UserError: the dataset is damaged, the protocol leaves no training task, or the place is read-only.
        """
        reading = Reading(self.dataset, self.manifest)
        source = reading.source()
        plan = self.protocol.plan(source, self.split_seed, self.options)
        users = read_side(self.dataset, self.manifest, "users", [] if self.scenarios else self.user_fields)
        chunks = self.protocol.chunks(source, plan) if self.protocol.chunks else reading.interactions()
        dropped, digest, cohorts = Counter[str](), hashlib.sha256(), Cohorts()
        dropped.update(plan.dropped)
        with _Parts(self.where, self.schema) as parts:
            for chunk in chunks:
                rows, left_out = self.protocol.tasks(chunk, plan)
                dropped.update(left_out)
                self._store(rows.sort("task", maintain_order=True), users, parts, digest, cohorts)
            if "train" not in cohorts:
                why = "; ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n) or "too few users"
                raise UserError(
                    f"{self.dataset}: protocol {self.protocol.name} leaves no training tasks ({why}); "
                    "give a larger dataset or another protocol"
                )
        manifest = {
            "format": FORMAT,
            "protocol": self.protocol.name,
            "version": self.protocol.version,
            "options": dict(options),
            "split_seed": self.split_seed,
            "shards": self.shards,
            "query_rows": self.protocol.query_rows,
            "episode_rows": self.options[self.protocol.episode] if self.protocol.episode else 0,
            "counts": {s: _total(cohorts.get(s, {})) for s in SPLITS},
            "cohorts": cohorts,
            "dropped": dict(dropped),
            "row_cohorts": list(self.protocol.row_cohorts),
            "compared": [list(p) for p in self.protocol.compared if any(c in s for s in cohorts.values() for c in p)],
            "notes": plan.notes,
            "split_hash": digest.hexdigest(),
            "dataset": dict(origin),
            "files": parts.files,
            **({"scenarios": True} if self.scenarios else {}),
            **({"names": {str(task): name for task, name in plan.names.items()}} if plan.names else {}),
            **self.protocol.sizes(self.options),
        }
        (self.where / "tasks.json").write_json(manifest)

    def _store(self, rows: pl.DataFrame, users: pa.Table, parts: "_Parts", digest: Any, cohorts: Cohorts) -> None:
        """Write a chunk's tasks to their parts, count them and hash them. `rows` is sorted by task."""
        if not len(rows):
            return
        task = rows["task"].to_numpy()
        first = np.flatnonzero(np.r_[True, task[1:] != task[:-1]])
        length = np.diff(np.r_[first, len(task)])
        digest.update(_hashable(rows, np.arange(len(task)) - np.repeat(first, length), self.scenarios))
        heads = rows[first].with_columns(rows=pl.Series(length))
        sums = heads.group_by("split", "cohort").agg(pl.len(), pl.sum("rows")).sort("split", "cohort")
        for split, cohort, tasks, n in sums.iter_rows():
            count = cohorts.setdefault(split, {}).setdefault(cohort, {"tasks": 0, "rows": 0})
            count["tasks"] += tasks
            count["rows"] += n
        table = self._table(rows, heads, users, np.r_[first, len(task)])
        shard = draws.hashed(task[first], purpose="shard") % np.uint64(self.shards)
        for split in heads["split"].unique():
            mine = (heads["split"] == split).to_numpy()
            for s in np.unique(shard[mine]):
                parts.write(split, int(s), table.take(pa.array(np.flatnonzero(mine & (shard == s)))))

    def _table(self, rows: pl.DataFrame, heads: pl.DataFrame, users: pa.Table, offsets: NDArray[np.int64]) -> pa.Table:
        """One row a task: `heads` with the user's fields, and the lists cut from `rows` at `offsets`."""
        columns: dict[str, Any] = {name: heads[name].cast(pl.String).to_arrow() for name in ("split", "cohort")}
        columns |= {name: heads[name].to_arrow() for name in ("task", "user")}
        columns |= {name: users[name].take(columns["user"]) for name in users.column_names}
        cuts = pa.array(offsets.astype(np.int32))
        lists = [name for name in self.schema.names if pa.types.is_list(self.schema.field(name).type)]
        lists = [name for name in lists if name not in users.column_names]
        columns |= {name: pa.ListArray.from_arrays(cuts, rows[name].to_arrow()) for name in lists}
        return pa.table([columns[name] for name in self.schema.names], names=self.schema.names).cast(self.schema)


def _total(cohorts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {k: sum(c[k] for c in cohorts.values()) for k in ("tasks", "rows")}


def _hashable(rows: pl.DataFrame, position: NDArray[np.int64], scenarios: bool) -> bytes:
    """What split_hash covers, as little-endian int64 [rows, 5]: task, row, item, split, role; of scenarios user too."""
    split = rows["split"].to_physical().to_numpy()
    columns = [rows["task"].to_numpy(), position, rows["item"].to_numpy(), split, rows["role"].to_numpy()]
    columns += [rows["user"].to_numpy()] if scenarios else []
    return np.stack([c.astype("<i8") for c in columns], axis=1).tobytes()


class _Parts:
    """The open part files of a table under way, one a split and shard.

    Their content depends on the dataset and the protocol alone, so two processes that make one table at the
    same time only overwrite each other's parts with equal ones, as a new making does an interrupted one's.
    """

    def __init__(self, where: Location, schema: pa.Schema) -> None:
        self.where, self.schema = where, schema
        self.files: list[dict[str, Any]] = []
        self._open: dict[tuple[str, int], tuple[pa.NativeFile, pq.ParquetWriter, str]] = {}
        self._rows = Counter[tuple[str, int]]()
        self._waiting: dict[tuple[str, int], pa.Table] = {}
        """Tasks that do not fill a row group yet."""

    def __enter__(self) -> "_Parts":
        return self

    def write(self, split: str, shard: int, tasks: pa.Table) -> None:
        """Append tasks to a part. Its row groups do not depend on how its tasks are cut into calls."""
        key = split, shard
        if key not in self._open:
            self._start(split, shard)
        if key in self._waiting:
            tasks = pa.concat_tables([self._waiting[key], tasks])
        *full, last = _groups(tasks)
        for start, end in full:
            self._group(key, tasks.slice(start, end - start))
        self._waiting[key] = tasks.slice(last[0])

    def _group(self, key: tuple[str, int], tasks: pa.Table) -> None:
        """Write tasks as one row group."""
        with writing(self.where):
            self._open[key][1].write_table(tasks, row_group_size=tasks.num_rows)
        self._rows[key] += tasks.num_rows

    def _start(self, split: str, shard: int) -> None:
        part = self.where / _path(split, shard)
        (self.where / split).make_dir()
        target = f"{part.path}.tmp-{os.getpid()}" if part.is_local else part.path
        with writing(part):
            stream = part.fs.open_output_stream(target)
            try:
                writer = pq.ParquetWriter(stream, self.schema, **PARQUET)
            except BaseException:
                _drop(part, target, stream)
                raise
            self._open[split, shard] = stream, writer, target

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._finish()
        except BaseException:
            self._abandon()
            raise

    def _finish(self) -> None:
        for (split, shard), (stream, writer, target) in sorted(self._open.items()):
            self._group((split, shard), self._waiting.pop((split, shard)))
            part = self.where / _path(split, shard)
            with writing(part):
                writer.close()
                size = stream.tell()
                stream.close()
                if part.is_local:
                    os.replace(target, part.path)
            rows = self._rows[split, shard]
            self.files.append(
                {"split": split, "shard": shard, "path": _path(split, shard), "rows": rows, "bytes": size}
            )

    def _abandon(self) -> None:
        """Close everything and delete what has no final name yet; without a manifest there is no table."""
        for stream, writer, target in self._open.values():
            with contextlib.suppress(OSError, pa.ArrowException, ValueError):
                writer.close()
            _drop(self.where, target, stream)


def _groups(tasks: pa.Table) -> list[tuple[int, int]]:
    """[start, end) of row groups, each as large as GROUP_TASKS and GROUP_ROWS allow but the last; `tasks` has some."""
    ends = np.cumsum(pl.Series(tasks["item"]).list.len().to_numpy(), dtype=np.int64)
    bounds, start, before = [], 0, 0
    while start < len(ends):
        most = int(np.searchsorted(ends, before + GROUP_ROWS, side="right"))
        end = min(max(most, start + 1), start + GROUP_TASKS)
        bounds.append((start, end))
        start, before = end, int(ends[end - 1])
    return bounds


def _drop(where: Location, target: str, stream: pa.NativeFile) -> None:
    """Close a part that will not be and delete it where that is possible."""
    with contextlib.suppress(OSError, pa.ArrowException, ValueError):
        stream.close()
    if where.is_local:
        with contextlib.suppress(OSError):
            os.remove(target)


def _path(split: str, shard: int) -> str:
    return f"{split}/part-{shard:05d}.parquet"
