"""Big made worlds: the same whoever writes them, with a log's marginals, and a best error that is true."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from distmeta import cli
from distmeta.data.schema import Dataset
from distmeta.data.sources import load, oracle
from distmeta.data.sources.load import Recipe, generate
from distmeta.data.sources.profiles import PROFILES
from distmeta.data.tables import read_side
from distmeta.errors import RunError, UserError
from distmeta.evaluation.metrics import pooled_auc
from distmeta.storage import Location

SMALL = {"profile": "taobao", "users": 400, "items": 900, "interactions": 24_000, "scenarios": 7}
SCALED: dict[str, dict[str, int]] = {
    "taobao": {"users": 6_000, "items": 25_000, "interactions": 608_000},
    "movielens-1m": {},
    "bookcrossing": {},
}


def _rows(where: Path) -> pl.DataFrame:
    return pl.read_parquet(f"{where}/interactions/*.parquet")


def _files(where: Path) -> dict[str, bytes]:
    return {str(f.relative_to(where)): f.read_bytes() for f in sorted(where.rglob("*")) if f.is_file()}


def test_processes_change_nothing_and_the_seed_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PART_ROWS", 4_000)
    for name, jobs, seed in (("one", 1, 5), ("three", 3, 5), ("other", 1, 6)):
        generate(Location.of(tmp_path / name), jobs, seed=seed, **SMALL)
    one, three, other = (_files(tmp_path / name) for name in ("one", "three", "other"))
    assert sum(name.startswith("interactions/") for name in one) == 7
    assert one == three
    assert one.keys() == other.keys()
    assert all(one[n] != other[n] for n in one if n.startswith(("interactions/", "users/", "items/")))


@pytest.fixture(scope="module", params=list(SCALED))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    where = tmp_path_factory.mktemp("load") / request.param
    return where, generate(Location.of(where), 1, profile=request.param, seed=3, **SCALED[request.param])


def test_marginals_are_the_published_ones(made: tuple[Path, Dataset]) -> None:
    where, dataset = made
    profile, rows = PROFILES[dataset.name.removeprefix("synthetic-")], _rows(where)
    per_user = np.bincount(rows["user"], minlength=dataset.users)
    per_item = np.sort(np.bincount(rows["item"], minlength=dataset.items))[::-1]
    assert rows.height == dataset.interactions
    assert per_user.min() >= profile.least
    for share, most in profile.activity[1:-1]:  # a quantile that few users are over varies from seed to seed
        near = 0.08 if share <= 0.99 else 0.25
        assert np.quantile(per_user, share) == pytest.approx(np.floor(most), rel=near, abs=1)
    assert per_user.max() == pytest.approx(profile.activity[-1][1], rel=0.35)
    for share in (0.01, 0.1):
        top = per_item[: round(dataset.items * share)].sum() / rows.height
        assert top == pytest.approx(profile.head(np.array(share)), abs=0.03)
    users = read_side(Location.of(where), dataset, "users", [f.name for f in dataset.user_fields])
    for name, (values, shares) in profile.fields.items():
        told = pq.read_table(where / f"vocabularies/user-{name}.parquet")["value"].to_pylist()
        assert told == [None, *values]
        found = np.bincount(users[name], minlength=len(values) + 1) / dataset.users
        assert np.abs(found[1:] - shares).max() < 4 * np.sqrt(0.25 / dataset.users)
        assert found[0] == 0
    category = np.bincount(read_side(Location.of(where), dataset, "items", ["category"])["category"].to_numpy())
    assert category[1] / dataset.items == pytest.approx(profile.categories[0], abs=0.03)
    if profile.labels == "clicks":
        assert 0.08 < rows["label"].mean() < 0.2  # type: ignore[operator]


def test_what_is_published_of_the_logs_themselves() -> None:
    """The profiles against the numbers that their sources print."""
    assert [(p.users, p.items, p.interactions) for p in PROFILES.values()] == [
        (987_994, 4_162_024, 100_150_807), (6_040, 3_706, 1_000_209), (77_805, 185_973, 433_671),
    ]  # fmt: skip
    for p in PROFILES.values():
        chance = (np.arange(p.users) + 0.5) / p.users
        assert np.floor(p.counts(chance)).mean() == pytest.approx(p.interactions / p.users, rel=0.03)
        for shares in (p.categories, *(s for _, s in p.fields.values())):
            assert sum(shares) == pytest.approx(1)
            assert np.all(np.diff(shares) <= 0)
    assert [np.floor(np.median(PROFILES[n].counts(np.array([0.5])))) for n in ("movielens-1m", "bookcrossing")] == [
        96, 1,
    ]  # fmt: skip


def test_the_real_ratings_have_these_marginals(raw: Path) -> None:
    """MovieLens 1M itself, where it is there."""
    ratings = pl.read_csv(raw / "ml-1m" / "ratings.dat", separator=":", has_header=False)
    user, item = ratings["column_1"].to_numpy(), ratings["column_3"].to_numpy()
    profile = PROFILES["movielens-1m"]
    per_user = np.unique(user, return_counts=True)[1]
    per_item = np.sort(np.unique(item, return_counts=True)[1])[::-1]
    for share, most in profile.activity[1:-1]:
        assert np.quantile(per_user, share) == pytest.approx(most, abs=1)
    for share, of_all in profile.popularity:
        assert per_item[: round(share * len(per_item))].sum() / len(user) == pytest.approx(of_all, abs=1e-3)


def test_rows_are_sorted_and_nobody_meets_an_item_twice(made: tuple[Path, Dataset]) -> None:
    where, dataset = made
    rows, p = _rows(where), PROFILES[dataset.name.removeprefix("synthetic-")]
    assert rows.equals(rows.sort("user", "time", maintain_order=True))
    assert rows.select("user", "item").is_unique().all()
    assert rows["item"].min() >= 0
    assert rows["item"].max() < dataset.items
    assert rows["time"].min() >= p.first
    assert rows["time"].max() <= p.first + p.span
    assert rows["label"].is_between(dataset.label.minimum, dataset.label.maximum).all()


@pytest.mark.parametrize("profile", ["taobao", "bookcrossing"])
def test_the_best_error_is_that_of_who_knows_every_score(tmp_path: Path, profile: str) -> None:
    """Of all rows and of the minor users', by each row's own score; and the labels have it."""
    recipe = {"profile": profile, "users": 2_000, "items": 3_000, "interactions": 80_000, "seed": 1}
    dataset = generate(Location.of(tmp_path / "d"), 1, **recipe)
    rows, crowd = _rows(tmp_path / "d"), Recipe(**recipe).crowd()  # type: ignore[arg-type]
    user, item, label = (rows[c].to_numpy() for c in ("user", "item", "label"))
    score, few = crowd.score(np.arange(2_000), user, item), crowd.few(user)
    best = oracle.click_bayes if profile == "taobao" else oracle.rating_bayes
    stretch = 1.0 if profile == "taobao" else 9 / 4
    for found, mine in (
        (dataset.extra["bayes"], few >= 0),
        (dataset.extra["bayes_groups"]["planted_group"]["minor"], few),
    ):
        for name, value in best(score[mine], crowd.noise).items():
            unit = {"mae": stretch, "rmse": stretch, "mse": stretch**2}.get(name, 1.0)
            assert found[name] == pytest.approx(unit * value, rel=1e-3), name
    if profile == "taobao":
        p = oracle.probability(oracle.click_logit(score, crowd.noise))
        assert pooled_auc(p, label) == pytest.approx(dataset.extra["bayes"]["auc_rows"], abs=0.005)
    else:
        wrong = np.abs(1 + stretch * (np.clip(score, 1, 5) - 1) - label)
        assert wrong.mean() == pytest.approx(dataset.extra["bayes"]["mae"], rel=0.02)


def test_minor_users_and_scenarios_are_planted(tmp_path: Path) -> None:
    dataset = generate(Location.of(tmp_path / "d"), 1, **{**SMALL, "users": 4_000, "interactions": 60_000})
    users = pl.read_parquet(f"{tmp_path}/d/users/*.parquet")
    groups = pl.read_parquet(f"{tmp_path}/d/vocabularies/user-planted_group.parquet")["value"]
    few = (groups.gather(users["planted_group"]) == "minor").to_numpy()
    assert few.mean() == pytest.approx(0.2, abs=0.03)
    for name in PROFILES["taobao"].fields:
        if name != "gender":  # whose rare value a third has
            value = users[name].to_numpy()
            assert np.median(value[few]) > 2 * np.median(value[~few])
    rows = _rows(tmp_path / "d")
    home = rows.group_by("item", "scenario").len().sort("len").group_by("item").last()
    assert dataset.scenarios == 7
    assert rows["scenario"].n_unique() == 7
    busy = home.filter(pl.col("len") > 100)
    of_item = rows.group_by("item").len("all").join(busy, on="item")
    assert len(of_item) > 20
    assert ((of_item["len"] / of_item["all"]) - (0.8 + 0.2 / 7)).abs().max() < 0.15


def test_everybody_meets_everything() -> None:
    crowd = Recipe(profile="taobao", users=30, items=40, interactions=1_200).crowd()
    table, bins = load.block(crowd, 0, 30)
    assert np.array_equal(np.sort(table["user"].to_numpy() * 40 + table["item"].to_numpy()), np.arange(1_200))
    assert bins.sum() == 1_200


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--users", "100", "--items", "50", "--interactions", "5001"],
         "--interactions must be at most 5,000, 100 users times 50 items, and is 5,001"),
        (["--profile", "movielens-1m", "--users", "100", "--interactions", "1999"],
         "--interactions must be at least 2,000, 20 of each of the 100 users"),
        (["--profile", "movielens-1m", "--items", "19", "--users", "5", "--interactions", "90"],
         "--items must be at least 20"),
        (["--profile", "movielens"], "did you mean movielens-1m"),
        (["--users", "-1"], "--users must be at least 0"),
        (["--preference-clusters", "4"], "--preference-clusters must be fewer"),
        (["--minor", "0.5"], "--minor must be below 0.5"),
        (["--labels", "ratings"], "taobao has no ratings"),
        (["--jobs", "-2"], "--jobs must be at least 0"),
    ],
)  # fmt: skip
def test_senseless_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str) -> None:
    profile = [] if "--profile" in flags else ["--profile", "taobao"]
    assert cli.main(["prepare", "synthetic", *profile, *flags, "--out", str(tmp_path / "d")]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_a_small_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 200_000})())
    with pytest.raises(RunError, match=r"0\.0 GB are needed and 0\.0 GB are free"):
        generate(Location.of(tmp_path / "d"), 1, **SMALL)
    assert not (tmp_path / "d").exists()


def test_a_disk_that_fills_leaves_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PART_ROWS", 4_000)
    write: Callable[..., Any] = pq.write_table

    def full(table: Any, path: str, **options: Any) -> None:
        if path.endswith("interactions/part-00002.parquet"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, path, **options)

    monkeypatch.setattr(load.pq, "write_table", full)
    with pytest.raises(RunError, match="no space left"):
        generate(Location.of(tmp_path / "d"), 1, **SMALL)
    with pytest.raises(UserError, match="no dataset here"):
        Dataset.open(Location.of(tmp_path / "d"))
    monkeypatch.undo()
    again = generate(Location.of(tmp_path / "d"), 1, **SMALL)
    assert json.loads((tmp_path / "d/dataset.json").read_text())["interactions"] == again.interactions == 24_000
