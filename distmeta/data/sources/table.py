"""A person's own Parquet or CSV tables, described by a short YAML spec (`prepare table --help` shows one)."""

import io
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads

from distmeta import remote, yamlfile
from distmeta.data.schema import Dataset, FieldType, Label
from distmeta.data.sources.lines import known, last_of_pairs, refuse
from distmeta.data.write import check_name, clear_place, write_dataset
from distmeta.errors import UserError
from distmeta.fields import build, nearest, option
from distmeta.storage import Location

EXAMPLE = """\
name: shop
label: {kind: rating, minimum: 1, maximum: 5}     # or {kind: click}: every label 0 or 1
interactions: {file: ratings.parquet, user: uid, item: sku, label: stars, time: at}
# and, where the log says in which scenario (a market, a theme) a row took place: scenario: market
users:                                            # optional, as is items
  file: people.csv
  key: uid
  fields: [{name: age, type: numeric}, {name: town, column: home_town, type: categorical}]
items:
  file: goods.parquet
  key: sku
  fields: [{name: tags, type: multi_categorical, separator: "|"}]  # no separator: a list column
"""

_LARGEST = 3e38
_TYPES = ("categorical", "multi_categorical", "numeric")


@dataclass(frozen=True)
class _Top:
    name: str = option("", "What reports call the dataset.")
    label: dict = field(default_factory=dict)
    interactions: dict = field(default_factory=dict)
    users: dict = field(default_factory=dict)
    items: dict = field(default_factory=dict)


@dataclass(frozen=True)
class _Label:
    kind: str = option("", "rating or click.", ("rating", "click"))
    minimum: float = option(0.0, "Least label.")
    maximum: float = option(1.0, "Greatest label.")


@dataclass(frozen=True)
class _Interactions:
    file: str = option("", "Parquet (a file or a folder of parts) or CSV with a header.")
    user: str = option("user", "Column of the user's id.")
    item: str = option("item", "Column of the item's id.")
    label: str = option("label", "Column of the label.")
    time: str = option("", "Column of the time: whole seconds, or a date and time. Absent: row order.")
    scenario: str = option("", "Column that names the scenario (a market, a theme) that a row took place in.")


@dataclass(frozen=True)
class _Side:
    file: str = option("", "Parquet or CSV.")
    key: str = option("", "Column of the id.")
    fields: list = field(default_factory=list)


@dataclass(frozen=True)
class _FieldSpec:
    name: str = option("", "The field's name.")
    type: str = option("", "Its type.", _TYPES)
    column: str = option("", "Its column; absent: the name.")
    separator: str = option("", "multi_categorical in a text column: what stands between values.")


def table(spec: Location, raw: Location, where: Location) -> Dataset:
    """The tables that the YAML file `spec` describes (paths relative to `raw`) -> the dataset at `where`.

    Rows in error sentences count from 1, the header not among them.

    Raises:
        UserError: the spec or a table is missing or wrong, naming key, or file and row; or `where` is taken.
    """
    clear_place(where)
    top, label = _read_spec(spec)
    interactions, file = _interactions(spec, top.interactions, raw, label)
    sides: dict[str, pl.DataFrame] = {}
    fields: dict[str, dict[str, FieldType]] = {}
    read = {"interactions": interactions.height}
    for side, section in (("user", top.users), ("item", top.items)):
        if not section:
            sides[side], fields[side] = interactions.select(pl.col(side).unique(maintain_order=True)), {}
            continue
        sides[side], fields[side], of = _side(spec, side, section, raw)
        known(interactions[side], sides[side][side], file, of, unit="row")
        read[f"{side}s"] = sides[side].height
    kept, repeated = last_of_pairs(interactions)
    extra: dict[str, Any] = {
        "source": "table",
        "content_fields": {side: list(names) for side, names in fields.items()},
        "read": read,
        "dropped": {"earlier_interactions_of_the_same_user_and_item": repeated},
        "notes": [] if top.interactions.get("time") else ["no time column: rows taken as in order of time"],
    }  # fmt: skip
    return write_dataset(
        where, name=top.name, label=label, user_fields=fields["user"], item_fields=fields["item"],
        users=sides["user"], items=sides["item"], interactions=kept, extra=extra,
    )  # fmt: skip


def _read_spec(spec: Location) -> tuple[_Top, Label]:
    try:
        raw = yamlfile.read(spec, "mend it, `prepare table --help` shows one")
    except FileNotFoundError:
        raise UserError(f"{spec}: no such spec file; `prepare table --help` shows one") from None
    if not isinstance(raw, dict):
        raise UserError(f"{spec}: must hold name, label and interactions; `prepare table --help` shows one")
    top = build(_Top, {str(k): v for k, v in raw.items()}, str(spec))
    _need(top, ("name", "label", "interactions"), str(spec))
    chosen = build(_Label, top.label, f"{spec}: label")
    _need(chosen, ("kind",), f"{spec}: label")
    if chosen.kind == "click":
        if (chosen.minimum, chosen.maximum) != (0.0, 1.0):
            raise UserError(f"{spec}: label: a click is 0 or 1; leave minimum and maximum out, or make it a rating")
        return top, Label("click", 0.0, 1.0)
    for key in ("minimum", "maximum"):
        if key not in top.label:
            raise UserError(f"{spec}: label: {key} is missing; a rating needs the range it lies in")
    if not chosen.minimum < chosen.maximum:
        raise UserError(f"{spec}: label: minimum must be below maximum")
    return top, Label("rating", chosen.minimum, chosen.maximum)


def _need(section: Any, keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        if not getattr(section, key):
            raise UserError(f"{where}: {key} is missing; `prepare table --help` shows a whole spec")


def _interactions(spec: Location, section: dict, raw: Location, label: Label) -> tuple[pl.DataFrame, Location]:
    """Columns user, item (strings), label (float32), time (int64 seconds), maybe scenario (string), and their file."""
    s = build(_Interactions, section, f"{spec}: interactions")
    _need(s, ("file",), f"{spec}: interactions")
    file = raw / s.file
    roles = {"user": s.user, "item": s.item, "label": s.label, "time": s.time, "scenario": s.scenario}
    roles = {role: column for role, column in roles.items() if column}
    columns = list(roles.values())
    for role, column in roles.items():
        first = next(r for r, c in roles.items() if c == column)
        if first != role:
            raise UserError(f"{spec}: interactions: {first} and {role} are both the column {column!r}; name another")
    frame = _read(file, columns, f"{spec}: interactions")
    user, item = (_ids(frame[c], file) for c in (s.user, s.item))
    labels = _numbers(frame[s.label], file)
    refuse(labels.is_null(), file, lambda i: f"no {s.label}; fill it in or delete the row", unit="row")
    if label.kind == "click":
        good, need = labels.is_in([0.0, 1.0]), "0 or 1"
    else:
        good, need = (
            labels.is_between(label.minimum, label.maximum),
            f"{label.minimum:g} to {label.maximum:g}",
        )
    refuse(~good, file, lambda i: f"{s.label} is {labels[i]:g}, not within {need}; mend the row, or "
           f"the label's range in {spec}", unit="row")  # fmt: skip
    time = _seconds(frame[s.time], file) if s.time else pl.int_range(frame.height, dtype=pl.Int64, eager=True)
    rows = pl.DataFrame({"user": user, "item": item, "label": labels.cast(pl.Float32), "time": time})
    return rows.with_columns(_ids(frame[s.scenario], file).alias("scenario")) if s.scenario else rows, file


def _side(
    spec: Location, side: str, section: dict, raw: Location
) -> tuple[pl.DataFrame, dict[str, FieldType], Location]:
    where = f"{spec}: {side}s"
    s = build(_Side, section, where)
    _need(s, ("file", "key"), where)
    file = raw / s.file
    specs: list[_FieldSpec] = []
    for number, entry in enumerate(s.fields, 1):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: field {number} must be {{name: ..., type: ...}}, not {entry!r}")
        f = build(_FieldSpec, entry, f"{where}: field {number}")
        _need(f, ("name", "type"), f"{where}: field {number}")
        check_name(side, f.name, f"{where}: field {number}")
        if f.name in [g.name for g in specs]:
            raise UserError(f"{where}: field {number}: the name {f.name} is taken; give each field its own")
        specs.append(f)
    frame = _read(file, list(dict.fromkeys([s.key, *(f.column or f.name for f in specs)])), where)
    ids = _ids(frame[s.key], file)
    refuse(~ids.is_first_distinct(), file, lambda i: f"{s.key} {ids[i]} is there twice; delete one", unit="row")
    columns = [_field(frame[f.column or f.name], f, file).alias(f.name) for f in specs]
    kinds: dict[str, FieldType] = {f.name: f.type for f in specs}  # type: ignore[misc]  # checked by build()
    return pl.DataFrame([ids.alias(side), *columns]), kinds, file


def _field(column: pl.Series, f: _FieldSpec, file: Location) -> pl.Series:
    listed = isinstance(column.dtype, pl.List | pl.Array)
    if f.type == "numeric":
        numbers = _numbers(column, file)
        infinite = numbers.is_infinite().fill_null(False)
        refuse(infinite, file, lambda i: f"{column.name} is infinite; mend the row or leave it empty", unit="row")
        refuse((numbers.abs() > _LARGEST).fill_null(False), file,
               lambda i: f"{column.name} is {numbers[i]:g}, beyond what is computed with (float32); mend the row, or "
               "give its logarithm", unit="row")  # fmt: skip
        return numbers
    if f.type == "multi_categorical" and not listed:
        if not f.separator:
            raise UserError(f"{file}: {column.name} is no list column; give field {f.name} a separator in the spec")
        return column.cast(pl.String).str.split(f.separator).list.eval(
            pl.element().str.strip_chars().filter(pl.element().str.strip_chars() != "")
        )  # fmt: skip
    if f.type == "categorical" and listed:
        raise UserError(f"{file}: {column.name} is a list column; make field {f.name} multi_categorical in the spec")
    return column


def _read(file: Location, columns: list[str], where: str) -> pl.DataFrame:
    """The named columns of a Parquet or CSV file (CSV: all strings), an empty text being no value.

    Raises:
        UserError: the file is missing or damaged, lacks a column or has two of its name, or has no rows.
    """
    if not file.exists():
        raise UserError(f"{where}: file {file} does not exist; paths are relative to --raw")
    if file.name.lower().endswith(".csv"):
        frame = _read_csv(file)
        _check_columns(columns, frame.columns, file, where)
        frame = frame.select(columns)
    else:
        try:
            found = pads.dataset(file.path, filesystem=file.fs, format="parquet")
            if not found.files:
                raise UserError(f"{file}: a folder without Parquet files; name a file or a folder of parts")
            _check_columns(columns, found.schema.names, file, where)
            frame = pl.DataFrame(pl.from_arrow(found.to_table(columns=columns)))
        except (pa.ArrowInvalid, OSError) as e:
            remote.let_pass(e)
            reason = str(e).splitlines()[0]
            raise UserError(f"{file}: not readable as Parquet ({reason}); CSV files must end in .csv") from None
    if not frame.height:
        raise UserError(f"{file}: the file is empty (no rows); give one that has some")
    return frame.with_columns(pl.col(pl.String).replace("", None))


def _read_csv(file: Location) -> pl.DataFrame:
    raw = file.read_bytes()
    if not raw.strip():
        raise UserError(f"{file}: the file is empty; give one with a header and rows")
    try:
        header = pl.read_csv(io.BytesIO(raw), infer_schema=False, has_header=False, n_rows=1).row(0)
        twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
        if twice is not None:
            raise UserError(f"{file}: two columns are called {twice!r}; rename or delete one")
        return pl.read_csv(io.BytesIO(raw), infer_schema=False)
    except pl.exceptions.PolarsError as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{file}: not readable as CSV ({reason}); mend it or save it as Parquet") from None


def _check_columns(wanted: list[str], there: list[str], file: Location, where: str) -> None:
    for column in wanted:
        if column not in there:
            raise UserError(
                f"{file}: no column {column!r}{nearest(column, there)}, which {where} asks for; "
                f"columns: {' '.join(there)}"
            )


def _ids(column: pl.Series, file: Location) -> pl.Series:
    if isinstance(column.dtype, pl.List | pl.Array | pl.Struct | pl.Float32 | pl.Float64):
        raise UserError(f"{file}: {column.name} holds {column.dtype}, not ids; make them whole numbers or text")
    ids = column.cast(pl.String)
    refuse(ids.is_null(), file, lambda i: f"no {column.name}; fill it in or delete the row", unit="row")
    return ids


def _numbers(column: pl.Series, file: Location) -> pl.Series:
    """float64, null where there is no value; UserError where a value is no number."""
    if isinstance(column.dtype, pl.List | pl.Array | pl.Struct) or column.dtype.is_temporal():
        raise UserError(f"{file}: {column.name} holds {column.dtype}, not numbers; name another column in the spec")
    numbers = column.cast(pl.Float64, strict=False)
    refuse(numbers.is_null() & column.is_not_null(), file,
           lambda i: f"{column.name} is {column[i]!r}, not a number; mend the row", unit="row")  # fmt: skip
    return numbers


def _seconds(column: pl.Series, file: Location) -> pl.Series:
    """int64 seconds since 1970 (UTC where no zone is given)."""
    refuse(column.is_null(), file, lambda i: f"no {column.name}; fill it in or delete the row", unit="row")
    if isinstance(column.dtype, pl.Datetime | pl.Date):
        seconds = column.dt.epoch("s")
    elif column.dtype == pl.String:
        seconds = column.cast(pl.Int64, strict=False)
        dated = column.filter(seconds.is_null() & column.str.contains(r"^\d{4}-\d{2}-\d{2}"))
        if len(dated):
            seconds = seconds.fill_null(_parsed(column).dt.epoch("s"))
    elif column.dtype.is_integer():
        seconds = column.cast(pl.Int64)
    else:
        raise UserError(f"{file}: {column.name} holds {column.dtype}; a time is whole seconds or a date and time")
    refuse(seconds.is_null(), file,
           lambda i: f"{column.name} is {column[i]!r}; a time is whole seconds or like 2024-05-01 12:00:00",
           unit="row")  # fmt: skip
    return seconds


def _parsed(column: pl.Series) -> pl.Series:
    """Dates and times written as ISO 8601 does, null where they are not."""
    iso = column.set(~column.str.contains(r"^\d{4}-\d{2}-\d{2}").fill_null(False), None)
    try:
        return iso.str.to_datetime(strict=False, time_unit="us", ambiguous="null")
    except pl.exceptions.ComputeError:  # the first of them is in no format that it knows
        return pl.Series(column.name, [None] * len(column), dtype=pl.Datetime("us"))
