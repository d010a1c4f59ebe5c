"""hml: its four kinds of tasks against plain Python, what must not leak, and its cohorts from end to end."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from distmeta import cli
from distmeta.data import tasktable
from distmeta.data.loader import Loader
from distmeta.data.schema import Dataset
from distmeta.data.sources import synthetic
from distmeta.data.tasktable import TaskTable
from distmeta.draws import hashed
from distmeta.storage import Location

USERS, ITEMS = 150, 150


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """Users with 10 to 150 ratings: states below 13 and, of existing items, above 100 occur."""
    where = Location.of(tmp_path_factory.mktemp("hml") / "data")
    synthetic.generate(where, users=USERS, items=ITEMS, per_user=(10, 150))
    return where


def _rows(table: TaskTable, *splits: str) -> pl.DataFrame:
    lists = ["item", "role"]
    parts = [pl.DataFrame(pl.from_arrow(t)) for s in splits for t in table.read(s)]
    return pl.concat(parts).select("task", "user", "split", "cohort", *lists).explode(lists)


def _pairs(rows: pl.DataFrame) -> set[tuple[int, int]]:
    return set(rows.select("user", "item").iter_rows())


def _lowest(purpose: str, ids: list[int], k: int, seed: int) -> set[int]:
    return set(sorted(ids, key=lambda i: int(hashed(seed, i, purpose=purpose)))[:k])


def test_tasks_are_what_the_definition_says(data: Location) -> None:
    seed = 2
    table = tasktable.make(data, "hml", seed, {})
    new_users = _lowest("hml/test", list(range(USERS)), 30, seed)
    new_items = _lowest("hml/items", list(range(ITEMS)), 30, seed)
    valid = _lowest("hml/valid", [u for u in range(USERS) if u not in new_users], 12, seed)
    log: dict[int, list[int]] = defaultdict(list)
    for user, item in pl.read_parquet(f"{data}/interactions/*.parquet").select("user", "item").iter_rows():
        log[user].append(item)
    expected: dict[int, tuple[str, str, list[tuple[int, int]]]] = {}
    for u, items in log.items():
        for state in (0, 2):
            mine = [i for i in items if (i in new_items) == (state == 2)]
            kind = state + (u in new_users)
            if not 13 <= len(mine) <= 100 or (u in valid and state == 2):
                continue
            task = 8 * u + kind
            order = sorted(range(len(mine)), key=lambda r, t=task: int(hashed(seed, t, r, purpose="hml/query")))
            fixed = [(item, int(r in order[-10:])) for r, item in enumerate(mine)]
            if u in valid:
                expected[task] = "valid", "ne", fixed
            elif kind == 0:
                expected[task] = "train", "train", [(i, 2) for i, role in fixed if role == 0]
                expected[task + 4] = "test", "ee", fixed
            else:
                expected[task] = "test", ("ee", "ne", "en", "nn")[kind], fixed
    made: dict[int, Any] = {}
    for r in _rows(table, "train", "valid", "test").iter_rows(named=True):
        made.setdefault(r["task"], (r["split"], r["cohort"], []))[2].append((r["item"], r["role"]))
    assert made == expected
    assert {(s, c) for s, c, _ in made.values()} == {
        ("train", "train"), ("valid", "ne"), *(("test", c) for c in ("ee", "ne", "en", "nn")),
    }  # fmt: skip
    assert len(log) > sum(s != "test" for s, *_ in made.values())  # states too short or too long are left out


def test_nothing_leaks_from_test_to_training_or_validation(data: Location) -> None:
    """New users and items are in no other split, held-out rows in no episode, validation users in no test task."""
    dataset = Dataset.open(data)
    for seed in (0, 1):
        table = tasktable.make(data, "hml", seed, {})
        train, valid, test = (_rows(table, s) for s in ("train", "valid", "test"))
        of = {c: test.filter(pl.col("cohort") == c) for c in ("ee", "ne", "en", "nn")}
        existing, new = set(train["user"]), set(of["ne"]["user"]) | set(of["nn"]["user"])
        assert not existing & new
        assert not set(valid["user"]) & (existing | set(test["user"]))
        assert set(of["ee"]["user"]) == existing
        new_items = set(of["en"]["item"]) | set(of["nn"]["item"])
        assert not new_items & (set(train["item"]) | set(valid["item"]) | set(of["ee"]["item"]) | set(of["ne"]["item"]))

        held_out, rest = (of["ee"].filter(pl.col("role") == role) for role in (1, 0))
        assert not _pairs(held_out) & _pairs(train)
        assert _pairs(rest) == _pairs(train)
        assert set(test.group_by("task").agg(pl.sum("role"))["role"]) == {10}

        met = {
            (task // 8, batch.items[item].item())
            for epoch in range(3)
            for batch in Loader(table, dataset, "train", 16).epoch(epoch)
            for block in batch
            for side in (block.support, block.query)
            for task, items, mask in zip(block.task.tolist(), side.item, side.mask, strict=True)
            for item in items[mask]
        }
        assert met == _pairs(train)


def test_cohorts_and_metrics_reach_the_report(data: Location, tmp_path: Path) -> None:
    argv = ["train", "bias", "--data", str(data), "--protocol", "hml", "--threads", "1", "--run", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    table = tasktable.make(data, "hml", 0, {})
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert list(found["cohorts"]) == ["all", "ee", "en", "ne", "nn"]
    for cohort, summary in found["cohorts"].items():
        tasks = table.counts["test"] if cohort == "all" else table.cohorts["test"][cohort]
        assert summary["n_tasks"] == tasks["tasks"] > 0
        assert summary["n_ratings"] == 10 * tasks["tasks"]
        for metric in ("mae_ratings", "rmse", "ndcg@10"):
            assert summary[metric] > 0
            assert found["floors"]["als"][cohort][metric] > 0
    # who and what was trained on is predicted better than what is new
    errors = {c: found["floors"]["als"][c]["rmse"] for c in ("ee", "ne", "en", "nn")}
    assert max(errors["ee"], errors["ne"]) < min(errors["en"], errors["nn"])
    page = (tmp_path / "run/report.html").read_text()
    assert all(head in page for head in ("MAE, ratings", "RMSE", "NDCG@10", ">nn<"))


def test_movielens_has_all_four_kinds(ml1m: Location) -> None:
    table = tasktable.make(ml1m, "hml", 0, {})
    assert {c: n["tasks"] for c, n in table.cohorts["test"].items()} == {"ee": 2570, "en": 2345, "ne": 712, "nn": 659}
    assert table.cohorts["train"] == {"train": {"tasks": 2570, "rows": 95_104}}
    assert table.cohorts["test"]["ee"]["rows"] == 95_104 + 25_700
    assert table.cohorts["valid"] == {"ne": {"tasks": 285, "rows": 13_694}}
