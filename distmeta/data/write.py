"""Plain tables with raw ids -> a canonical dataset on disk (schema.py)."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from distmeta.data.schema import SCENARIOS, TASK_COLUMNS, Dataset, Field, FieldType, Label
from distmeta.data.tables import PARQUET
from distmeta.errors import UserError
from distmeta.storage import Location, writing

PART_ROWS = 4_000_000
"""Rows an interactions part holds at most, unless one user alone has more."""

_ARROW: dict[FieldType, pa.DataType] = {
    "categorical": pa.int32(),
    "multi_categorical": pa.list_(pa.int32()),
    "numeric": pa.float32(),
}
_INTERACTIONS = pa.schema([("user", pa.int32()), ("item", pa.int32()), ("label", pa.float32()), ("time", pa.int64())])
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_OURS = re.compile(
    r"(users|items|interactions)(/part-\d{5}\.parquet)?|vocabularies(/(user|item|interaction)-[\w-]+\.parquet)?"
    r"|tasks(/.*)?|dataset\.json\.tmp-\d+"
)
_TAKEN = {"user": ("user", "item", "raw_id", *TASK_COLUMNS), "item": ("user", "item", "raw_id")}
"""Names of the tables' own columns: a user's fields stand beside these in users/ and in task tables."""
_INTEGER = r"^-?\d{1,18}$"


def write_dataset(
    where: Location,
    *,
    name: str,
    label: Label,
    user_fields: Mapping[str, FieldType],
    item_fields: Mapping[str, FieldType],
    users: pl.DataFrame,
    items: pl.DataFrame,
    interactions: pl.DataFrame,
    extra: Mapping[str, Any] | None = None,
    part_rows: int = PART_ROWS,
) -> Dataset:
    """Write a canonical dataset at `where`, the manifest last: an interrupted call leaves no dataset.

    Args:
        name: what reports call the dataset.
        label: kind and range; the caller has checked that every label lies within it.
        user_fields, item_fields: field name -> type, in the manifest's order. Each is a column of `users`
            or `items`: a scalar (categorical), a list of scalars (multi_categorical), a number (numeric);
            null, NaN or an empty list is the unknown value.
        users: column `user` (raw id, each once) and the user fields; those with no interaction are dropped.
        items: column `item` (raw id, each once) and the item fields; those with no interaction are kept.
        interactions: columns user, item (raw ids found in the two tables), label, time (seconds); rows of a
            user with equal time keep their order. And maybe scenario: the name of the one it took place in.
        extra: goes into the manifest; `extra["dropped"]["users_without_interactions"]` is added to it.
        part_rows: the most rows of one interactions part; a user is never cut in two.

    Raises:
        UserError: a dataset, or something other than a half-written one, stands at `where`; or it cannot be
            written.
        ValueError: an interaction names a user or item that its table lacks (sources check this by row).
    """
    for side, names in (("user", user_fields), ("item", item_fields)):
        for field_name in names:
            check_name(side, field_name, name)
    clear_place(where)
    users, items = (t.with_columns(pl.col(k).cast(pl.String)) for t, k in ((users, "user"), (items, "item")))
    interactions = interactions.with_columns(pl.col("user", "item").cast(pl.String))
    user_ids, item_ids = ordered(interactions["user"]), ordered(items["item"])
    dropped = users.height - len(user_ids)

    files: dict[str, list[dict[str, Any]]] = {
        "users": [],
        "items": [],
        "interactions": [],
        "vocabularies": [],
    }
    described: dict[str, tuple[Field, ...]] = {}
    for side, ids, table, fields in (
        ("user", user_ids, users, user_fields),
        ("item", item_ids, items, item_fields),
    ):
        table = _indexed(ids, side).join(table, left_on="raw_id", right_on=side, how="left", maintain_order="left")
        columns, schema, described[side] = _encode_side(where, side, table, fields, files["vocabularies"])
        _write(where, f"{side}s/part-00000.parquet", columns.to_arrow().cast(schema), files[f"{side}s"])

    rows, scenarios = _dense(interactions, user_ids, item_ids), pl.Series("value", [], pl.String)
    row_schema = _INTERACTIONS
    if "scenario" in rows.columns:
        row_schema = row_schema.append(pa.field("scenario", pa.int32()))
        scenarios = ordered(rows["scenario"])
        index = _indexed(scenarios, "_scenario")
        rows = rows.join(index, left_on="scenario", right_on="raw_id", how="left", maintain_order="left")
        rows = rows.drop("scenario").rename({"_scenario": "scenario"})
        _write(where, SCENARIOS, pa.table({"value": scenarios.to_arrow().cast(pa.string())}), files["vocabularies"])
    for number, (start, end) in enumerate(part_bounds(rows["user"].to_numpy(), part_rows)):
        part = rows.slice(start, end - start).to_arrow().cast(row_schema)
        _write(where, f"interactions/part-{number:05d}.parquet", part, files["interactions"])

    kept = dict(extra or {})
    kept["dropped"] = {**kept.get("dropped", {}), "users_without_interactions": dropped}
    dataset = Dataset(
        name, label, described["user"], described["item"],
        users=len(user_ids), items=len(item_ids), interactions=rows.height, extra=kept, files=files,
        scenarios=len(scenarios),
    )  # fmt: skip
    (where / "dataset.json").write_json(dataset.to_json())
    return dataset


def ordered(values: pl.Series) -> pl.Series:
    """The distinct non-null values as strings, sorted: by number where all are whole, else by UTF-8 bytes."""
    text = values.cast(pl.String).drop_nulls().unique().rename("value")
    if len(text) and text.str.contains(_INTEGER).all():
        return text.to_frame().sort(pl.col("value").cast(pl.Int64), "value")["value"]
    return text.sort()


def part_bounds(user: np.ndarray, part_rows: int) -> list[tuple[int, int]]:
    """[start, end) of parts of at most `part_rows` rows of the sorted column `user`; no user is cut."""
    ends = np.append(np.flatnonzero(np.diff(user)) + 1, len(user))
    bounds: list[tuple[int, int]] = []
    start = 0
    while start < len(user):
        fitting = int(np.searchsorted(ends, start + part_rows, side="right")) - 1
        following = int(np.searchsorted(ends, start, side="right"))
        end = int(ends[max(fitting, following)])
        bounds.append((start, end))
        start = end
    return bounds


def clear_place(where: Location) -> None:
    """Make `where` free for a new dataset: delete a half-written one (no manifest), nothing else.

    Raises:
        UserError: a dataset is there, or files that no half-written dataset would hold.
    """
    if (where / "dataset.json").exists():
        raise UserError(f"{where}: a dataset is already here; choose another --out or delete it first")
    if not where.is_dir():
        return
    if foreign := [path for path in where.below() if not _OURS.fullmatch(path)]:
        raise UserError(f"{where}: holds other files ({foreign[0]}); choose an empty or new folder for --out")
    with writing(where):
        for child in where.children():
            child.remove()


def check_name(side: str, name: str, where: str) -> None:
    """UserError where a field of `side` (user or item) may not be called `name`; `where` starts the sentence."""
    taken = _TAKEN[side]
    if not _NAME.fullmatch(name) or name in taken:
        raise UserError(
            f"{where}: field {name!r}: a name has letters, digits, _ and - only, and is none of {' '.join(taken)}; "
            "choose another"
        )


def _indexed(ids: pl.Series, side: str) -> pl.DataFrame:
    return pl.DataFrame({side: np.arange(len(ids), dtype=np.int32), "raw_id": ids})


def _encode_side(
    where: Location,
    side: str,
    table: pl.DataFrame,
    fields: Mapping[str, FieldType],
    vocabularies: list[dict[str, Any]],
) -> tuple[pl.DataFrame, pa.Schema, tuple[Field, ...]]:
    """Field columns as indices or numbers, their Arrow schema and Fields; writes the vocabularies."""
    columns = table.select(side, "raw_id")
    schema = pa.schema([(side, pa.int32()), ("raw_id", pa.string())])
    described = []
    for name, kind in fields.items():
        schema = schema.append(pa.field(name, _ARROW[kind]))
        if kind == "numeric":
            column, field = _encode_numeric(table[name])
        else:
            column, values = _encode_set(table[name]) if kind == "multi_categorical" else _encode_one(table[name])
            field = Field(name, kind, size=len(values) + 1)
            vocabulary = pa.table({"value": pa.array([None, *values.to_list()], pa.string())})
            _write(where, f"vocabularies/{side}-{name}.parquet", vocabulary, vocabularies)
        columns = columns.with_columns(column.alias(name))
        described.append(replace(field, name=name))
    return columns, schema, tuple(described)


def _encode_numeric(column: pl.Series) -> tuple[pl.Series, Field]:
    numbers = column.cast(pl.Float64).fill_nan(None)
    known = numbers.drop_nulls().to_numpy()
    mean = float(known.mean()) if len(known) else 0.0
    std = float(known.std()) if len(known) else 0.0
    return numbers.cast(pl.Float32), Field("", "numeric", size=1, mean=mean, std=std or 1.0)


def _lookup(values: pl.Series) -> pl.DataFrame:
    return pl.DataFrame({"value": values, "index": np.arange(1, len(values) + 1, dtype=np.int32)})


def _encode_one(column: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Index of each value (0 where unknown), and the sorted values that 1, 2, … stand for."""
    values = ordered(column)
    text = column.cast(pl.String).rename("value").to_frame()
    joined = text.join(_lookup(values), on="value", how="left", maintain_order="left")
    return joined["index"].fill_null(0), values


def _encode_set(column: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Sorted distinct indices of each list (empty where unknown), and the values that 1, 2, … stand for."""
    rows = pl.DataFrame({"row": np.arange(len(column), dtype=np.uint32)})
    flat = rows.with_columns(column.cast(pl.List(pl.String)).alias("value")).explode("value").drop_nulls().unique()
    values = ordered(flat["value"])
    sets = (
        flat.join(_lookup(values), on="value")
        .sort("row", "index")
        .group_by("row", maintain_order=True)
        .agg(pl.col("index"))
    )
    joined = rows.join(sets, on="row", how="left", maintain_order="left")
    return joined["index"].fill_null(pl.lit([], dtype=pl.List(pl.Int32))), values


def _dense(interactions: pl.DataFrame, user_ids: pl.Series, item_ids: pl.Series) -> pl.DataFrame:
    """The interactions with indices for raw ids, sorted by (user, time, original row)."""
    names = ["user", "item", "label", "time", *(["scenario"] if "scenario" in interactions.columns else [])]
    rows = interactions.select(names).with_columns(pl.col("^scenario$").cast(pl.String)).with_row_index("_row")
    for side, ids in (("user", user_ids), ("item", item_ids)):
        index = _indexed(ids, side).rename({side: "_index"})
        rows = (
            rows.join(index, left_on=side, right_on="raw_id", how="left", maintain_order="left")
            .drop(side)
            .rename({"_index": side})
        )
        if rows[side].has_nulls():
            raise ValueError(f"an interaction names an {side} that the {side}s table lacks")
    return rows.sort("user", "time", "_row").select(names)


def _write(where: Location, path: str, table: pa.Table, files: list[dict[str, Any]]) -> None:
    target = where / path
    target.parent.make_dir()
    with writing(target):
        pq.write_table(table, target.path, filesystem=target.fs, row_group_size=1 << 20, **PARQUET)
        size = target.fs.get_file_info(target.path).size
    files.append({"path": path, "rows": table.num_rows, "bytes": size})
