"""The events of Taobao's files, read strictly and in pieces: whatever is wrong is named by line or row."""

from dataclasses import dataclass

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from distmeta import draws, remote
from distmeta.data.sources.lines import cut_columns, integers, read_blocks, refuse
from distmeta.errors import UserError
from distmeta.storage import Location

STRENGTH = ("pv", "fav", "cart", "buy")
"""Behaviours, from the weakest to the strongest sign of liking."""

DAYS = (1_511_539_200, 1_512_316_800)
"""The official file is of 25 November to 3 December 2017, Beijing time; other times in it are wrong."""

CSV, PARQUET = "UserBehavior.csv", "interactions.parquet"
_GET = (
    "get UserBehavior.csv from https://tianchi.aliyun.com/dataset/649 and give its folder as --raw; or a folder with "
    "interactions.parquet: columns user, item, behavior and maybe category and timestamp"
)
_COLUMNS = ("user", "item", "category", "behaviour", "time")
_ID = (0, 2**31 - 1)
_TIME = (0, 2**40)
BLOCK_BYTES = 1 << 26
"""Of the file that is text at a time."""


@dataclass(frozen=True)
class Events:
    """What a file holds."""

    file: Location
    table: pl.DataFrame
    """user, item (int32), maybe category (int32), behaviour (Enum of STRENGTH), time (int64; 0 without times)."""
    read: int
    """Events in the file."""
    dropped: dict[str, int]
    timed: bool
    official: bool
    """It is UserBehavior.csv."""


def read(raw: Location, share: float) -> Events:
    """The events of DIR/UserBehavior.csv or DIR/interactions.parquet, of a share of its users.

    Raises:
        UserError: none of the two is there, or both; a damaged one; nothing is left.
    """
    csv, parquet = raw / CSV, raw / PARQUET
    if csv.exists() and parquet.exists():
        raise UserError(f"{raw}: holds {CSV} and {PARQUET}; leave one of them there")
    events = _official(csv, share) if not parquet.exists() else _parquet(parquet, share)
    if not events.table.height:
        why = ", ".join(f"{n:,} {what}" for what, n in events.dropped.items() if n)
        raise UserError(f"{events.file}: no event is left ({why or 'there is none'}); give a larger file or --share")
    return events


def _kept(table: pl.DataFrame, share: float) -> pl.Series:
    """Rows of the users who are kept: mask."""
    return pl.Series(draws.uniform(table["user"].to_numpy(), purpose="taobao/share") < share)


def _official(file: Location, share: float) -> Events:
    parts, n, outside = [], 0, 0
    for first, lines in read_blocks(file, BLOCK_BYTES, get=_GET):
        text = cut_columns(lines, ",", _COLUMNS, file, get=_GET, first=first)
        at = pl.int_range(first, first + len(lines), eager=True)
        _check_behaviour(text["behaviour"], file, "line", at)
        ids = [integers(text, name, file, *_ID, at=at).cast(pl.Int32) for name in _COLUMNS[:3]]
        part = pl.DataFrame(
            [*ids, text["behaviour"].cast(pl.Enum(STRENGTH)), integers(text, "time", file, -_TIME[1], _TIME[1], at=at)]
        )
        n += part.height
        part = part.filter(_kept(part, share))
        within = part["time"].is_between(*DAYS, closed="left")
        outside += int((~within).sum())
        parts.append(part.filter(within))
    dropped = {"outside_25_November_to_3_December_2017": outside}
    return Events(file, pl.concat(parts), n, dropped, timed=True, official=True)


def _check_behaviour(column: pl.Series, file: Location, unit: str, at: pl.Series | None = None) -> None:
    refuse(
        ~column.is_in(STRENGTH), file,
        lambda i: f"the behaviour is {column[i]!r}, none of {' '.join(STRENGTH)}; mend or delete the {unit}",
        unit=unit, at=at,
    )  # fmt: skip


def _check_whole(column: pl.Series, file: Location, low: int, high: int) -> None:
    if not column.dtype.is_integer():
        raise UserError(f"{file}: {column.name} holds {column.dtype}, not whole numbers; write them as such")
    refuse(
        ~column.is_between(low, high), file,
        lambda i: f"{column.name} is {column[i]}, not within {low} to {high}; mend or delete the row", unit="row",
    )  # fmt: skip


def _parquet(file: Location, share: float) -> Events:
    table = pl.DataFrame(_read_parquet(file))
    for name in ("user", "item", "category", "timestamp"):
        if name in table.columns:
            _check_whole(table[name], file, *(_TIME if name == "timestamp" else _ID))
    behaviour = table["behavior"].cast(pl.String)
    _check_behaviour(behaviour, file, "row")
    timed = "timestamp" in table.columns
    part = table.select(
        pl.col(*(c for c in ("user", "item", "category") if c in table.columns)).cast(pl.Int32),
        behaviour.cast(pl.Enum(STRENGTH)).alias("behaviour"),
        (pl.col("timestamp").cast(pl.Int64) if timed else pl.lit(0, pl.Int64)).alias("time"),
    )
    return Events(file, part.filter(_kept(part, share)), table.height, {}, timed, official=False)


def _read_parquet(file: Location) -> pl.DataFrame:
    try:
        with pq.ParquetFile(file.path, filesystem=file.fs) as opened:
            there = opened.schema_arrow.names
            lacking = [c for c in ("user", "item", "behavior") if c not in there]
            if lacking:
                raise UserError(f"{file}: no column {lacking[0]!r}; columns: {' '.join(there)}; {_GET}")
            wanted = [c for c in ("user", "item", "behavior", "category", "timestamp") if c in there]
            return pl.DataFrame(pl.from_arrow(opened.read(wanted)))
    except (pa.ArrowException, OSError) as e:
        remote.let_pass(e)
        raise UserError(f"{file}: not readable as Parquet ({str(e).splitlines()[0]}); {_GET}") from None
