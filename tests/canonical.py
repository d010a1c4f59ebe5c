"""Reading a canonical dataset back to raw ids and values, and the one sentence a refusal consists of."""

from pathlib import Path

import polars as pl
import pytest

from distmeta.data.schema import Dataset
from distmeta.storage import Location


def decoded(where: Location | Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """users, items and interactions of a dataset, with raw ids and raw values again."""
    dataset = Dataset.open(str(where))
    sides = []
    for side, fields in (("user", dataset.user_fields), ("item", dataset.item_fields)):
        table = pl.read_parquet(f"{where}/{side}s/*.parquet")
        assert table[side].to_list() == list(range(table.height))
        for f in fields:
            if f.type == "numeric":
                continue
            values = pl.read_parquet(f"{where}/vocabularies/{side}-{f.name}.parquet")["value"]
            assert len(values) == f.size
            assert values.null_count() == 1
            assert values[0] is None
            if f.type == "categorical":
                table = table.with_columns(values.gather(table[f.name]).alias(f.name))
            else:
                named = [[values[i] for i in row] for row in table[f.name].to_list()]
                table = table.with_columns(pl.Series(f.name, named, dtype=pl.List(pl.String)))
        sides.append(table)
    users, items = sides
    rows = pl.read_parquet(f"{where}/interactions/*.parquet")
    rows = rows.with_columns(
        users["raw_id"].gather(rows["user"]).alias("user"), items["raw_id"].gather(rows["item"]).alias("item")
    )
    return users, items, rows


def check_refused(status: int, capsys: pytest.CaptureFixture[str], out: Path, sentence: str) -> None:
    """The command said one sentence on stderr, with `sentence` in it, ended with 2 and made no dataset."""
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert sentence in said.err
    assert not (out / "dataset.json").exists()
