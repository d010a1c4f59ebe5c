"""Comma-separated files with a header and quotes, read strictly: whatever is wrong is named by file and line."""

from collections.abc import Sequence

import polars as pl

from distmeta.data.sources.lines import integers, refuse
from distmeta.errors import UserError
from distmeta.storage import Location


def read_csv(file: Location, columns: Sequence[str], *, get: str, maybe: Sequence[str] = ()) -> pl.DataFrame:
    """The named columns as strings, row i being line i + 2; those of `maybe` where the file has them.

    Values have no line ends within. What a line has not is empty; one with more than the header is refused.

    Args:
        get: where the file comes from, for the sentence that says it is missing or damaged.

    Raises:
        UserError: missing, empty, cut short, not UTF-8, without one of the columns, or a line that is no CSV.
    """
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {get}") from None
    if not raw.strip():
        raise UserError(f"{file}: the file is empty; {get}")
    if not raw.endswith(b"\n"):
        line = raw.count(b"\n") + 1
        raise UserError(
            f"{file}, line {line}: the last line has no end, so the file was cut short; {get}, or end the line if it is"
            " whole"
        )
    header = raw.partition(b"\n")[0].decode("utf-8", "replace").strip().split(",")
    lacking = [c for c in columns if c not in header]
    if lacking:
        raise UserError(f"{file}, line 1: no column {lacking[0]!r} in the header ({','.join(header)}); {get}")
    try:
        table = pl.read_csv(raw, infer_schema=False)
    except pl.exceptions.PolarsError as e:
        raise UserError(f"{file}: not readable as CSV ({str(e).splitlines()[0]}); {get}") from None
    return table.select([*columns, *(c for c in maybe if c in header)]).fill_null("")


def lines(table: pl.DataFrame) -> pl.Series:
    """The line of each row of a table that `read_csv` gave."""
    return pl.int_range(2, table.height + 2, eager=True)


def ids(table: pl.DataFrame, column: str, file: Location) -> None:
    """UserError naming the line of an id that is not a whole number."""
    integers(table, column, file, 0, 2**63 - 1, at=lines(table))


def numbers(table: pl.DataFrame, column: str, file: Location, low: float, high: float) -> pl.Series:
    """A column of numbers within [low, high] as float32; UserError naming file and line otherwise."""
    found = table[column].cast(pl.Float32, strict=False)
    refuse(
        ~found.is_between(low, high).fill_null(False), file,
        lambda i: f"{column} is {table[column][i]!r}, not a number from {low:g} to {high:g}; mend the line",
        at=lines(table),
    )  # fmt: skip
    return found
