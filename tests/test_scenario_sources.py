"""Sources with scenarios: MovieLens-20M's tags, Taobao's themes, and tables whose rows name their market."""

import dataclasses
from pathlib import Path

import polars as pl
import pytest
import scenarioworld as world

from distmeta.commands.prepare import main as prepare
from distmeta.data import tasktable
from distmeta.data.schema import Dataset
from distmeta.data.sources.hybrid import _fields, hybrid
from distmeta.data.sources.movielens20m import movielens_20m
from distmeta.data.sources.taobao_themes import taobao_cloud_theme
from distmeta.errors import UserError
from distmeta.storage import Location

LIMITS = {"scenario_least": 2, "scenario_support": 1, "scenario_query": 1, "scenario_users": 0}

ML20M = {
    "ratings.csv": "userId,movieId,rating,timestamp\n"
    "1,2,3.5,1112486027\n1,29,4.0,1112484676\n2,2,0.5,1112484819\n2,31,5.0,1112484580\n3,2,4.5,94\n3,2,4.0,95\n",
    "movies.csv": "movieId,title,genres\n"
    '2,Jumanji (1995),Adventure|Children\n29,"City of Lost Children, The (Cité, La) (1995)",Drama\n'
    "31,Dangerous Minds,(no genres listed)\n",
    "tags.csv": "userId,movieId,tag,timestamp\n"
    '1,2,Board Game,1\n2,2, board game ,2\n2,29,"dark, odd",3\n3,31,board game,4\n3,31,,5\n',
}
THEMES = (
    "user_id,item_id,leaf_cate_id,cate_level1_id,theme_id,reach_time\n"
    "11,101,7,1,5,2018-12-01 08:00:00\n11,101,7,1,6,2018-12-01 08:00:01\n12,101,8,1,5,2018-12-02 08:00:00\n"
    "12,102,,1,5,2018-12-02 09:00:00\n12,101,7,1,5,2018-12-02 08:30:00\n13,103,9,2,6,1543651200\n"
)


def values(where: Path, side: str, field: str) -> list[object]:
    """A field of every user or item, in index order, as raw values."""
    vocabulary = pl.read_parquet(f"{where}/vocabularies/{side}-{field}.parquet")["value"].to_list()
    column = pl.read_parquet(f"{where}/{side}s/*.parquet")[field].to_list()
    return [[vocabulary[k] for k in v] if isinstance(v, list) else vocabulary[v] for v in column]


def write(folder: Path, files: dict[str, str]) -> Location:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return Location.of(folder)


def rows(where: Path) -> list[tuple[object, ...]]:
    """raw user, raw item, label, time and maybe scenario, sorted."""
    frame = pl.read_parquet(f"{where}/interactions/*.parquet")
    for side in ("user", "item"):
        raw = pl.read_parquet(f"{where}/{side}s/*.parquet")["raw_id"]
        frame = frame.with_columns(raw.gather(frame[side]).alias(side))
    if "scenario" in frame.columns:
        names = pl.read_parquet(f"{where}/vocabularies/interaction-scenario.parquet")["value"]
        frame = frame.with_columns(names.gather(frame["scenario"]).alias("scenario"))
    return sorted(frame.rows())


def test_movielens_20m_has_half_stars_and_tags(tmp_path: Path) -> None:
    """Quoted titles, UTF-8, no year, no genre, the last of two ratings; tags in lower case, by how many users."""
    raw = write(tmp_path / "raw", ML20M)
    found = movielens_20m(raw, Location.of(tmp_path / "one"))
    assert (found.name, found.label.minimum, found.label.maximum) == ("movielens-20m-6-ratings", 0.5, 5.0)
    assert rows(tmp_path / "one") == [
        ("1", "2", 3.5, 1112486027), ("1", "29", 4.0, 1112484676), ("2", "2", 0.5, 1112484819),
        ("2", "31", 5.0, 1112484580), ("3", "2", 4.0, 95),
    ]  # fmt: skip
    assert values(tmp_path / "one", "item", "year") == ["1995", "1995", None]
    assert values(tmp_path / "one", "item", "genres") == [["Adventure", "Children"], ["Drama"], []]
    assert values(tmp_path / "one", "item", "tags") == [["board game"], ["dark, odd"], ["board game"]]
    movielens_20m(raw, Location.of(tmp_path / "two"), tag_users=2)
    assert values(tmp_path / "two", "item", "tags") == [["board game"], [], []]


def test_tags_become_scenarios(tmp_path: Path) -> None:
    """Of a larger made MovieLens-20M: a scenario of each tag with two movies, every rating a positive."""
    users, movies = range(1, 31), range(1, 13)
    ratings = [f"{u},{m},{(u * m) % 10 / 2 + 0.5},{u + m}" for u in users for m in movies if (u + m) % 3]
    files = {
        "ratings.csv": "userId,movieId,rating,timestamp\n" + "\n".join(ratings) + "\n",
        "movies.csv": "movieId,title,genres\n" + "".join(f"{m},M{m} (1999),Drama\n" for m in movies),
        "tags.csv": "userId,movieId,tag,timestamp\n" + "".join(f"1,{m},tag {m % 5},1\n" for m in movies),
    }
    where = Location.of(tmp_path / "data")
    movielens_20m(write(tmp_path / "raw", files), where)
    table = tasktable.make(where, "cmml-scenario", 0, {**LIMITS, "positive_from": 0.0})
    assert table.notes["scenarios"] == "tags: 5, of which 5 are used"
    assert table.notes["positives"] == "ratings of 0 or more"
    stored = {r["task"] // 8: r for part in table.read("train") for r in part.to_pylist()}
    for tag, task in stored.items():
        mine = {m - 1 for m in movies if m % 5 == tag}
        assert set(task["item"]) == mine
        taken = {u for u in users if all((u + m + 1) % 3 for m in mine)}  # who took every movie of the tag is left out
        pairs = {(u - 1, m) for u in users for m in mine if (u + m + 1) % 3 and u not in taken}
        assert set(zip(task["user"], task["item"], strict=True)) == pairs


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("ratings.csv", "0.5,1112484819", "5.5,1112484819", "ratings.csv, line 4: rating is '5.5', not a number from"),
        ("ratings.csv", "2,31,5.0", "2,32,5.0", "ratings.csv, line 5: movieId 32 is not in .*movies.csv"),
        ("ratings.csv", "userId,movieId", "user,movieId", "ratings.csv, line 1: no column 'userId' in the header"),
        ("movies.csv", "31,Dangerous", "29,Dangerous", "movies.csv, line 4: movieId 29 is there twice"),
        ("tags.csv", "2,29,", "2,x9,", "tags.csv, line 4: movieId is 'x9', not a whole number"),
        ("tags.csv", "3,31,,5\n", "3,31,,5", "tags.csv, line 6: the last line has no end"),
    ],
)
def test_damaged_movielens_20m_is_told(tmp_path: Path, file: str, old: str, new: str, told: str) -> None:
    assert old in ML20M[file]
    raw = write(tmp_path / "raw", ML20M | {file: ML20M[file].replace(old, new)})
    with pytest.raises(UserError, match=told):
        movielens_20m(raw, Location.of(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_taobao_themes_are_scenarios_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One click a user, item and theme, the last; an item in two themes stays in both; its usual category."""
    write(tmp_path / "raw", {"theme_click_log.csv": THEMES})
    assert prepare(["taobao-cloud-theme", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "data")]) == 0
    assert "6 clicks, 2 themes" in capsys.readouterr().out
    found = Dataset.open(Location.of(tmp_path / "data"))
    assert (found.scenarios, found.label.kind, found.interactions) == (2, "click", 5)
    assert rows(tmp_path / "data") == [
        ("11", "101", 1.0, 1543651200, "5"), ("11", "101", 1.0, 1543651201, "6"), ("12", "101", 1.0, 1543739400, "5"),
        ("12", "102", 1.0, 1543741200, "5"), ("13", "103", 1.0, 1543651200, "6"),
    ]  # fmt: skip
    assert values(tmp_path / "data", "item", "category") == ["7", None, "9"]
    assert values(tmp_path / "data", "item", "category1") == ["1", "1", "2"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("13,103,9,2,6,", "13,103,9,2,,", "theme_click_log.csv, line 7: theme_id is '', not a whole number"),
        ("1543651200", "yesterday", "theme_click_log.csv, line 7: reach_time is 'yesterday'; a time is whole seconds"),
        ("12,102,,1,5,", "12,102,,1,5,9,9,", "theme_click_log.csv: not readable as CSV"),
        (THEMES, "", "theme_click_log.csv: the file is empty; get theme_click_log.csv"),
    ],
)
def test_damaged_themes_are_told(tmp_path: Path, old: str, new: str, told: str) -> None:
    raw = write(tmp_path / "raw", {"theme_click_log.csv": THEMES.replace(old, new)})
    with pytest.raises(UserError, match=told):
        taobao_cloud_theme(raw, Location.of(tmp_path / "data"))


def test_tables_may_name_the_scenario_of_a_row(tmp_path: Path) -> None:
    """Markets (as XMRec's) by a YAML spec: the same user and item in two markets are two rows; missing is told."""
    text = "uid,sku,stars,market\n" + "".join(
        f"{u},{i},{(u + i) % 5 + 1},m{m}\n" for m in range(6) for u in range(20) for i in range(8) if (u + i + m) % 3
    )
    spec = "name: markets\nlabel: {kind: rating, minimum: 1, maximum: 5}\n"
    spec += "interactions: {file: r.csv, user: uid, item: sku, label: stars, scenario: market}\n"
    write(tmp_path / "raw", {"r.csv": text, "spec.yaml": spec})
    arguments = ["table", "--spec", str(tmp_path / "raw/spec.yaml"), "--out"]
    assert prepare([*arguments, str(tmp_path / "data")]) == 0
    where = Location.of(tmp_path / "data")
    assert Dataset.open(where).interactions == text.count("\n") - 1
    table = tasktable.make(where, "cmml-scenario", 0, {**LIMITS, "positive_from": 3.0})
    assert table.notes["scenarios"] == "own: 6, of which 6 are used"
    for part in table.read("train"):
        for task in part.to_pylist():
            m = task["task"] // 8
            wanted = {(u, i) for u in range(20) for i in range(8) if (u + i + m) % 3 and (u + i) % 5 >= 2}
            assert set(zip(task["user"], task["item"], strict=True)) == wanted
    write(tmp_path / "raw", {"r.csv": text.replace("m5\n", "\n", 1)})
    with pytest.raises(UserError, match=r"r.csv, row \d+: no market; fill it in"):
        prepare([*arguments, str(tmp_path / "other")])


def test_markets_of_real_logs(taobao: Path, tmp_path: Path) -> None:
    """XMRec's four markets with ratings, through a spec: users disjoint, each a scenario where so many items may be."""
    spec = "name: xmrec\nlabel: {kind: rating, minimum: 1, maximum: 5}\n"
    spec += "interactions: {file: ratings.parquet, label: rating, scenario: market}\n"
    (tmp_path / "spec.yaml").write_text(spec)
    raw = taobao.parent / "xmrec"
    assert prepare(["table", "--spec", str(tmp_path / "spec.yaml"), "--raw", str(raw), "--out", f"{tmp_path}/x"]) == 0
    table = tasktable.make(Location.of(tmp_path / "x"), "cmml-scenario", 0, {"scenario_most": 10_000})
    assert table.notes["scenarios"] == "own: 4, of which 4 are used"
    assert [table.counts[s]["tasks"] for s in ("train", "valid", "test")] == [3, 0, 1]


def test_hybrid_holds_the_scenarios_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Positives of both datasets under new names, fields as raw values; the protocol's cohorts are the domains."""
    world.make(tmp_path / "films", themes=False)
    world.make(tmp_path / "shop", themes=True)
    manifest = tmp_path / "shop" / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"name": "world"', '"name": "shop"'))
    bounds = ["--scenario-least", "12", "--scenario-most", "40", "--scenario-support", "6"]
    bounds += ["--scenario-query", "10", "--out", str(tmp_path / "both")]
    with pytest.raises(UserError, match="two datasets are called world; a hybrid is of different ones"):
        prepare(["hybrid", "--of", str(tmp_path / "films"), str(tmp_path / "films"), *bounds])
    assert prepare(["hybrid", "--of", str(tmp_path / "films"), str(tmp_path / "shop"), *bounds]) == 0
    assert "world: 40 users" in capsys.readouterr().out
    wanted = set()
    for name, folder in (("world", "films"), ("shop", "shop")):
        raw = {s: pl.read_parquet(f"{tmp_path / folder}/{s}s/*.parquet")["raw_id"] for s in ("user", "item")}
        for scenario, pairs in world.kept(world.positives(str(tmp_path / folder))).items():
            wanted |= {
                (f"{name}/{raw['user'][u]}", f"{name}/{raw['item'][i]}", f"{name}: {scenario}") for u, i in pairs
            }
    found = rows(tmp_path / "both")
    assert {(u, i, s) for u, i, _, _, s in found} == wanted
    assert len(found) == len(wanted)
    films = dict(
        zip(
            pl.read_parquet(f"{tmp_path}/films/items/*.parquet")["raw_id"],
            values(tmp_path / "films", "item", "genres"), strict=True,
        )
    )  # fmt: skip
    genres = values(tmp_path / "both", "item", "genres")
    for raw_id, mine in zip(pl.read_parquet(f"{tmp_path}/both/items/*.parquet")["raw_id"], genres, strict=True):
        if str(raw_id).startswith("world/"):
            assert mine == films[str(raw_id).removeprefix("world/")]
    table = tasktable.make(Location.of(tmp_path / "both"), "cmml-scenario", 0, world.SMALL)
    assert set(table.cohorts["train"]) == {"world", "shop"}
    assert table.notes["scenarios"].startswith("own: ")


def test_hybrid_refuses_what_it_cannot_join(tmp_path: Path) -> None:
    """A field of two types; a dataset without a scenario of such sizes; one dataset alone."""
    world.make(tmp_path / "films", themes=False)
    write(tmp_path / "raw", {"theme_click_log.csv": THEMES})
    taobao_cloud_theme(Location.of(tmp_path / "raw"), Location.of(tmp_path / "themes"))
    films, themes, out = (Location.of(tmp_path / n) for n in ("films", "themes", "out"))
    with pytest.raises(UserError, match="--of names one dataset; give two or more"):
        hybrid([films], out, {})
    with pytest.raises(UserError, match=r"themes: leaves no scenario \(2 scenarios with too few items"):
        hybrid([films, themes], out, {"scenario_least": 12})
    other = Dataset.open(films)
    fields = tuple(dataclasses.replace(f, type="numeric") if f.name == "genres" else f for f in other.item_fields)
    with pytest.raises(UserError, match="the item field genres is numeric in world and multi_categorical in another"):
        _fields([other, dataclasses.replace(other, item_fields=fields)], "item")
    assert not (tmp_path / "out" / "dataset.json").exists()
