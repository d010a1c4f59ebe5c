"""Reading Parquet tables of datasets and task tables, with a sentence for whatever is wrong with them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from distmeta import remote
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.storage import Location

AGAIN = "the dataset is damaged, prepare it again"
PARQUET: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""How parts are written. A flipped bit decompresses to other numbers without a word; a page's checksum does not."""


def read_part(
    file: Location, columns: Sequence[str], rows: int, mend: str, groups: Sequence[int] | None = None
) -> pa.Table:
    """`columns` of a Parquet part that has `rows` rows by its manifest; a page must be what its checksum says.

    Args:
        groups: the row groups to read, in that order; None: all.

    Raises:
        UserError: the part is missing, not Parquet, lacks a column or has other rows; `mend` ends it.
    """
    with _opened(file, columns, rows, mend) as part:
        if groups is not None:
            return part.read_row_groups(list(groups), list(columns))
        table = part.read(list(columns))
    _check_rows(file, table.num_rows, rows, mend)
    return table


def read_groups(file: Location, column: str, rows: int, mend: str) -> list[tuple[int, int]]:
    """(rows, values of the list column `column`) of each row group of a part, from its footer alone.

    Parquet counts an empty list as one value.

    Raises:
        UserError: as `read_part`.
    """
    with _opened(file, [column], rows, mend) as part:
        groups = [part.metadata.row_group(g) for g in range(part.num_row_groups)]
    leaves = [groups[0].column(c).path_in_schema.split(".")[0] for c in range(groups[0].num_columns)] if groups else []
    found = [(g.num_rows, g.column(leaves.index(column)).num_values) for g in groups]
    _check_rows(file, sum(n for n, _ in found), rows, mend)
    return found


@contextlib.contextmanager
def _opened(file: Location, columns: Sequence[str], rows: int, mend: str) -> Iterator[pq.ParquetFile]:
    """A part whose footer has the columns and the rows; what is wrong with it while it is read is a sentence too."""
    try:
        far = not file.is_local  # columns beside each other come in one request
        with pq.ParquetFile(file.path, filesystem=file.fs, page_checksum_verification=True, pre_buffer=far) as part:
            missing = [c for c in columns if c not in part.schema_arrow.names]
            if missing:
                raise UserError(f"{file}: column {missing[0]} is missing; {mend}")
            _check_rows(file, part.metadata.num_rows, rows, mend)
            yield part
    except FileNotFoundError:
        raise UserError(f"{file}: this part is missing; {mend}") from None
    except (pa.ArrowException, OSError) as e:
        remote.let_pass(e)
        raise UserError(f"{file}: not readable as Parquet ({str(e).splitlines()[0]}); {mend}") from None


def _check_rows(file: Location, found: int, rows: int, mend: str) -> None:
    if found != rows:
        raise UserError(f"{file}: {found:,} rows where its manifest counts {rows:,}; {mend}")


def read_side(dataset: Location, manifest: Dataset, side: str, columns: Sequence[str]) -> pa.Table:
    """`columns` of users/ or items/ (`side`), row i being user or item i.

    Raises:
        UserError: a part is missing, damaged, or not as the manifest says.
    """
    key = side[:-1]
    wanted = list(dict.fromkeys([key, *columns]))
    parts = manifest.files.get(side, [])
    tables = [read_part(dataset / f["path"], wanted, f["rows"], AGAIN) for f in parts]
    expected = manifest.users if side == "users" else manifest.items
    if not tables or not np.array_equal(np.concatenate([t[key].to_numpy() for t in tables]), np.arange(expected)):
        raise UserError(f"{dataset / side}: the column {key} is not 0 to {expected - 1:,} in order; {AGAIN}")
    return pa.concat_tables(tables).select(list(columns))


def to_polars(table: pa.Table) -> pl.DataFrame:
    """The same table as polars sees it."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
