"""The scenarios of several datasets in one (CMML §4.1.1's hybrid Movie-Taobao): domains that share nothing.

Each dataset's scenarios are chosen as protocol cmml-scenario would (its bounds hold here too), and their positives
become clicks in scenarios of the new dataset's own, called `DATASET: scenario`: so the protocol tells the domains
apart as cohorts. Users and items are called `DATASET/id`. Fields of one name and type are one field; a user or item
of a dataset without it has no value there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from distmeta.data.protocols.scenario import CMML_SCENARIO, KIND, Scenarios, chunks
from distmeta.data.reading import Reading
from distmeta.data.schema import Dataset, Field, FieldType, Label
from distmeta.data.tables import AGAIN, read_part, read_side, to_polars
from distmeta.data.write import clear_place, write_dataset
from distmeta.errors import UserError
from distmeta.storage import Location


def hybrid(parts: Sequence[Location], where: Location, options: Mapping[str, Any]) -> Dataset:
    """Datasets -> one of all their scenarios, at `where`.

    Args:
        options: of protocol cmml-scenario, for those who choose the scenarios and positives; the others do nothing.

    Raises:
        UserError: fewer than two datasets, two of one name, fields of one name but two types, a dataset without
            scenarios; or `where` is taken.
    """
    clear_place(where)
    manifests = [Dataset.open(part) for part in parts]
    names = [m.name for m in manifests]
    if len(parts) < 2:
        raise UserError("prepare hybrid: --of names one dataset; give two or more")
    if twice := next((n for i, n in enumerate(names) if n in names[:i]), None):
        raise UserError(f"prepare hybrid: two datasets are called {twice}; a hybrid is of different ones")
    rows = pl.concat([_rows(p, m, options) for p, m in zip(parts, manifests, strict=True)])
    sides, fields = {}, {}
    for side in ("user", "item"):
        fields[side] = _fields(manifests, side)
        tables = [_side(p, m, side) for p, m in zip(parts, manifests, strict=True)]
        sides[side] = pl.concat(tables, how="diagonal").filter(pl.col(side).is_in(rows[side].unique().implode()))
    counts = rows.group_by(pl.col("scenario").str.extract(f"^(.+?){KIND}")).agg(pl.n_unique("user")).sort("scenario")
    return write_dataset(
        where, name="+".join(names), label=Label("click", 0.0, 1.0), user_fields=fields["user"],
        item_fields=fields["item"], users=sides["user"], items=sides["item"], interactions=rows,
        extra={
            "source": "hybrid",
            "content_fields": {side: list(kinds) for side, kinds in fields.items()},
            "read": {"positives": rows.height, "scenarios": rows["scenario"].n_unique()},
            "dropped": {},
            "notes": [f"{name}: {users:,} users" for name, users in counts.iter_rows()],
        },
    )  # fmt: skip


def _rows(part: Location, manifest: Dataset, options: Mapping[str, Any]) -> pl.DataFrame:
    """user, item, scenario (by name), label, time: the positives of a dataset's scenarios."""
    source = Reading(part, manifest).source()
    plan = CMML_SCENARIO.plan(source, 0, {**CMML_SCENARIO.options, **options})
    chosen: Scenarios = plan.more
    ids = {side: _raw(part, manifest, side)[side] for side in ("user", "item")}
    frames = [
        rows.select(
            *(ids[side].gather(rows[side]).alias(side) for side in ("user", "item")),
            (f"{manifest.name}{KIND}" + chosen.names.gather(rows["scenario"])).alias("scenario"),
            pl.lit(1.0, pl.Float32).alias("label"),
            "time",
        )
        for rows in chunks(source, plan)
    ]
    if not frames:
        why = "; ".join(f"{n:,} {reason}" for reason, n in plan.dropped.items() if n) or "there is none"
        raise UserError(f"{part}: leaves no scenario ({why}); give other bounds or another dataset")
    return pl.concat(frames)


def _raw(part: Location, manifest: Dataset, side: str, *fields: str) -> pl.DataFrame:
    """The new ids of a side's users or items, under its name, and fields as stored; row i is user or item i."""
    table = to_polars(read_side(part, manifest, f"{side}s", ["raw_id", *fields]))
    return table.select((pl.lit(f"{manifest.name}/") + pl.col("raw_id")).alias(side), *fields)


def _side(part: Location, manifest: Dataset, side: str) -> pl.DataFrame:
    """New ids, and fields as the values that they stand for."""
    described: tuple[Field, ...] = manifest.user_fields if side == "user" else manifest.item_fields
    table = _raw(part, manifest, side, *(f.name for f in described))
    for f in (f for f in described if f.type != "numeric"):
        file = part / f"vocabularies/{side}-{f.name}.parquet"
        values = to_polars(read_part(file, ["value"], f.size, AGAIN))["value"]
        column = table[f.name]
        flat = column.explode() if f.type == "multi_categorical" else column
        if not flat.is_between(0, f.size - 1).fill_null(True).all():
            raise UserError(f"{part / f'{side}s'}: a {f.name} is not in {file}; {AGAIN}")
        named = pl.DataFrame({"index": pl.int_range(f.size, dtype=pl.Int32, eager=True), f.name: values})
        rows = table.select(pl.int_range(pl.len()).alias("row"))
        pairs = rows.with_columns(column.alias("index"))
        pairs = pairs.explode("index") if f.type == "multi_categorical" else pairs
        pairs = pairs.join(named, on="index", how="inner", maintain_order="left")
        if f.type == "multi_categorical":
            pairs = pairs.group_by("row", maintain_order=True).agg(pl.col(f.name).drop_nulls())
        table = table.with_columns(rows.join(pairs, on="row", how="left", maintain_order="left")[f.name])
    return table


def _fields(manifests: Sequence[Dataset], side: str) -> dict[str, FieldType]:
    """Name -> type of all datasets' fields of a side; UserError where two differ."""
    found: dict[str, FieldType] = {}
    for m in manifests:
        for f in m.user_fields if side == "user" else m.item_fields:
            if found.setdefault(f.name, f.type) != f.type:
                raise UserError(
                    f"prepare hybrid: the {side} field {f.name} is {f.type} in {m.name} and {found[f.name]} in another"
                    " dataset; prepare one of them with another name for it"
                )
    return found
