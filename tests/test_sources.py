"""Raw files to canonical datasets: real counts, what is written against the raw text, broken input."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from canonical import check_refused, decoded

from distmeta import cli
from distmeta.data.schema import Dataset, Label
from distmeta.data.sources.lines import last_of_pairs
from distmeta.data.write import ordered, part_bounds, write_dataset
from distmeta.errors import UserError
from distmeta.storage import Location

Mend = Callable[[str], str]


def _check_files(where: Location) -> None:
    for listed in Dataset.open(where).files.values():
        for f in listed:
            path = Path(where.path) / f["path"]
            assert path.stat().st_size == f["bytes"]
            assert pl.scan_parquet(path).select(pl.len()).collect().item() == f["rows"]


def _check_rows(where: Location, file: Path, separator: str, upto: int) -> None:
    """Rows of the raw ids <= upto, against the text itself by plain Python: order, labels and times."""
    raw = [line.split(separator) for line in file.read_text(encoding="latin-1").splitlines()]
    mine = [(int(u), int(t), n, i, float(r)) for n, (u, i, r, t) in enumerate(raw) if int(u) <= upto]
    _, _, rows = decoded(where)
    rows = rows.filter(pl.col("user").cast(pl.Int64) <= upto)
    expected = [(str(u), i, r, t) for u, t, _, i, r in sorted(mine)]
    assert rows.select("user", "item", "label", "time").rows() == expected


def test_movielens_1m_has_the_published_counts_and_the_fields_of_melu(ml1m: Location, raw: Path) -> None:
    dataset = Dataset.open(ml1m)
    stars = pl.read_parquet(f"{ml1m}/interactions/*.parquet")["label"].value_counts().sort("label")["count"]
    assert stars.to_list() == [56_174, 107_557, 261_197, 348_971, 226_310]
    assert (dataset.users, dataset.items, dataset.interactions) == (6_040, 3_883, 1_000_209)
    assert dataset.label == Label("rating", 1.0, 5.0)
    assert dataset.extra["dropped"] == {
        "earlier_ratings_of_the_same_user_and_item": 0,
        "users_without_interactions": 0,
    }
    values = {f.name: f.size - 1 for f in (*dataset.user_fields, *dataset.item_fields)}
    assert values == {
        "gender": 2, "age": 7, "occupation": 21, "zip": 3_402,
        "year": 81, "genres": 18, "rate": 6, "genre": 25, "director": 2_186, "actor": 7_978,
    }  # fmt: skip
    assert dataset.extra["content_fields"] == {
        "user": ["gender", "age", "occupation", "zip"],
        "item": ["rate", "genre", "director", "actor"],
    }
    _check_files(ml1m)
    _check_rows(ml1m, raw / "ml-1m/ratings.dat", "::", 60)

    _, items, rows = decoded(ml1m)
    infos = (raw / "ml-1m/movies_extrainfos.dat").read_text(encoding="utf-8").splitlines()
    for line in infos[:50]:
        item, _, year, rate, _, genre, director, _, actor, *_ = line.split("::")
        got = items.row(by_predicate=pl.col("raw_id") == item, named=True)
        assert (got["year"], got["rate"]) == (year, rate)
        assert set(got["genre"]) == set(genre.split(", "))
        assert set(got["actor"]) == set(actor.split(", "))
        assert set(got["director"]) == {name.split("(")[0] for name in director.split(", ")}
    bare = items.filter(pl.col("raw_id").is_in(["860", "1795"]))
    assert bare["rate"].null_count() == bare["year"].null_count() == 2
    assert bare["actor"].list.len().sum() == 0
    assert rows["item"].is_in(["860", "1795"]).sum() == 12


def test_movielens_100k_has_the_published_counts(ml100k: Location, raw: Path) -> None:
    dataset = Dataset.open(ml100k)
    stars = pl.read_parquet(f"{ml100k}/interactions/*.parquet")["label"].value_counts().sort("label")["count"]
    assert stars.to_list() == [6_110, 11_370, 27_145, 34_174, 21_201]
    assert (dataset.users, dataset.items) == (943, 1_682)
    values = {f.name: f.size - 1 for f in (*dataset.user_fields, *dataset.item_fields)}
    assert values == {"age": 0, "gender": 2, "occupation": 21, "zip": 795, "year": 71, "genres": 18}
    users, items, _ = decoded(ml100k)
    ages = users["age"].to_numpy().astype(float)
    assert dataset.user_fields[0].mean == pytest.approx(ages.mean(), rel=1e-6)
    assert dataset.user_fields[0].std == pytest.approx(ages.std(), rel=1e-6)
    toy_story = items.row(0, named=True)
    assert (toy_story["raw_id"], toy_story["year"]) == ("1", "1995")
    assert set(toy_story["genres"]) == {"Animation", "Children's", "Comedy"}
    _check_files(ml100k)
    _check_rows(ml100k, raw / "ml-100k/u.data", "\t", 100)


def _made_1m(raw: Path) -> None:
    raw.mkdir()
    (raw / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072-1234\n10::M::25::3::55117\n")
    (raw / "movies.dat").write_text(
        "1::Toy Story (1995)::Animation|Comedy\n5::Misérables, Les (1998)::Drama\n9::Alien (1979)::Sci-Fi\n",
        encoding="latin-1",
    )
    (raw / "ratings.dat").write_text("10::1::5::300\n2::9::3::250\n2::1::4::200\n2::5::1::200\n")


def _prepare(source: str, raw: Path, out: Path, *more: str) -> int:
    return cli.main(["prepare", source, "--raw", str(raw), "--out", str(out), *more])


def test_official_files_without_extra_infos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _made_1m(tmp_path / "raw")
    assert _prepare("movielens-1m", tmp_path / "raw", tmp_path / "d") == 0
    said = capsys.readouterr().out
    assert "dropped  1 users without interactions" in said
    assert "no movies_extrainfos.dat" in said
    users, items, rows = decoded(tmp_path / "d")
    assert users["raw_id"].to_list() == ["2", "10"]  # by number, and user 1 has rated nothing
    assert users["zip"].to_list() == ["70072", "55117"]
    assert items["year"].to_list() == ["1995", "1998", "1979"]
    assert rows.rows() == [
        ("2", "1", 4.0, 200), ("2", "5", 1.0, 200), ("2", "9", 3.0, 250), ("10", "1", 5.0, 300),
    ]  # fmt: skip


def test_of_repeated_ratings_the_last_by_time_is_kept(tmp_path: Path) -> None:
    _made_1m(tmp_path / "raw")
    with open(tmp_path / "raw/ratings.dat", "a") as f:
        f.write("2::9::1::100\n2::1::2::200\n")
    assert _prepare("movielens-1m", tmp_path / "raw", tmp_path / "d") == 0
    _, _, rows = decoded(tmp_path / "d")
    kept = {(u, i): r for u, i, r, _ in rows.rows()}
    assert kept == {("2", "9"): 3.0, ("2", "1"): 2.0, ("2", "5"): 1.0, ("10", "1"): 5.0}
    assert Dataset.open(str(tmp_path / "d")).extra["dropped"]["earlier_ratings_of_the_same_user_and_item"] == 2


BROKEN_1M: dict[str, tuple[str, Mend | None, str]] = {
    "missing file": ("users.dat", None, "users.dat: no such file; get ml-1m.zip from https://grouplens.org"),
    "missing movies": ("movies.dat", None, "movies.dat: no such file"),
    "empty": ("ratings.dat", lambda t: "", "ratings.dat: the file is empty"),
    "columns": ("ratings.dat", lambda t: t.replace("::200\n", "\n", 1), "ratings.dat, line 3: 3 columns"),
    "too many": ("users.dat", lambda t: t.replace("::M", "::M::M", 1), "users.dat, line 2: 6 columns"),
    "blank line": ("ratings.dat", lambda t: t.replace("\n", "\n\n", 1), "ratings.dat, line 2: 1 columns"),
    "cut short": ("ratings.dat", lambda t: t[:-3], "ratings.dat, line 4: the last line has no end"),
    "stars": (
        "ratings.dat",
        lambda t: t.replace("::3::", "::6::"),
        "ratings.dat, line 2: rating is 6, outside 1",
    ),
    "no stars": (
        "ratings.dat",
        lambda t: t.replace("::5::300", "::0::300"),
        "line 1: rating is 0, outside 1",
    ),
    "half stars": (
        "ratings.dat",
        lambda t: t.replace("::3::", "::3.5::"),
        "line 2: rating is '3.5', not a whole",
    ),
    "time": (
        "ratings.dat",
        lambda t: t.replace("300", "noon"),
        "ratings.dat, line 1: time is 'noon', not a whole",
    ),
    "user id": ("ratings.dat", lambda t: "x" + t, "ratings.dat, line 1: user is 'x10', not a whole"),
    "user": ("ratings.dat", lambda t: t.replace("10::", "11::"), "ratings.dat, line 1: user 11 is not in"),
    "item": ("ratings.dat", lambda t: t.replace("::9::", "::8::"), "ratings.dat, line 2: item 8 is not in"),
    "twice": ("users.dat", lambda t: t + t[:19], "users.dat, line 4: user 1 is there twice"),
    "year": ("movies.dat", lambda t: t.replace(" (1998)", ""), "movies.dat, line 2: the title"),
}


@pytest.mark.parametrize("case", BROKEN_1M)
def test_a_broken_movielens_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, mend, sentence = BROKEN_1M[case]
    _made_1m(tmp_path / "raw")
    file = tmp_path / "raw" / name
    if mend is None:
        file.unlink()
    else:
        changed = mend(file.read_text(encoding="latin-1"))
        assert changed != file.read_text(encoding="latin-1")
        file.write_text(changed, encoding="latin-1")
    check_refused(_prepare("movielens-1m", tmp_path / "raw", tmp_path / "d"), capsys, tmp_path / "d", sentence)


def test_broken_100k_and_extra_infos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "100k"
    raw.mkdir()
    (raw / "u.data").write_text("1\t1\t5\t10\n")
    (raw / "u.user").write_text("1|24|M|technician|85711\n")
    good = "1|Toy Story (1995)|01-Jan-1995|||" + "|".join("0001110000000000000") + "\n"
    for line, sentence in (
        (good.replace("|1|", "|2|", 1), "u.item, line 1: genre Animation is 2, outside 0 to 1"),
        (good.replace("01-Jan-1995", "1995"), "u.item, line 1: release date '1995' is not like 01-Jan-1995"),
    ):
        (raw / "u.item").write_text(line)
        check_refused(_prepare("movielens-100k", raw, tmp_path / "d"), capsys, tmp_path / "d", sentence)
    (raw / "u.item").write_text(good.replace("01-Jan-1995", ""))
    assert _prepare("movielens-100k", raw, tmp_path / "d") == 0
    capsys.readouterr()

    _made_1m(tmp_path / "raw")
    (tmp_path / "raw/movies_extrainfos.dat").write_bytes(b"1::a::1995::G::b::c::d::e::f::g::h\r\n2::\xe9\r\n")
    sentence = "movies_extrainfos.dat, line 2: not utf-8 text"
    check_refused(_prepare("movielens-1m", tmp_path / "raw", tmp_path / "e"), capsys, tmp_path / "e", sentence)


def test_a_dataset_is_never_overwritten_and_a_half_written_one_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _made_1m(tmp_path / "raw")
    out = tmp_path / "d"
    assert _prepare("movielens-1m", tmp_path / "raw", out) == 0
    before = (out / "dataset.json").read_bytes()
    capsys.readouterr()
    assert _prepare("movielens-1m", tmp_path / "raw", out) == 2
    assert "a dataset is already here; choose another --out or delete it" in capsys.readouterr().err
    assert (out / "dataset.json").read_bytes() == before

    (out / "dataset.json").unlink()
    (out / "interactions/part-00007.parquet").write_bytes(b"left over")
    (out / "tasks").mkdir()
    (out / "tasks/of-another-dataset").write_text("stale")
    assert _prepare("movielens-1m", tmp_path / "raw", out) == 0
    assert (out / "dataset.json").read_bytes() == before
    assert not (out / "interactions/part-00007.parquet").exists()
    assert not (out / "tasks").exists()
    capsys.readouterr()

    mine = tmp_path / "mine"
    (mine / "users").mkdir(parents=True)
    (mine / "users/thesis.txt").write_text("years of work")
    check_refused(_prepare("movielens-1m", tmp_path / "raw", mine), capsys, mine, "holds other files (users/thesis")
    assert (mine / "users/thesis.txt").read_text() == "years of work"


def test_parts_are_bounded_and_never_cut_a_user(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        user = np.repeat(np.arange(rng.integers(1, 9)), 1)
        user = np.repeat(user, rng.integers(1, 7, len(user)))
        limit = int(rng.integers(1, 12))
        bounds = part_bounds(user, limit)
        assert [b[0] for b in bounds] == [0, *(b[1] for b in bounds[:-1])]
        assert bounds[-1][1] == len(user)
        for start, end in bounds:
            assert end - start <= limit or len(set(user[start:end])) == 1
            assert end == len(user) or user[end - 1] != user[end]
            assert end == len(user) or np.sum(user == user[end]) > limit - (end - start)  # no room for more
    frame = pl.DataFrame({"user": [3, 1, 2, 3, 1], "item": ["b", "a", "a", "a", "c"], "label": 1.0, "time": 0})
    written = {}
    for limit in (1, 2, 100):
        where = Location.of(tmp_path / str(limit))
        write_dataset(
            where, name="x", label=Label("click", 0, 1), user_fields={}, item_fields={},
            users=frame.select(pl.col("user").unique()), items=frame.select(pl.col("item").unique()),
            interactions=frame, part_rows=limit,
        )  # fmt: skip
        written[limit] = decoded(where)[2].rows()
    assert written[1] == written[2] == written[100]
    assert [(u, i) for u, i, *_ in written[1]] == [("1", "a"), ("1", "c"), ("2", "a"), ("3", "b"), ("3", "a")]
    assert len(Dataset.open(str(tmp_path / "1")).files["interactions"]) == 3


def test_ids_sort_by_number_where_all_are_numbers() -> None:
    assert ordered(pl.Series(["10", "9", None, "-1", "9"])).to_list() == ["-1", "9", "10"]
    assert ordered(pl.Series(["10", "9", "b"])).to_list() == ["10", "9", "b"]
    assert ordered(pl.Series([2, 10, 1])).to_list() == ["1", "2", "10"]


def test_last_of_pairs_keeps_file_order() -> None:
    frame = pl.DataFrame({"user": [1, 1, 2, 1], "item": [1, 2, 1, 1], "label": [1, 2, 3, 4], "time": [5, 9, 1, 5]})
    kept, gone = last_of_pairs(frame)
    assert gone == 1
    assert kept["label"].to_list() == [2, 3, 4]


def test_an_interaction_of_nobody_is_a_programming_error(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": ["a"], "item": ["x"], "label": [1.0], "time": [0]})
    with pytest.raises(ValueError, match="names an item"):
        write_dataset(
            Location.of(tmp_path / "d"), name="x", label=Label("click", 0, 1), user_fields={}, item_fields={},
            users=frame.select("user"), items=pl.DataFrame({"item": ["y"]}), interactions=frame,
        )  # fmt: skip
    with pytest.raises(UserError, match="no dataset here"):
        Dataset.open(str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["synthetc"], "unknown source 'synthetc' (did you mean synthetic?)"),
        (["synthetic"], "--out"),
        (["synthetic", "--out", "x", "--user", "3"], "unknown argument --user (did you mean --users?)"),
        (["synthetic", "--out", "x", "--users", "many"], "invalid int value: 'many'"),
        (["tasks"], "--data is missing"),
    ],
)
def test_usage_errors(
    argv: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(cli.main(["prepare", *argv]), capsys, tmp_path / "x", sentence)
