"""A person's own tables: CSV and Parquet alike, and every broken spec or row as one sentence."""

import datetime
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from canonical import check_refused, decoded

from distmeta import cli

Mend = Callable[[str], str]

SPEC = """\
name: shop
label: {kind: rating, minimum: 1, maximum: 5}
interactions: {file: ratings.csv, user: uid, item: sku, label: stars, time: at}
users:
  file: people.csv
  key: uid
  fields: [{name: age, type: numeric}, {name: town, column: home_town, type: categorical}]
items:
  file: goods.csv
  key: sku
  fields: [{name: tags, type: multi_categorical, separator: "|"}]
"""
CSV = {
    "ratings.csv": "uid,sku,stars,at\nbob,7,5,30\nann,8,2.5,20\nann,7,1,10\nbob,7,4,40\n",
    "people.csv": 'uid,age,home_town\nann,30,"Ulm, old town"\nbob,,\ncarl,20,Bonn\n',
    "goods.csv": "sku,tags\n007,old\n7,red| blue|red\n8,\n",
}


def _made_table(folder: Path) -> Path:
    folder.mkdir()
    for name, text in CSV.items():
        (folder / name).write_text(text)
    (folder / "shop.yaml").write_text(SPEC)
    return folder / "shop.yaml"


def _prepare_table(spec: Path, out: Path) -> int:
    return cli.main(["prepare", "table", "--spec", str(spec), "--out", str(out)])


def test_csv_and_parquet_give_the_same_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = _made_table(tmp_path / "csv")
    assert _prepare_table(spec, tmp_path / "a") == 0
    assert "dropped  1 earlier interactions of the same user and item" in capsys.readouterr().out
    users, items, rows = decoded(tmp_path / "a")
    assert users.select("raw_id", "age", "town").rows() == [
        ("ann", 30.0, "Ulm, old town"),
        ("bob", None, None),
    ]
    assert items.select("raw_id", "tags").rows() == [("007", ["old"]), ("7", ["blue", "red"]), ("8", [])]
    assert rows.rows() == [("ann", "7", 1.0, 10), ("ann", "8", 2.5, 20), ("bob", "7", 4.0, 40)]

    quoted = _made_table(tmp_path / "quoted")
    for name in CSV:  # as spreadsheets write it: an empty cell is an empty text
        table = pl.read_csv(quoted.parent / name, infer_schema=False).fill_null("")
        table.write_csv(quoted.parent / name, quote_style="always")
    assert _prepare_table(quoted, tmp_path / "c") == 0
    assert all(a.equals(c) for a, c in zip(decoded(tmp_path / "a"), decoded(tmp_path / "c"), strict=True))

    other = tmp_path / "parquet"
    other.mkdir()
    (other / "ratings").mkdir()  # a folder of parts, times as timestamps
    ratings = pl.read_csv(tmp_path / "csv/ratings.csv").with_columns(
        pl.from_epoch("at").dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo")
    )
    ratings[:1].write_parquet(other / "ratings/part-0.parquet")
    ratings[1:].write_parquet(other / "ratings/part-1.parquet")
    pl.read_csv(tmp_path / "csv/people.csv").write_parquet(other / "people.parquet")
    goods = pl.DataFrame({"sku": ["007", "7", "8"], "tags": [["old"], ["red", "blue", "red"], None]})
    goods.write_parquet(other / "goods.parquet")
    text = SPEC.replace("ratings.csv", "ratings").replace(".csv", ".parquet").replace(', separator: "|"', "")
    (tmp_path / "elsewhere.yaml").write_text(text)
    out = str(tmp_path / "b")
    assert cli.main(
        ["prepare", "table", "--spec", str(tmp_path / "elsewhere.yaml"), "--raw", str(other), "--out", out]
    ) == 0  # fmt: skip
    for table in ("users", "items", "interactions", "vocabularies"):
        for file in sorted((tmp_path / "a" / table).iterdir()):
            assert file.read_bytes() == (tmp_path / "b" / table / file.name).read_bytes()


def test_clicks_without_time_or_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.csv").write_text("u,i,y\nb,2,1\na,1,0\nb,1,1\n")
    spec = tmp_path / "s.yaml"
    spec.write_text("name: c\nlabel: {kind: click}\ninteractions: {file: c.csv, user: u, item: i, label: y}\n")
    assert _prepare_table(spec, tmp_path / "d") == 0
    assert "no time column" in capsys.readouterr().out
    assert decoded(tmp_path / "d")[2].rows() == [("a", "1", 0.0, 1), ("b", "2", 1.0, 0), ("b", "1", 1.0, 2)]
    (tmp_path / "c.csv").write_text("u,i,y\nb,2,1\na,1,0.5\n")
    check_refused(_prepare_table(spec, tmp_path / "e"), capsys, tmp_path / "e", "row 2: y is 0.5, not within 0 or 1")


def test_times_as_text(tmp_path: Path) -> None:
    spec = _made_table(tmp_path / "raw")
    (tmp_path / "raw/ratings.csv").write_text("uid,sku,stars,at\nann,7,1,2024-05-01 12:00:00\nann,8,1,1714564801\n")
    assert _prepare_table(spec, tmp_path / "d") == 0
    noon = int(datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC).timestamp())
    assert decoded(tmp_path / "d")[2]["time"].to_list() == [noon, noon + 1]


def _swap(old: str, new: str) -> Mend:
    return lambda text: text.replace(old, new, 1)


BROKEN_TABLE: dict[str, tuple[str, Mend, str]] = {
    "spec key": ("shop.yaml", _swap("interactions:", "interaction:"), "(did you mean interactions?)"),
    "nested key": ("shop.yaml", _swap("sku, label", "sku, lable"), "interactions: unknown key 'lable'"),
    "field key": ("shop.yaml", _swap("column:", "colum:"), "users: field 2: unknown key 'colum'"),
    "type": ("shop.yaml", _swap("type: numeric", "type: number"), "type is 'number' (did you mean numeric?)"),
    "no type": ("shop.yaml", _swap(", type: numeric", ""), "users: field 1: type is missing"),
    "kind": ("shop.yaml", _swap("kind: rating", "kind: stars"), "kind is 'stars'"),
    "no range": ("shop.yaml", _swap(", maximum: 5", ""), "shop.yaml: label: maximum is missing"),
    "range": ("shop.yaml", _swap("minimum: 1", "minimum: 9"), "minimum must be below maximum"),
    "no name": ("shop.yaml", _swap("name: shop", ""), "shop.yaml: name is missing"),
    "name taken": ("shop.yaml", _swap("name: town", "name: age"), "field 2: the name age is taken"),
    "name's form": ("shop.yaml", _swap("name: town", "name: ../town"), "field '../town'"),
    "yaml": ("shop.yaml", _swap("label: {", "label: {{"), "shop.yaml, line 3: not readable as YAML"),
    "code": ("shop.yaml", _swap("shop", "!!python/object/apply:print [x]"), "line 1: not readable as YAML"),
    "list": ("shop.yaml", lambda t: "- a\n", "must hold name, label and interactions"),
    "separator": ("shop.yaml", _swap(', separator: "|"', ""), "goods.csv: tags is no list column"),
    "no file": ("shop.yaml", _swap("people.csv", "people.parquet"), "people.parquet does not exist"),
    "column": ("shop.yaml", _swap("label: stars", "label: star"), "no column 'star' (did you mean stars?)"),
    "not parquet": ("shop.yaml", _swap("goods.csv", "shop.yaml"), "shop.yaml: not readable as Parquet"),
    "empty": ("ratings.csv", lambda t: "", "ratings.csv: the file is empty"),
    "no rows": ("ratings.csv", lambda t: t[:17], "ratings.csv: the file is empty (no rows)"),
    "ragged": ("ratings.csv", _swap("10\n", "10,11,12\n"), "ratings.csv: not readable as CSV"),
    "label": ("ratings.csv", _swap("2.5", "5.5"), "ratings.csv, row 2: stars is 5.5, not within 1 to 5"),
    "label nan": ("ratings.csv", _swap("2.5", "nan"), "ratings.csv, row 2: stars is nan, not within 1 to 5"),
    "label text": ("ratings.csv", _swap("2.5", "good"), "ratings.csv, row 2: stars is 'good', not a number"),
    "no label": ("ratings.csv", _swap("2.5", ""), "ratings.csv, row 2: no stars"),
    "no user": ("ratings.csv", _swap("ann,8", ",8"), "ratings.csv, row 2: no uid"),
    "user": ("ratings.csv", _swap("ann,8", "zoe,8"), "ratings.csv, row 2: user zoe is not in"),
    "item": ("ratings.csv", _swap("bob,7", "bob,6"), "ratings.csv, row 1: item 6 is not in"),
    "time": ("ratings.csv", _swap("20\n", "noon\n"), "row 2: at is 'noon'; a time is whole seconds"),
    "date": ("ratings.csv", _swap("20\n", "2024-13-45\n"), "ratings.csv, row 2: at is '2024-13-45'"),
    "number": ("people.csv", _swap("30", "old"), "people.csv, row 1: age is 'old', not a number"),
    "infinite": ("people.csv", _swap("30", "inf"), "people.csv, row 1: age is infinite"),
    "too large": ("people.csv", _swap("30", "1e39"), "people.csv, row 1: age is 1e+39, beyond"),
    "key twice": ("shop.yaml", lambda t: t + "name: x\n", "shop.yaml, line 12: not readable as YAML (the key name"),
    "reserved": ("shop.yaml", _swap("name: town", "name: label"), "users: field 2: field 'label'"),
    "side's own": ("shop.yaml", _swap("name: town", "name: user"), "users: field 2: field 'user'"),
    "two roles": ("shop.yaml", _swap("item: sku", "item: uid"), "user and item are both the column 'uid'"),
    "two columns": ("ratings.csv", _swap("sku", "uid"), "ratings.csv: two columns are called 'uid'"),
    "short": ("ratings.csv", _swap(",20\n", "\n"), "ratings.csv, row 2: no at; fill it in"),
    "twice": ("people.csv", _swap("carl", "ann"), "people.csv, row 3: uid ann is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_TABLE)
def test_a_broken_table_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, mend, sentence = BROKEN_TABLE[case]
    spec = _made_table(tmp_path / "raw")
    file = tmp_path / "raw" / name
    changed = mend(file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    check_refused(_prepare_table(spec, tmp_path / "d"), capsys, tmp_path / "d", sentence)
