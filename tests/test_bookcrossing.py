"""Book-Crossing: what a MySQL dump may hold, what is believed of it, and every damage as one sentence or a count."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from canonical import check_refused, decoded

from distmeta import cli
from distmeta.data.schema import Dataset, Label

Mend = Callable[[str], str]

USERS = """\
"User-ID";"Location";"Age"
"1";"nyc, new york, usa";NULL
"2";"münchen, bayern, germany";"34"
"3";"nobody";"1";"1"
"9";"cernusco s
, milan, italy";"5"
"10";"o`fallon, st. clair, illinois, usa.";"244"
"12";"n/a, , ";"110"
"13";"gijã?Â³n, asturias, philippines\\"";"4"
"""
BOOKS = """\
"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S";"Image-URL-M";"Image-URL-L"
"034545104X";"Flesh; and Bone";"M. J. Rose";"2002";"Simon &amp; Schuster";"http://a";"http://b";"http://c"
"0001";"My \\"Star Trek\\"";"Gabriel Garc\u00eda M\u00e1rquez";"0";"A \\\\ B";"";"";""
"0002";"Level 4)\\"";"O&#39;Brien  &amp; \\"Co\\"";"2050";"n/a";"";"";""
"0003";"The "quoted" one";"";"1500";"Éd;tions";"";"";""
"0004";"Too";"many";"values";"here";"";"";"";""
"0005";"Not whole
"0006";"Never rated";"Ann";"1999";"P";"";"";""
"""
RATINGS = """\
"User-ID";"ISBN";"Book-Rating"
"10";"0003";"7"
"2";"034545104X";"0"
"10";"034545104X";"10"
"2";"0002";"5"
"2";"0001";"1"
"9";"0 330 *";"8"
"10";"0003";"6"
"12";"0005";"0"
"13";"0001";"9"
"""


def _made(raw: Path) -> Path:
    raw.mkdir()
    for name, text in (("Users", USERS), ("Books", BOOKS), ("Book-Ratings", RATINGS)):
        (raw / f"BX-{name}.csv").write_bytes(text.encode("latin-1"))
    return raw


def _prepare(raw: Path, out: Path, *more: str) -> int:
    return cli.main(["prepare", "bookcrossing", "--raw", str(raw), "--out", str(out), *more])


def test_what_a_dump_holds_is_read_as_it_was_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = _made(tmp_path / "raw")
    assert _prepare(raw, tmp_path / "d") == 0
    said = capsys.readouterr().out
    users, items, rows = decoded(tmp_path / "d")
    assert users.select("raw_id", "age", "country", "region", "city").rows() == [  # by number; 1 and 12 rate nothing
        ("2", 34.0, "germany", "bayern", "münchen"),
        ("9", 5.0, "italy", "milan", "cernusco s"),
        ("10", None, "usa", "illinois", "o`fallon, st. clair"),
        ("13", None, "philippines", "asturias", None),
    ]
    assert sorted(items.select("raw_id", "author", "year", "publisher").rows()) == [
        ("0 330 *", None, None, None),  # rated, but in no list of books
        ("0001", "Gabriel García Márquez", None, "A \\ B"),
        ("0002", 'O\'Brien & "Co"', None, None),
        ("0003", None, "1500", "Éd;tions"),
        ("0006", "Ann", "1999", "P"),
        ("034545104X", "M. J. Rose", "2002", "Simon & Schuster"),
    ]
    assert rows.rows() == [  # in the file's order, of the two ratings of one book the later
        ("2", "0002", 5.0, 1), ("2", "0001", 1.0, 2), ("9", "0 330 *", 8.0, 3),
        ("10", "034545104X", 10.0, 0), ("10", "0003", 6.0, 4), ("13", "0001", 9.0, 5),
    ]  # fmt: skip
    dataset = Dataset.open(str(tmp_path / "d"))
    assert (dataset.name, dataset.label) == ("Book-Crossing (subset of 7 ratings)", Label("rating", 1.0, 10.0))
    assert dataset.extra["read"] == {"ratings": 9, "users": 6, "books": 5}
    assert dataset.extra["dropped"] == {
        "broken_lines_of_users": 1,
        "broken_lines_of_books": 2,
        "ratings_of_0_(seen,_not_rated)": 2,
        "earlier_ratings_of_the_same_user_and_book": 1,
        "users_without_interactions": 2,
    }
    for line in (
        "BX-Users.csv, line 4: not 3 values in quotes with ; between them: left out",
        "BX-Books.csv, line 6: not 8 values in quotes with ; between them: left out as 1 more of 8 lines are",
        "1 ages are missing and 2 outside 5 to 110: unknown values",
        "0 years of books are missing and 2 outside 1500 to 2010: unknown values",
        "1 users' city is no name of a place",
        "1 rated books (1 ratings, 0 330 * for one) are not in BX-Books.csv: kept, all fields unknown",
        "taken as in order of time in the file",
        "read     9 ratings, 6 users, 5 books",
    ):
        assert line in said


def test_zeros_are_labels_where_one_asks_for_them(tmp_path: Path) -> None:
    raw = _made(tmp_path / "raw")
    assert _prepare(raw, tmp_path / "d", "--zeros") == 0
    dataset, (users, _, rows) = Dataset.open(str(tmp_path / "d")), decoded(tmp_path / "d")
    assert dataset.label == Label("rating", 0.0, 10.0)
    assert dataset.name == "Book-Crossing (subset of 9 ratings)"
    assert users.filter(pl.col("raw_id") == "12").select("age", "country", "region", "city").row(0) == (
        110.0, None, None, None,
    )  # fmt: skip
    assert rows.filter(pl.col("label") == 0).select("user", "item", "time").rows() == [
        ("2", "034545104X", 0), ("12", "0005", 6),
    ]  # fmt: skip


def test_complete_keeps_known_users_ratings_of_known_books(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = _made(tmp_path / "raw")
    file = raw / "BX-Book-Ratings.csv"
    assert _prepare(raw, tmp_path / "d", "--complete", "--zeros") == 0
    _, items, rows = decoded(tmp_path / "d")
    assert rows.rows() == [("2", "034545104X", 0.0, 0)]
    assert "0 330 *" not in items["raw_id"]
    dropped = Dataset.open(str(tmp_path / "d")).extra["dropped"]
    assert dropped["ratings_of_users_without_age_or_country"] == 4
    assert dropped["ratings_of_books_without_author,_year_or_publisher"] == 3
    capsys.readouterr()
    file.write_text(RATINGS.replace('"034545104X";"0"', '"0001";"3"'))
    status = _prepare(raw, tmp_path / "e", "--complete")
    check_refused(status, capsys, tmp_path / "e", "--complete leaves no rating")


def test_line_ends_of_windows_change_nothing(tmp_path: Path) -> None:
    _prepare(_made(tmp_path / "raw"), tmp_path / "a")
    other = _made(tmp_path / "other")
    for file in other.iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert _prepare(other, tmp_path / "b") == 0
    for a, b in zip(decoded(tmp_path / "a"), decoded(tmp_path / "b"), strict=True):
        assert a.equals(b)


def test_the_name_is_plain_for_the_official_number_of_ratings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmeta.data.sources.bookcrossing.OFFICIAL", {"with zeros": 8, "explicit": 7})
    raw = _made(tmp_path / "raw")
    assert _prepare(raw, tmp_path / "a") == _prepare(raw, tmp_path / "b", "--zeros") == 0
    names = [Dataset.open(str(tmp_path / d)).name for d in "ab"]
    assert names == ["Book-Crossing", "Book-Crossing (subset of 9 ratings)"]


def _swap(old: str, new: str) -> Mend:
    return lambda text: text.replace(old, new, 1)


BROKEN: dict[str, tuple[str, Mend | None, str]] = {
    "missing": ("Books", None, "BX-Books.csv: no such file; get BX-CSV-Dump.zip"),
    "empty": ("Users", lambda t: "", "BX-Users.csv: the file is empty"),
    "header alone": ("Users", lambda t: t[: t.index("\n") + 1], "BX-Users.csv: the file is empty (no records)"),
    "another layout": ("Books", lambda t: t.replace('";"', ","), 'BX-Books.csv, line 1: must be "ISBN";"Book-Title"'),
    "cut short": ("Book-Ratings", lambda t: t[:-3], "BX-Book-Ratings.csv, line 10: the last line has no end"),
    "many broken": ("Users", lambda t: t + '"14";"nyc"\n' * 6, "BX-Users.csv, line 4: not 3 values in quotes"),
    "all broken": ("Users", lambda t: t[: t.index("\n") + 1] + '"1"\n', "BX-Users.csv, line 2: not 3 values"),
    "rating": ("Book-Ratings", _swap('"7"', '"11"'), "BX-Book-Ratings.csv, line 2: Book-Rating is 11, outside 0"),
    "no number": ("Book-Ratings", _swap('"1"\n', '"good"\n'), "line 6: Book-Rating is 'good', not a whole number"),
    "no ISBN": ("Book-Ratings", _swap('"0002"', '""'), "BX-Book-Ratings.csv, line 5: no ISBN"),
    "no such user": ("Book-Ratings", _swap('"9";', '"8";'), "line 7: user 8 is not in"),
    "user twice": ("Users", _swap('"12"', '"10"'), "BX-Users.csv, line 8: User-ID 10 is there twice"),
    "user": ("Users", _swap('"13"', '"x"'), "BX-Users.csv, line 9: User-ID is 'x', not a whole number"),
    "age": ("Users", _swap('"110"', '"old"'), "BX-Users.csv, line 8: Age is 'old', not a whole number"),
    "book twice": ("Books", _swap('"0006"', '"0003"'), "BX-Books.csv, line 8: ISBN 0003 is there twice"),
    "no book": ("Books", _swap('"0006"', '""'), "BX-Books.csv, line 8: no ISBN"),
    "all zeros": (
        "Book-Ratings",
        lambda t: '"User-ID";"ISBN";"Book-Rating"\n"2";"0001";"0"\n',
        "BX-Book-Ratings.csv: every rating is 0, which means seen, not rated; add --zeros",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_dump_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, mend, sentence = BROKEN[case]
    raw = _made(tmp_path / "raw")
    file = raw / f"BX-{name}.csv"
    if mend is None:
        file.unlink()
    else:
        changed = mend(file.read_bytes().decode("latin-1"))
        assert changed.encode("latin-1") != file.read_bytes()
        file.write_bytes(changed.encode("latin-1"))
    check_refused(_prepare(raw, tmp_path / "d"), capsys, tmp_path / "d", sentence)


def test_the_real_layout_is_read_whole_and_called_a_subset(raw: Path, tmp_path: Path) -> None:
    assert _prepare(raw / "BX", tmp_path / "d") == 0
    dataset = Dataset.open(str(tmp_path / "d"))
    assert dataset.name == "Book-Crossing (171k subset)"
    assert (dataset.users, dataset.items, dataset.interactions) == (17_217, 26_267, 171_274)
    assert not any(dataset.extra["dropped"].values())
    assert dataset.extra["content_fields"] == {"user": ["age", "country"], "item": ["author", "year", "publisher"]}
    users, items, rows = decoded(tmp_path / "d")
    assert users["raw_id"].cast(pl.Int64).is_sorted()
    assert users["age"].null_count() == 6_447
    assert items["year"].null_count() == 453
    lines = (raw / "BX/BX-Book-Ratings.csv").read_text(encoding="latin-1").splitlines()[1:]
    expected = sorted((int(u), n, i, float(s)) for n, (u, i, s) in enumerate(x[1:-1].split('";"') for x in lines))
    assert rows.select(pl.col("user").cast(pl.Int64), "time", "item", pl.col("label")).rows() == expected
