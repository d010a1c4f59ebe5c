"""Taobao's behaviour as clicks: labels against plain Python, sampled negatives by what they promise, damage by line."""

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from canonical import check_refused, decoded

from distmeta import cli
from distmeta.data.schema import Dataset, Label
from distmeta.data.sources import taobao_files
from distmeta.draws import hashed

START = taobao_files.DAYS[0]
EVENTS = [
    (1, 10, 7, "pv", START),
    (1, 10, 7, "buy", START + 50),
    (1, 10, 7, "cart", START + 20),
    (1, 11, 7, "pv", START + 40),
    (1, 11, 7, "pv", START + 30),
    (2, 10, 8, "fav", START + 5),
    (2, 12, 9, "pv", START + 9 * 86400 - 1),
    (2, 13, 9, "pv", START + 9 * 86400),  # a second too late
    (3, 13, 9, "buy", -3),  # as some of the official file's times are
    (4, 14, 9, "cart", START + 1),
]


def _csv(raw: Path, events: list[tuple] = EVENTS, end: str = "\n") -> Path:
    raw.mkdir(exist_ok=True)
    (raw / "UserBehavior.csv").write_bytes("".join(",".join(map(str, e)) + end for e in events).encode())
    return raw


def _parquet(raw: Path, **columns: object) -> Path:
    raw.mkdir(exist_ok=True)
    pl.DataFrame(columns).write_parquet(raw / "interactions.parquet")
    return raw


def _prepare(raw: Path, out: Path, *flags: str) -> int:
    return cli.main(["prepare", "taobao-userbehavior", "--raw", str(raw), "--out", str(out), *flags])


def test_a_row_is_a_user_and_an_item_with_the_strongest_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(_csv(tmp_path / "raw"), tmp_path / "d") == 0
    said = capsys.readouterr().out
    users, items, rows = decoded(tmp_path / "d")
    assert rows.rows() == [  # by time within a user: of the first event that decides the label
        ("1", "10", 1.0, START + 20), ("1", "11", 0.0, START + 30),
        ("2", "10", 1.0, START + 5), ("2", "12", 0.0, START + 9 * 86400 - 1),
        ("4", "14", 1.0, START + 1),
    ]  # fmt: skip
    assert users.columns == ["user", "raw_id"]
    assert items.select("raw_id", "category").rows() == [("10", "7"), ("11", "7"), ("12", "9"), ("14", "9")]
    dataset = Dataset.open(str(tmp_path / "d"))
    assert (dataset.name, dataset.label) == ("Taobao UserBehavior (subset of 10 events)", Label("click", 0.0, 1.0))
    assert dataset.extra["dropped"]["events_outside_25_November_to_3_December_2017"] == 2
    for line in (
        "read     10 events\n",
        "events used: 4 pv, 1 fav, 2 cart, 1 buy",
        "label 1: fav cart buy; 0: pv; 3 of 5 rows are 1",
        "1 items have several categories: the last is taken",
    ):
        assert line in said


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        (["--positive", "buy"], {("1", "10"): 1, ("1", "11"): 0, ("2", "12"): 0}),
        (["--positive", "pv", "--shown", "fav"], {("1", "10"): 1, ("1", "11"): 1, ("2", "12"): 1, ("2", "10"): 0}),
        (["--shown", "pv", "cart"], {("1", "10"): 1, ("1", "11"): 0, ("2", "10"): 1, ("2", "12"): 0, ("4", "14"): 0}),
    ],
)
def test_what_counts_is_said(tmp_path: Path, flags: list[str], labels: dict[tuple[str, str], int]) -> None:
    assert _prepare(_csv(tmp_path / "raw"), tmp_path / "d", *flags) == 0
    rows = decoded(tmp_path / "d")[2]
    assert {(u, i): y for u, i, y, _ in rows.iter_rows()} == labels
    left_out = Dataset.open(str(tmp_path / "d")).extra["dropped"]["user-item_pairs_without_a_labelled_behaviour"]
    assert left_out == 5 - len(labels)


def test_the_blocks_in_which_a_file_is_read_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepare(_csv(tmp_path / "raw"), tmp_path / "a")
    monkeypatch.setattr(taobao_files, "BLOCK_BYTES", 37)
    assert _prepare(_csv(tmp_path / "windows", end="\r\n"), tmp_path / "b") == 0
    for a, b in zip(decoded(tmp_path / "a"), decoded(tmp_path / "b"), strict=True):
        assert a.equals(b)


def test_a_share_of_the_users_is_whole_users(tmp_path: Path) -> None:
    events = [(u, i, 1, "pv" if i % 2 else "buy", START + i) for u in range(1000) for i in range(4)]
    _prepare(_csv(tmp_path / "raw", events), tmp_path / "d", "--share", "0.3")
    users, _, rows = decoded(tmp_path / "d")
    assert 250 < len(users) < 350
    assert set(Counter(rows["user"]).values()) == {4}
    assert not _prepare(tmp_path / "raw", tmp_path / "more", "--share", "0.6")
    assert set(users["raw_id"]) < set(decoded(tmp_path / "more")[0]["raw_id"])


def test_carts_and_buys_without_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bought is 1, left in the cart 0; all buys stand before all carts in the file, and not in the dataset."""
    user, item = np.repeat(np.arange(200), 6), np.tile(np.arange(6), 200) + np.repeat(np.arange(200), 6) % 50
    behaviour = np.where(np.arange(1200) % 6 < 3, "buy", "cart")
    order = np.argsort(behaviour, kind="stable")
    raw = _parquet(tmp_path / "raw", user=user[order], item=item[order], behavior=behaviour[order])
    assert _prepare(raw, tmp_path / "d") == 0
    said = capsys.readouterr().out
    assert "label 1: buy; 0: cart; 600 of 1,200 rows are 1" in said
    assert "no categories: items have no fields; add --item-ids" in said
    assert "no times: a user's rows stand in hashed order" in said
    assert Dataset.open(str(tmp_path / "d")).name == "Taobao (buy and cart, 1,200 events)"
    rows = pl.read_parquet(tmp_path / "d/interactions/*.parquet")
    assert rows["time"].to_list() == list(range(6)) * 200
    first = rows.filter(pl.col("time") < 3)["label"].mean()
    assert isinstance(first, float)
    assert abs(first - 0.5) < 0.05
    raw = _parquet(tmp_path / "timed", user=[1, 1], item=[2, 3], behavior=["buy", "cart"], timestamp=[9, 5])
    assert _prepare(raw, tmp_path / "e") == 0
    assert decoded(tmp_path / "e")[2].rows() == [("1", "3", 0.0, 5), ("1", "2", 1.0, 9)]
    argv = ["train", "melu", "--data", str(tmp_path / "d"), "--protocol", "paml", "--run", str(tmp_path / "run")]
    assert cli.main(argv) == 2
    assert "has no user or item fields to learn from; add --item-ids" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["uniform", "popularity"])
def test_sampled_negatives(tmp_path: Path, weights: str) -> None:
    """Never touched, once a user, at the time of a positive, as many as asked for, by how popular an item is."""
    users, items = 400, 300
    touched = {
        (u, int((hashed(u, k, purpose="touch") % np.uint64(items * items)).astype(float) ** 0.5))
        for u in range(users)
        for k in range(12)
    }
    events = [(u, i, 1, "cart" if i % 3 else "pv", START + 100 * u + i) for u, i in sorted(touched)]
    raw = _csv(tmp_path / "raw", events)
    flags = ["--positive", "cart", "--shown", "none", "--negatives", "3", "--weights", weights]
    assert not any(_prepare(raw, tmp_path / d, *flags) for d in "ab")
    assert not _prepare(_csv(tmp_path / "other", events[::-1]), tmp_path / "c", *flags)
    assert not _prepare(raw, tmp_path / "d", *flags, "--seed", "1")
    rows = decoded(tmp_path / "a")[2]
    assert rows.equals(decoded(tmp_path / "b")[2])
    assert rows.equals(decoded(tmp_path / "c")[2])
    assert not rows.equals(decoded(tmp_path / "d")[2])
    clicked = {(u, i): t for u, i, _, b, t in events if b == "cart"}
    positive = rows.filter(pl.col("label") == 1)
    assert {(int(u), int(i)): t for u, i, _, t in positive.iter_rows()} == clicked
    negative = rows.filter(pl.col("label") == 0).select(pl.col("user", "item").cast(pl.Int64), "time")
    pairs = set(zip(negative["user"], negative["item"], strict=True))
    assert len(pairs) == len(negative)
    assert not pairs & touched
    times = {(u, t) for (u, _), t in clicked.items()}
    assert set(zip(negative["user"], negative["time"], strict=True)) <= times
    assert len(negative) / len(clicked) == pytest.approx(3, rel=0.05)
    each = Counter(zip(negative["user"], negative["time"], strict=True))  # geometric: a quarter has none
    assert 1 - len(each) / len(clicked) == pytest.approx(0.25, abs=0.03)
    popularity = Counter(i for _, i in touched)
    upper = set(sorted(popularity, key=lambda i: popularity[i])[len(popularity) // 2 :])
    share = np.mean([i in upper for i in negative["item"]])
    expected = np.mean([popularity[i] ** 0.75 * (i in upper) for i in popularity]) / np.mean(
        [popularity[i] ** 0.75 for i in popularity]
    )
    assert share == pytest.approx(len(upper) / len(popularity) if weights == "uniform" else expected, abs=0.03)


def test_who_touched_everything_has_no_negatives(tmp_path: Path) -> None:
    events = [(1, i, 1, "buy", START) for i in range(5)] + [(2, 0, 1, "buy", START), (2, 1, 1, "pv", START)]
    raw = _csv(tmp_path / "raw", events)
    assert _prepare(raw, tmp_path / "d", "--positive", "buy", "--shown", "none", "--negatives", "50") == 0
    _, _, rows = decoded(tmp_path / "d")
    assert sorted(rows.filter(pl.col("label") == 0)["item"]) == ["2", "3", "4"]
    given_up = Dataset.open(str(tmp_path / "d")).extra["dropped"]
    assert given_up["sampled_negatives_given_up,_their_users_touched_too_much"] > 0


def _line(number: int, text: str) -> str:
    lines = [",".join(map(str, e)) for e in EVENTS]
    lines[number - 1] = text
    return "\n".join(lines) + "\n"


BROKEN = {
    "missing": (None, [], "UserBehavior.csv: no such file; get UserBehavior.csv from https://tianchi"),
    "empty": ("", [], "UserBehavior.csv: the file is empty"),
    "cut short": (_line(10, "4,14,9,cart,1511")[:-1], [], "UserBehavior.csv, line 10: the last line has no end"),
    "columns": (_line(4, "1,11,7,pv"), [], "UserBehavior.csv, line 4: 4 columns separated by ','"),
    "a header": (_line(1, "user,item,category,behaviour,time"), [], "line 1: the behaviour is 'behaviour', none of"),
    "behaviour": (_line(3, "1,10,7,click,5"), [], "line 3: the behaviour is 'click', none of pv fav cart buy"),
    "user": (_line(5, "x,11,7,pv,5"), [], "line 5: user is 'x', not a whole number"),
    "item": (_line(5, "1,-11,7,pv,5"), [], "line 5: item is -11, outside 0 to 2147483647"),
    "time": (_line(9, "1,11,7,pv,now"), [], "line 9: time is 'now', not a whole number"),
    "blank line": (_line(2, ""), [], "line 2: 1 columns"),
    "nothing within": ("1,1,1,pv,5\n", [], "no event is left (1 outside_25"),
    "both": (_line(1, "1,10,7,pv,0"), ["--positive", "pv", "--shown", "pv"], "pv is both --positive and --shown"),
    "no positive": (
        f"1,1,1,pv,{START}\n1,2,1,fav,{START}\n", ["--positive", "buy"],
        "no event is buy, so no label is 1; choose another --positive",
    ),
    "no negative": (
        _line(1, f"1,10,7,pv,{START}"), ["--positive", "pv", "--shown", "buy"],
        "no user has an item with buy alone, so no label is 0; add --negatives 4",
    ),
    "nothing sampled": (
        _line(1, f"1,10,7,pv,{START}"), ["--shown", "none"],
        "there is no --shown behaviour, so no label is 0; add --negatives 4",
    ),
    "one behaviour": (f"1,1,1,buy,{START}\n", [], "all behaviours are buy; add --positive buy --shown none"),
    "none and more": (_line(1, "1,10,7,pv,0"), ["--shown", "none", "pv"], "--shown none stands alone"),
    "a word": (_line(1, "1,10,7,pv,0"), ["--positive", "by"], "--positive is 'by' (did you mean buy?)"),
    "share": (_line(1, "1,10,7,pv,0"), ["--share", "0"], "--share must be greater than 0, not 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_or_question_is_one_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, flags, sentence = BROKEN[case]
    monkeypatch.setattr(taobao_files, "BLOCK_BYTES", 64)  # lines are counted across blocks
    (tmp_path / "raw").mkdir()
    if text is not None:
        (tmp_path / "raw/UserBehavior.csv").write_text(text)
    check_refused(_prepare(tmp_path / "raw", tmp_path / "d", *flags), capsys, tmp_path / "d", sentence)


TABLES = {
    "no column": ({"user": [1], "item": [2]}, "no column 'behavior'; columns: user item"),
    "not whole": ({"user": ["a"], "item": [2], "behavior": ["buy"]}, "user holds String, not whole numbers"),
    "none": ({"user": [1, None], "item": [2, 3], "behavior": ["buy", "pv"]}, "row 2: user is None, not within 0 to"),
    "behaviour": ({"user": [1, 1], "item": [2, 3], "behavior": ["buy", None]}, "row 2: the behaviour is None, none of"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_broken_table_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns, sentence = TABLES[case]
    raw = _parquet(tmp_path / "raw", **columns)
    check_refused(_prepare(raw, tmp_path / "d"), capsys, tmp_path / "d", sentence)


def test_a_folder_with_both_or_with_no_parquet_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = _csv(tmp_path / "raw")
    (raw / "interactions.parquet").write_bytes(b"no Parquet at all")
    check_refused(_prepare(raw, tmp_path / "d"), capsys, tmp_path / "d", "UserBehavior.csv and interactions.parquet")
    (raw / "UserBehavior.csv").unlink()
    check_refused(_prepare(raw, tmp_path / "d"), capsys, tmp_path / "d", "interactions.parquet: not readable as Parq")


def test_the_shared_buys_and_carts(tmp_path: Path, taobao: Path) -> None:
    assert _prepare(taobao, tmp_path / "d") == 0
    dataset = Dataset.open(str(tmp_path / "d"))
    assert (dataset.users, dataset.items, dataset.interactions) == (48_749, 39_493, 414_327)
    assert dataset.extra["read"] == {"events": 453_518}
    assert dataset.extra["notes"][0] == "events used: 193,747 cart, 259,771 buy"
    assert dataset.extra["labels"]["positives"] == 259_771
    assert not any(dataset.extra["dropped"].values())
