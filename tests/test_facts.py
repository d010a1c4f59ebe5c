"""What a method says of its tasks: from Method.facts to evaluation.json and the report's pictures."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
import torch
from tiny import TinyOptions, register, together
from torch import Tensor

from distmeta import cli
from distmeta.data.schema import Dataset
from distmeta.data.tables import read_side, to_polars
from distmeta.data.tasktable import make
from distmeta.evaluation import evaluate as evaluation
from distmeta.evaluation import factfigures, groupcharts
from distmeta.evaluation.facts import adjusted_rand, contingency, summary
from distmeta.evaluation.measured import Measured
from distmeta.storage import Location
from distmeta.tasks import TaskBatch


def facts(self: Any, state: list[Tensor], batch: TaskBatch) -> dict[str, list[Tensor]]:
    """A step size below 0 for every fourth user; a cluster that is the user's segment."""
    return {
        "step_size": [s * torch.where(b.task // 8 % 4 == 0, -0.5, 1.0) for s, b in zip(state, batch, strict=True)],
        "cluster": [b.user["segment"].index[:, 0] - 1 for b in batch],
    }


@pytest.mark.parametrize(
    ("a", "b", "index"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 2], 4 / 7),  # together 1, by chance 2·1/6, most 3/2
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),  # together 0, by chance 2·2/6, most 2
        ([0, 0, 1, 2, 2, 2], [5, 5, 0, 3, 3, 3], 1.0),
        ([0, 0, 0], [0, 0, 0], 1.0),
        ([0, 1, 2], [2, 1, 0], 1.0),
        ([0, 0, 0, 0], [0, 0, 1, 1], 0.0),
        ([0], [0], 1.0),
    ],
)
def test_adjusted_rand_by_hand(a: list[int], b: list[int], index: float) -> None:
    x, y = np.array(a), np.array(b)
    assert adjusted_rand(x, y) == pytest.approx(index)
    assert adjusted_rand(y, x) == pytest.approx(index)


def test_adjusted_rand_of_strangers_is_about_0() -> None:
    draw = np.random.default_rng(0)
    found = [adjusted_rand(draw.integers(3, size=300), draw.integers(5, size=300)) for _ in range(50)]
    assert abs(np.mean(found)) < 0.002
    assert contingency(np.array([0, 2]), np.array([1, 0])).tolist() == [[0, 1], [0, 0], [1, 0]]


@pytest.fixture
def measured(small: Location, monkeypatch: pytest.MonkeyPatch) -> Measured:
    method, table = _tiny(small, monkeypatch)
    return evaluation.evaluate(method, table, Dataset.open(small))


def _tiny(small: Location, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    made = register(monkeypatch)
    monkeypatch.setattr(made, "facts", facts)
    return made(TinyOptions(), Dataset.open(small), {}), make(small, "cmml-user", 0, {})


def test_facts_are_one_number_a_task(small: Location, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """They travel, and do not depend on the number of workers."""
    assert measured.tasks.columns[-2:] == ["fact:step_size", "fact:cluster"]
    assert measured.tasks.null_count().sum_horizontal().item() == 0
    below = measured.tasks.filter(pl.col("task") // 8 % 4 == 0)["fact:step_size"]
    assert (below < 0).all()
    assert len(below) == (measured.tasks["fact:step_size"] < 0).sum() > 0
    assert Measured.from_ipc(measured.to_ipc()).tasks.equals(measured.tasks)
    method, table = _tiny(small, monkeypatch)
    many = together(4, lambda e: evaluation.evaluate(method, table, Dataset.open(small), e))
    for found in many:
        tasks = found.result().tasks
        assert tasks.select("task", "fact:cluster").equals(measured.tasks.select("task", "fact:cluster"))
        assert np.allclose(tasks["fact:step_size"], measured.tasks["fact:step_size"], rtol=1e-6)


def test_part_without_tasks_has_no_facts_and_stays_whole(measured: Measured) -> None:
    nobody = Measured(measured.tasks.clear().drop("fact:step_size", "fact:cluster"), None, measured.errors)
    both = Measured.concat([Measured.from_ipc(nobody.to_ipc()), measured])
    assert both.tasks.equals(measured.tasks)


def test_summary_counts_every_task(small: Location, measured: Measured) -> None:
    dataset, table = Dataset.open(small), make(small, "cmml-user", 0, {})
    found = summary(measured, table, dataset, small)
    steps, clusters = found["step_size"]["cohorts"], found["cluster"]
    assert sum(of["n"] for of in steps.values()) == len(measured.tasks)
    for cohort, of in steps.items():
        mine = measured.tasks.filter(pl.col("cohort") == cohort)["fact:step_size"]
        assert sum(of["counts"]) == of["n"] == len(mine)
        assert of["below_0"] == pytest.approx((mine < 0).mean())
        assert of["mean"] == pytest.approx(mine.mean())
    assert sum(clusters["sizes"]) == len(measured.tasks)
    assert clusters["fields"]["segment"]["ari"] == pytest.approx(1.0)
    assert np.allclose(clusters["fields"]["segment"]["shares"], np.eye(4))
    assert abs(clusters["fields"]["region"]["ari"]) < 0.1
    users = to_polars(read_side(small, dataset, "users", ["user", "region"]))
    regions = users.filter(pl.col("user").is_in((measured.tasks["task"] // 8).to_list()))["region"].n_unique()
    assert len(clusters["fields"]["region"]["values"]) == regions
    json.dumps(found, allow_nan=False)


def test_facts_that_are_not_numbers_are_left_out(small: Location, measured: Measured) -> None:
    dataset, table = Dataset.open(small), make(small, "cmml-user", 0, {})
    strange = measured.tasks.with_columns(
        pl.when(pl.int_range(pl.len()) == 0)
        .then(float("nan"))
        .otherwise(pl.col("fact:step_size"))
        .alias("fact:step_size"),
        pl.lit(None, pl.Float64).alias("fact:cluster"),
    )
    found = summary(Measured(strange, None, measured.errors), table, dataset, small)
    assert list(found) == ["step_size"]
    assert (
        sum(of["n"] for of in found["step_size"]["cohorts"].values())
        == strange["fact:step_size"].is_finite().sum()
        < len(strange)
    )
    plain = Measured(strange.drop("fact:step_size", "fact:cluster"), None, measured.errors)
    assert summary(plain, table, dataset, small) == {}


METRICS = [
    {
        "epoch": e,
        "clusters": {"sizes": [60 - e, 40, e], "churn": None if e == 1 else 0.5 / e, "reseeded": [2] if e == 3 else []},
        "index": {"nodes": 100 * e, "stored": 9, "evicted": 7, "hits": 64, "age": [0, 1, e, 2], "rebuilds": 1},
    }
    for e in range(1, 6)
]


def texts(svg: str) -> str:
    """Its words; that it parses is what is tested."""
    return " ".join("".join(t.itertext()) for t in ElementTree.fromstring(svg).iter() if t.tag.endswith("text"))


def test_pictures_say_what_they_were_given(small: Location, measured: Measured) -> None:
    found = summary(measured, make(small, "cmml-user", 0, {}), Dataset.open(small), small)
    pictures = {title: (texts(svg), caption) for svg, title, caption in factfigures.figures(found, METRICS)}
    assert list(pictures) == [
        "Personal step sizes", "Clusters", "Clusters and segment", "Clusters and region", "Neighbours’ ages",
    ]  # fmt: skip
    below = found["step_size"]["cohorts"]["C-W"]["below_0"]
    assert f"{100 * below:.1f} % below 0" in pictures["Personal step sizes"][1]
    assert "C-W" in pictures["Personal step sizes"][0]
    assert "dotted: clusters re-seeded" in pictures["Clusters"][0]
    assert "adjusted Rand index 1.000" in pictures["Clusters and segment"][1]
    assert pictures["Clusters and segment"][0].count("100") == 4
    assert "2–3" in pictures["Neighbours’ ages"][0]
    assert "500 nodes, 7 evicted, 1 rebuilds" in pictures["Neighbours’ ages"][1]


@pytest.mark.parametrize(
    "metrics",
    [[], [{"epoch": 1}], [{"epoch": 1, "clusters": None, "index": {"age": [0, 0]}}], [{"epoch": 1, "index": None}]],
)
def test_no_picture_of_nothing(metrics: list[dict[str, Any]]) -> None:
    assert groupcharts.clusters(metrics) is None
    assert groupcharts.ages(metrics) is None
    assert list(factfigures.figures({}, metrics)) == []


def test_pictures_of_extremes() -> None:
    """One epoch, one cluster, one value, one user: still a picture."""
    one = [{**METRICS[0], "clusters": {"sizes": [0, 0], "churn": 0.0}, "index": {"age": [3]}}]
    for svg in (
        groupcharts.clusters(one),
        groupcharts.ages(one),
        groupcharts.assignment("a & <b>", ["x"], [[1.0]], "one"),
        groupcharts.histograms("step", [0.0, 1.0], {"all": [0]}),
        groupcharts.boxes({"melu": {"all": np.array([0.5])}, "none": {}}, "error", "boxes"),
        groupcharts.plane(np.zeros((1, 2)), ["major"], "one", "plane"),
    ):
        assert svg
        texts(svg)
    assert [groupcharts._age(k) for k in range(5)] == ["0", "1", "2–3", "4–7", "8–15"]


def test_boxes_draw_quartiles_whiskers_and_outliers() -> None:
    """Of 1, 2, 3, 4 and 100 the whiskers end at 1 and 4, and 100 is a dot."""
    drawn: list[Any] = []

    class Axes:
        def add_patch(self, patch: Any) -> None:
            drawn.append((patch.get_x(), patch.get_width()))

        def plot(self, x: Any, *_: Any, **__: Any) -> None:
            drawn.append([float(v) for v in x])

    groupcharts._box(Axes(), np.array([4.0, 2.0, 100.0, 3.0, 1.0]), 0.0, 0.4, "k")  # type: ignore[arg-type]
    assert drawn[0] == (2.0, 2.0)
    assert drawn[1] == [3.0, 3.0]
    assert [1.0, 2.0] in drawn
    assert [4.0, 4.0] in drawn
    assert drawn[-1] == [100.0]


def test_train_keeps_facts_and_shows_them(small: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register(monkeypatch), "facts", facts)
    run = tmp_path / "run"
    argv = ["train", "tiny", "--data", str(small), "--run", str(run), "--epochs", "1", "--threads", "1"]
    assert cli.main(argv) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert set(found["facts"]) == {"step_size", "cluster"}
    tasks = Measured.from_ipc((run / "measured.arrow").read_bytes()).tasks
    assert len(tasks) == found["cohorts"]["all"]["n_tasks"] == sum(found["facts"]["cluster"]["sizes"])
    page = (run / "report.html").read_text()
    for title in ("Personal step sizes", "Clusters and segment"):
        assert f"<h2>{title}</h2>" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
