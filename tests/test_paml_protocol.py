"""paml: its users, filters and groups against plain Python; the t-test; tasks of clicks from end to end."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import ttest_ind

from distmeta import cli
from distmeta.data import tasktable
from distmeta.data.loader import Loader
from distmeta.data.schema import Dataset, Label
from distmeta.data.tasktable import TaskTable
from distmeta.data.write import write_dataset
from distmeta.draws import hashed
from distmeta.errors import UserError
from distmeta.evaluation import evaluate as evaluation
from distmeta.evaluation.cohorts import groups
from distmeta.evaluation.measured import ErrorHistogram, Measured
from distmeta.storage import Location

USERS, ITEMS = 90, 40
CITIES = ["Bergen", "Århus", "St. John's, NL", "Köln (Süd)", "M?nchen", "Ã¤¤", "--", "Oslo", "no_17"]
GARBLED = {"M?nchen", "Ã¤¤", "--"}


def _drawn(purpose: str, most: int) -> np.ndarray:
    return (hashed(np.arange(USERS), purpose=purpose) % np.uint64(most)).astype(int)


def _make(
    where: Path, kind: str = "rating", fields: tuple[str, ...] = ("age", "city", "gender", "job", "tags")
) -> None:
    """90 users with 1 to 20 interactions; ages, cities and genders that are missing or wrong here and there."""
    count = 1 + _drawn("count", 20)
    user = np.repeat(np.arange(USERS), count)
    item = np.concatenate([(7 * u + np.arange(n)) % ITEMS for u, n in enumerate(count)])
    label = hashed(user, item, purpose="label") % np.uint64(2 if kind == "click" else 5)
    values: dict[str, Any] = {
        "age": [None if a == 3 else float(a) for a in 5 + _drawn("age", 107)],
        "city": [CITIES[c] if u % 11 else None for u, c in enumerate(_drawn("city", len(CITIES)))],
        "gender": [["f", "m", None][g] if u % 9 == 0 else "fm"[g % 2] for u, g in enumerate(_drawn("gender", 3))],
        "job": [f"j{min(j, 12)}" for j in _drawn("job", 30)],
        "tags": [["a"] if u % 13 else [] for u in range(USERS)],
    }
    types = {"age": "numeric", "tags": "multi_categorical"}
    users = pl.DataFrame({"user": np.arange(USERS), **{f: values[f] for f in fields}})
    write_dataset(
        Location.of(where),
        name="made",
        label=Label(kind, 0.0, 1.0) if kind == "click" else Label("rating", 1.0, 5.0),  # type: ignore[arg-type]
        user_fields={f: types.get(f, "categorical") for f in fields},  # type: ignore[misc]
        item_fields={},
        users=users,
        items=pl.DataFrame({"item": np.arange(ITEMS)}),
        interactions=pl.DataFrame(
            {"user": user, "item": item, "label": label.astype(float) + (kind != "click"), "time": np.arange(len(user))}
        ),
        part_rows=100,
    )


def _users(where: Path) -> list[dict[str, Any]]:
    """Raw values of the users' fields, None where unknown."""
    dataset, table = Dataset.open(str(where)), pl.read_parquet(f"{where}/users/*.parquet")
    for f in dataset.user_fields:
        if f.type == "categorical":
            values = pl.read_parquet(f"{where}/vocabularies/user-{f.name}.parquet")["value"]
            table = table.with_columns(values.gather(table[f.name]).alias(f.name))
    return table.rows(named=True)


def _made(table: TaskTable) -> dict[int, tuple[str, str, list[tuple[int, int]]]]:
    found = {}
    for split in ("train", "valid", "test"):
        for part in table.read(split, columns=["task", "cohort", "item", "role"]):
            for r in part.to_pylist():
                found[r["task"]] = split, r["cohort"], list(zip(r["item"], r["role"], strict=True))
    return found


@pytest.mark.parametrize("kind", ["rating", "click"])
def test_tasks_are_what_the_definition_says(tmp_path: Path, kind: str) -> None:
    _make(tmp_path / "data", kind)
    table = tasktable.make(Location.of(tmp_path / "data"), "paml", 3, {"major_over": 1})
    log: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in pl.read_parquet(f"{tmp_path}/data/interactions/*.parquet").iter_rows(named=True):
        log[row["user"]].append(row)
    users = _users(tmp_path / "data")
    low = sorted(range(USERS), key=lambda u: len(log[u]))[:72]
    new = set(sorted(low, key=lambda u: int(hashed(3, u, purpose="paml/test")))[:14])
    left = sorted(set(low) - new, key=lambda u: int(hashed(3, u, purpose="paml/valid")))
    valid = set(left[:7])

    frequent = {}
    for name in ("age", "city", "gender", "job"):
        counted = Counter(u[name] for u in users if u[name] is not None)
        order = sorted(counted, key=lambda v: (-counted[v], v))
        frequent[name] = set(order[: math.ceil(0.3 * len(counted))])
    major = [sum(u[f] in frequent[f] for f in frequent) > 1 for u in users]

    expected, dropped = {}, Counter()
    for u in low:
        age, city = users[u]["age"], users[u]["city"]
        if sum(r["label"] > 0 for r in log[u]) < 2:
            dropped["users with fewer than 2 items"] += 1
        elif age is not None and not 10 <= age <= 100:
            dropped["users with an age outside 10 to 100"] += 1
        elif city in GARBLED:
            dropped["users with a garbled location"] += 1
        elif any(users[u][f] in (None, []) for f in ("age", "city", "gender", "job", "tags")):
            dropped["users with a blank field"] += 1
        else:
            n = len(log[u])
            order = sorted(range(n), key=lambda r: int(hashed(3, u, r, purpose="paml/query")))
            query = order[: max(1, round(0.2 * n))]
            split = "test" if u in new else "valid" if u in valid else "train"
            roles = [2 if split == "train" else int(i in query) for i in range(n)]
            rows = [(r["item"], role) for r, role in zip(log[u], roles, strict=True)]
            expected[8 * u] = split, "major" if major[u] else "minor", rows
    assert _made(table) == expected
    assert table.dropped == dropped
    assert min(dropped.values()) > 0
    assert {c for _, c, _ in expected.values()} == {"major", "minor"}
    assert {s for s, *_ in expected.values()} == {"train", "valid", "test"}
    assert table.notes["least active users"] == f"72 of 90, {len(expected)} after the filters"


def test_training_redraws_a_fifth_of_each_task(tmp_path: Path) -> None:
    _make(tmp_path / "data")
    where = Location.of(tmp_path / "data")
    dataset, table = Dataset.open(where), tasktable.make(where, "paml", 0, {})

    def queries(epoch: int, redraw: bool) -> dict[int, list[float]]:
        batches = Loader(table, dataset, "train", 8, redraw=redraw).epoch(epoch)
        found = {}
        for batch in batches:
            for b in batch:
                for task, items, mask, support in zip(
                    b.task.tolist(), b.query.item, b.query.mask, b.support.mask, strict=True
                ):
                    found[task] = batch.items[items[mask]].tolist()
                    n = len(found[task]) + int(support.sum())
                    assert len(found[task]) == max(1, round(0.2 * n)) < n
        return found

    first, second = queries(0, True), queries(1, True)
    assert len(first) == table.counts["train"]["tasks"]
    assert first.keys() == second.keys()
    assert first != second
    assert queries(1, False) == first


def test_groups_are_compared_by_students_t_test(tmp_path: Path) -> None:
    """On per-user MSE of the split test; None where the test is not defined."""
    rng = np.random.default_rng(0)
    cohort, mse = rng.permutation(["major"] * 30 + ["minor"] * 20 + ["other"] * 5), rng.random(55) + 1
    n = rng.integers(1, 9, 55)
    tasks = pl.DataFrame({"task": np.arange(55), "cohort": cohort, "n": n, "abs_sum": mse * n, "sq_sum": mse * n})
    tasks = tasks.with_columns(pl.lit(0.5).alias(f"ndcg@{k}") for k in (1, 3, 5, 10)).with_columns(split=pl.lit("test"))
    seen = tasks.with_columns(pl.lit("seen").alias("split"), pl.lit(9.0).alias("sq_sum"), task=pl.col("task") + 99)
    nothing = ErrorHistogram(np.linspace(-4, 4, 3), np.zeros(2, np.int64))

    def compared(frame: pl.DataFrame) -> dict[str, Any]:
        found = groups(Measured(pl.concat([frame, seen]), None, nothing), [["major", "minor"]])["major-minor"]
        json.dumps(found, allow_nan=False)
        return found

    a, b = mse[cohort == "major"], mse[cohort == "minor"]
    expected = ttest_ind(a, b)
    assert compared(tasks) == {
        "mse": pytest.approx([a.mean(), b.mean()]),
        "t": pytest.approx(expected.statistic),
        "p": pytest.approx(expected.pvalue),
        "n": [30, 20],
    }
    alone = compared(tasks.filter(pl.col("cohort") != "minor"))
    assert (alone["mse"][1], alone["t"], alone["p"], alone["n"]) == (None, None, None, [30, 0])
    same = compared(tasks.with_columns(sq_sum=pl.col("n") * 2.0))
    assert (same["t"], same["p"]) == (None, None)


def test_clicks_are_learned_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`train melu` on clicks under paml: click metrics of method and floors, groups, a report; AUC by brute force."""
    _make(tmp_path / "data", "click", ("gender", "job"))
    argv = ["train", "melu", "--data", str(tmp_path / "data"), "--protocol", "paml", "--major-over", "0"]
    argv += ["--epochs", "2", "--embedding", "4", "--threads", "1", "--run", str(tmp_path / "run")]
    assert cli.main(argv) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "auc" in said
    assert "major-minor, MSE" in said
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert list(found["floors"]) == list(found["floor_groups"]) == ["constant", "itemmean", "itempop", "ials"]
    everyone, constant = found["cohorts"]["all"], found["floors"]["constant"]["all"]
    assert constant["auc"] == constant["auc_rows"] == 0.5
    assert 0 < constant["nel_rows"] < 1.5
    assert everyone["recall@20"] == everyone["recall@100"] == 1.0
    assert 0 < everyone["n_both"] <= everyone["n_positive"] < everyone["n_tasks"]
    for metric in ("auc", "nel", "recall@10", "mse"):
        difference = found["paired"]["constant"]["all"][metric][0]
        assert difference == pytest.approx(everyone[metric] - constant[metric], abs=1e-12)
    where = Location.of(tmp_path / "data")
    table = tasktable.make(where, "paml", 0, {"major_over": 0})
    measured = evaluation.floors(table, Dataset.open(where), where, ["itemmean"])["itemmean"]
    assert measured.rows is not None
    score, label = measured.rows["score"].to_numpy(), measured.rows["label"].to_numpy()
    wins = np.sign(score[label == 1][:, None] - score[label == 0]) / 2 + 0.5
    assert found["floors"]["itemmean"]["all"]["auc_rows"] == pytest.approx(wins.mean(), abs=1e-12)
    page = (tmp_path / "run/report.html").read_text()
    for head in ("Recall@50", "NEL, rows", "Groups of users", "MSE, minor"):
        assert head in page


def test_bad_questions_get_a_sentence(tmp_path: Path) -> None:
    _make(tmp_path / "few", fields=("gender", "tags"))
    with pytest.raises(UserError, match=r"more than 2 single-valued .* users have 1; set --major-over below that"):
        tasktable.make(Location.of(tmp_path / "few"), "paml", 0, {})
    assert tasktable.make(Location.of(tmp_path / "few"), "paml", 0, {"major_over": 0}).counts["train"]["tasks"] > 0


@pytest.mark.parametrize("kind", ["rating", "click"])
def test_users_without_fields_are_neither_major_nor_minor(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All tasks are in one cohort, a note says so, nothing is compared; PAML needs --history, and says so."""
    _make(tmp_path / "data", kind, fields=("tags",) if kind == "rating" else ())
    argv = ["train", "paml", "--data", str(tmp_path / "data"), "--protocol", "paml", "--epochs", "1", "--item-ids"]
    argv += ["--embedding", "4", "--threads", "1", "--run", str(tmp_path / "run")]
    if kind == "click":
        assert cli.main(argv) == 2
        assert "made: has no user fields to tell users apart by; add --history" in capsys.readouterr().err
    assert cli.main([*argv, "--history"]) == 0, capsys.readouterr().err
    table = tasktable.make(Location.of(tmp_path / "data"), "paml", 0, {"major_over": 2})
    assert table.notes["major users"] == "no major or minor users, as there is no single-valued user field"
    assert table.compared == []
    assert {c for _, c, _ in _made(table).values()} == {"all"}
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert list(found["cohorts"]) == ["all"]
    assert found["cohorts"]["all"]["n_tasks"] == table.counts["test"]["tasks"]
    assert "groups" not in found


def test_movielens_has_the_published_shares(ml1m: Location) -> None:
    """72.7 / 71.7 / 58.2 / 64.1 % of the users have a frequent value (paper 72.4 / 71.7 / 56.7 / 64.0), 60.5 % are
    major; 4,832 users 7:1:2; no filter finds anything."""
    table = tasktable.make(ml1m, "paml", 0, {})
    shares = [table.notes[f"frequent {f}"] for f in ("age", "gender", "zip", "occupation")]
    assert shares == ["72.7%", "71.7%", "58.2%", "64.1%"]
    assert table.notes["major users"].startswith("60.5% of all")
    assert [table.counts[s]["tasks"] for s in ("train", "valid", "test")] == [3_383, 483, 966]
    assert not sum(table.dropped.values())
