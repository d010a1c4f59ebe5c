"""Separated text files, read strictly: whatever is wrong is named by file and line."""

from collections.abc import Callable, Iterator, Sequence

import polars as pl

from distmeta import remote
from distmeta.errors import UserError
from distmeta.storage import Location


def read_lines(file: Location, *, get: str, encoding: str = "latin-1") -> pl.Series:
    """The file's lines as strings without their ends, row i being line i + 1.

    Args:
        get: where the file comes from, for the sentence that says it is missing or damaged.

    Raises:
        UserError: missing, empty, not in `encoding`, or cut short.
    """
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {get}") from None
    except OSError as e:
        remote.let_pass(e)
        raise UserError(f"{file}: cannot be read ({e}); check that it is a file that you may read") from None
    if not raw:
        raise UserError(f"{file}: the file is empty; {get}")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise UserError(f"{file}, line {line}: not {encoding} text; {get}") from None
    *lines, rest = text.split("\n")
    if rest:
        raise _cut_short(file, len(lines) + 1, get)
    return pl.Series("line", lines, dtype=pl.String).str.strip_suffix("\r")


def read_blocks(file: Location, size: int, *, get: str) -> Iterator[tuple[int, pl.Series]]:
    """A latin-1 file larger than memory: (number of the first line, lines as `read_lines` gives them) of about `size`
    bytes at a time.

    Raises:
        UserError: as `read_lines`.
    """
    try:
        with file.fs.open_input_stream(file.path) as stream:
            line, rest = 1, b""
            while data := stream.read(size):
                *whole, rest = (rest + data).rsplit(b"\n", 1)
                if whole:
                    lines = pl.Series("line", whole[0].decode("latin-1").split("\n")).str.strip_suffix("\r")
                    yield line, lines
                    line += len(lines)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {get}") from None
    except OSError as e:
        remote.let_pass(e)
        raise UserError(f"{file}: cannot be read ({e}); check that it is a file that you may read") from None
    if line == 1 and not rest:
        raise UserError(f"{file}: the file is empty; {get}")
    if rest:
        raise _cut_short(file, line, get)


def _cut_short(file: Location, line: int, get: str) -> UserError:
    return UserError(
        f"{file}, line {line}: the last line has no end, so the file was cut short; {get}, or end the line if it is"
        " whole"
    )


def read_columns(
    file: Location, separator: str, names: Sequence[str], *, get: str, encoding: str = "latin-1"
) -> pl.DataFrame:
    """The file's columns as strings, row i being line i + 1.

    Args:
        separator: one or more characters, never inside a value.
        get: as `read_lines` takes it.

    Raises:
        UserError: as `read_lines`, or a line with another number of columns.
    """
    return cut_columns(read_lines(file, get=get, encoding=encoding), separator, names, file, get=get)


def cut_columns(
    lines: pl.Series, separator: str, names: Sequence[str], file: Location, *, get: str, first: int = 1
) -> pl.DataFrame:
    """Lines of a file, the first of them its line `first`, cut into columns of strings.

    Raises:
        UserError: a line with another number of columns.
    """
    columns = lines.str.count_matches(separator, literal=True) + 1
    refuse(columns != len(names), file, lambda i: f"{columns[i]} columns separated by {separator!r} where "
           f"{len(names)} are needed ({' '.join(names)}); {get}",
           at=pl.int_range(first, first + len(lines), eager=True))  # fmt: skip
    parts = lines.str.split_exact(separator, len(names) - 1).struct.unnest()
    return parts.rename(dict(zip(parts.columns, names, strict=True)))


def refuse(
    bad: pl.Series, file: Location, what: Callable[[int], str], *, unit: str = "line", at: pl.Series | None = None
) -> None:
    """UserError for the first true row of `bad`: file, line (or row) from 1, and what(row index) is wrong.

    Args:
        at: the line of each row, where it is not the row's place.
    """
    first = bad.fill_null(True).arg_max() if len(bad) else None
    if first is not None and bad.fill_null(True)[first]:
        raise UserError(f"{file}, {unit} {first + 1 if at is None else at[first]}: {what(first)}")


def integers(
    table: pl.DataFrame, column: str, file: Location, low: int, high: int, *, at: pl.Series | None = None
) -> pl.Series:
    """A column of whole numbers within [low, high] as int64; UserError naming file and line otherwise."""
    numbers = table[column].cast(pl.Int64, strict=False)
    refuse(
        numbers.is_null(),
        file,
        lambda i: f"{column} is {table[column][i]!r}, not a whole number; mend the line",
        at=at,
    )
    refuse(
        ~numbers.is_between(low, high),
        file,
        lambda i: f"{column} is {numbers[i]}, outside {low} to {high}; mend or delete the line",
        at=at,
    )
    return numbers


def once(table: pl.DataFrame, column: str, file: Location, *, at: pl.Series | None = None) -> None:
    """UserError where an id stands on two lines."""
    repeated = ~table[column].is_first_distinct()
    refuse(repeated, file, lambda i: f"{column} {table[column][i]} is there twice; delete one of the lines", at=at)


def known(
    ids: pl.Series, table: pl.Series, file: Location, of: Location, *, unit: str = "line", at: pl.Series | None = None
) -> None:
    """UserError naming the first of `ids` (rows of `file`) that is not in `table` (read from `of`)."""
    refuse(
        ~ids.is_in(table.implode()),
        file,
        lambda i: f"{ids.name} {ids[i]} is not in {of}; add it there or delete the {unit}",
        unit=unit,
        at=at,
    )


def last_of_pairs(interactions: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Each (user, item)'s last row by time (of equal times the later row), in file order; how many went.

    Where rows have a scenario: each (user, item, scenario)'s.
    """
    numbered = interactions.with_row_index("_row")
    keys = [name for name in ("user", "item", "scenario") if name in interactions.columns]
    kept = numbered.sort("time", "_row").unique(keys, keep="last").sort("_row").drop("_row")
    return kept, interactions.height - kept.height
