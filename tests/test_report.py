"""Evaluation from end to end on a small made dataset: floors and their cache, evaluation.json, the report."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from distmeta.data.loader import Loader
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable, make
from distmeta.errors import RunError
from distmeta.evaluation import evaluate as evaluation
from distmeta.evaluation import report
from distmeta.evaluation.measured import Measured
from distmeta.evaluation.metrics import METRICS, summarise
from distmeta.methods import FLOORS, entry, method_class
from distmeta.methods.base import fit_closed_form
from distmeta.storage import Location

METRICS_JSONL = [
    {"epoch": e, "step": e * 3, "seconds": 1.5, "tasks_per_s": 90.0, "train_loss": 1 / e, "valid_mae": abs(e - 3) + 0.5}
    for e in range(1, 6)
]


@pytest.fixture(scope="module")
def dataset(small: Location) -> Dataset:
    return Dataset.open(small)


@pytest.fixture(scope="module")
def table(small: Location) -> TaskTable:
    return make(small, "cmml-user", 7, {})


@pytest.fixture(scope="module")
def floors(small: Location, dataset: Dataset, table: TaskTable) -> dict[str, Measured]:
    return evaluation.floors(table, dataset, small, FLOORS["rating"])


@pytest.fixture(scope="module")
def found(floors: dict[str, Measured], table: TaskTable) -> dict[str, Any]:
    return evaluation.assemble("als", table, 0, floors["als"], floors)


def test_frame_measures_each_test_task_once(floors: dict[str, Measured], table: TaskTable) -> None:
    frame = floors["bias"].tasks
    assert floors["bias"].rows is None
    assert frame["task"].is_unique().all()
    assert len(frame) == table.counts["test"]["tasks"]
    counted = {c: len(f) for (c,), f in frame.partition_by("cohort", as_dict=True).items()}
    assert counted == {c: n["tasks"] for c, n in table.cohorts["test"].items()}
    assert frame.null_count().sum_horizontal().item() == 0


def test_floors_rank_as_the_planted_world_says(found: dict[str, Any], dataset: Dataset) -> None:
    """Users and items have offsets and tastes there: each floor that knows more errs less, none beats the noise."""
    mae = {name: cohorts["all"]["mae"] for name, cohorts in found["floors"].items()}
    assert mae["constant"] > mae["itemmean"] > mae["bias"]
    assert min(mae.values()) > dataset.extra["bayes"]["mae"]


def test_cache_is_used_and_made_again_where_it_is_wrong(
    small: Location, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make(small, "cmml-user", 8, {})
    fits = []
    real = evaluation.fit_closed_form
    monkeypatch.setattr(evaluation, "fit_closed_form", lambda m, *more: (fits.append(m.name), real(m, *more)))

    def again(made: int) -> pl.DataFrame:
        fits.clear()
        frame = evaluation.floors(table, dataset, small, ["bias"])["bias"].tasks
        assert len(fits) == made
        return frame

    first = again(1)
    assert again(0).equals(first)
    (file,) = (f for f in (table.location / "floors").children() if f.name.endswith(".arrow"))
    manifest = Location(file.fs, file.path.removesuffix(".arrow") + ".json")
    whole = file.read_bytes()
    file.write_bytes(whole[:-50] + whole[-40:])
    assert again(1).equals(first)
    file.remove()
    assert again(1).equals(first)
    manifest.write_bytes(b'{"half":')
    assert again(1).equals(first)
    manifest.write_json({**json.loads(manifest.read_bytes()), "split_hash": "of another split"})
    assert again(1).equals(first)
    manifest.remove()  # stopped between the file and its manifest
    assert again(1).equals(first)
    assert again(0).equals(first)


def test_floor_that_cannot_be_kept_is_said_and_used(
    small: Location, dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    table = make(small, "cmml-user", 9, {})
    (table.location / "floors").write_bytes(b"a file where the folder should be")
    assert len(evaluation.floors(table, dataset, small, ["constant"])["constant"].tasks)
    assert "constant is not kept" in caplog.text


def test_seen_tasks_are_a_cohort_but_not_part_of_all(small: Location, dataset: Dataset) -> None:
    table = make(small, "melu", 0, {})
    frame = evaluation.floors(table, dataset, small, ["bias"])["bias"]
    found = evaluation.assemble("bias", table, 0, frame, {"bias": frame})
    counts = {c: s["n_tasks"] for c, s in found["cohorts"].items()}
    assert counts["all"] == table.counts["test"]["tasks"] > 0
    assert counts["warm"] == table.counts["seen"]["tasks"] > 0
    assert sum(counts.values()) - counts["all"] == counts["all"] + counts["warm"]


def test_evaluation_has_every_floor_cohort_and_metric(found: dict[str, Any]) -> None:
    assert list(found) == ["method", "protocol", "split_hash", "seed", "cohorts", "floors", "paired"]
    assert list(found["cohorts"]) == ["all", "C-W", "W-W"]
    for floor in FLOORS["rating"]:
        assert list(found["floors"][floor]) == list(found["paired"][floor]) == ["all", "C-W", "W-W"]
        for cohort, differences in found["paired"][floor].items():
            assert set(differences) == set(METRICS)
            for metric, (difference, low, high) in differences.items():
                assert low <= difference <= high
                apart = found["cohorts"][cohort][metric] - found["floors"][floor][cohort][metric]
                assert difference == pytest.approx(apart, abs=1e-12)
    assert found["paired"]["als"]["all"]["mae"] == [0.0, 0.0, 0.0]
    json.dumps(found, allow_nan=False)


def test_floor_of_other_tasks_is_refused(floors: dict[str, Measured], table: TaskTable) -> None:
    with pytest.raises(RunError, match="bias: was evaluated on other tasks"):
        evaluation.assemble("als", table, 0, floors["als"], {"bias": _only(floors["bias"], floors["bias"].tasks[:-1])})


def test_prediction_that_is_not_finite_fails_the_run(dataset: Dataset, table: TaskTable) -> None:
    method = method_class("itemmean")(entry("itemmean").options(), dataset, {})
    fit_closed_form(method, lambda sweep: Loader(table, dataset, "train", 64).evaluation())
    method.get_buffer("offset")[:] = torch.nan
    with pytest.raises(RunError, match="itemmean: its prediction for task"):
        evaluation.evaluate(method, table, dataset)


def _only(measured: Measured, tasks: pl.DataFrame) -> Measured:
    return dataclasses.replace(measured, tasks=tasks)


def _errors(dataset: Dataset, table: TaskTable) -> evaluation.ErrorHistogram:
    method = method_class("bias")(entry("bias").options(), dataset, {})
    fit_closed_form(method, lambda sweep: Loader(table, dataset, "train", 64).evaluation())
    measured = evaluation.evaluate(method, table, dataset)
    errors, frame = measured.errors, measured.tasks
    assert errors.counts.sum() == frame["n"].sum()
    centres = np.abs(errors.edges[1:] + errors.edges[:-1]) / 2
    width = errors.edges[1] - errors.edges[0]
    mae_ratings = summarise(frame)["mae_ratings"]
    assert (centres * errors.counts).sum() / errors.counts.sum() == pytest.approx(mae_ratings, abs=width)
    return errors


class _Page(HTMLParser):
    """Checks that elements nest and close, and gathers what a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.outside: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.seen.append(tag)
        self.outside += [v for k, v in attrs if v and k in ("src", "href", "xlink:href", "data") and v[0] != "#"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def test_report_is_one_file_that_says_it_in_words(
    found: dict[str, Any], dataset: Dataset, table: TaskTable, tmp_path: Path
) -> None:
    best, scores = report.best_floor(found), found["cohorts"]["all"]
    assert best == min((f for f in FLOORS["rating"] if f != "als"), key=lambda f: found["floors"][f]["all"]["mae"])
    run = Location.of(tmp_path / "first")
    run.make_dir()
    where = report.write(run, found, METRICS_JSONL, "train:\n  lr: 0.001\n", dataset, _errors(dataset, table))
    text = where.read_bytes().decode()
    page = _Page(text)
    words = " ".join("".join(page.text).split())
    assert page.seen.count("svg") == 4
    assert not page.outside
    assert not {"script", "link", "img", "iframe"} & set(page.seen)
    assert "@import" not in text
    assert "url(http" not in text
    assert f"als is off by {scores['mae']:.4f}" in words
    assert f"than {best}, the best floor" in words
    assert f"better than about {dataset.extra['bayes']['mae']:.4f}" in words
    assert "best 0.5000 at epoch 3" in words
    assert table.split_hash in words
    assert "lr: 0.001" in words
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_report_escapes_what_others_wrote(found: dict[str, Any], dataset: Dataset) -> None:
    evil = '<script>alert("1")</script> & $x_1$'
    renamed = json.loads(json.dumps(found).replace('"C-W"', json.dumps(evil)))
    page = _Page(
        report.page(evil, {**renamed, "method": evil}, [], evil, dataset, evaluation.ErrorHistogram.of(dataset.label))
    )
    assert "script" not in page.seen
    assert "".join(page.text).count(evil) > 5


def test_report_with_little_to_show(
    found: dict[str, Any], floors: dict[str, Measured], dataset: Dataset, table: TaskTable
) -> None:
    """One cohort of one task, undefined NDCG, no curves, no floor but itself, no task at all: still a page."""
    nothing = evaluation.ErrorHistogram.of(dataset.label)
    one = floors["als"].tasks.filter(pl.col("cohort") == "C-W")[:1]
    one = one.with_columns(pl.lit(float("nan")).alias(c) for c in one.columns if c.startswith("ndcg"))
    other = floors["bias"].tasks.filter(pl.col("task") == one["task"].item())
    closed = [{"epoch": 1, "train_loss": None, "valid_mae": 0.7}]
    cases = {
        "one task alone gives no interval": (one, {"bias": other}),
        "is off by": (one, {"als": one}),
        "no test task": (one.clear(), {"bias": one.clear()}),
    }
    for expected, (frame, others) in cases.items():
        measured = {name: _only(floors["als"], f) for name, f in others.items()}
        made = evaluation.assemble("als", table, 0, _only(floors["als"], frame), measured)
        json.dumps(made, allow_nan=False)
        page = _Page(report.page("run", made, closed, "", dataset, nothing))
        assert expected in " ".join("".join(page.text).split())
        assert not re.search(r"\b(nan|none)\b", " ".join(page.text), re.IGNORECASE)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ([-0.02, -0.03, -0.01], "0.0200 lower than <b>als</b>, the best floor; the 95 % interval −0.0300 to −0.0100"),
        ([-0.02, -0.03, -0.01], "excludes 0, so it is <b>better</b>"),
        ([0.02, 0.01, 0.03], "it is <b>worse</b>"),
        ([-0.02, -0.05, 0.01], "includes 0: <b>no real difference</b>"),
        ([0.0, 0.0, 0.0], "the same as <b>als</b>"),
    ],
)  # fmt: skip
def test_headline_says_what_the_interval_allows(
    found: dict[str, Any], dataset: Dataset, interval: Any, expected: str
) -> None:
    made = json.loads(json.dumps(found))
    made["method"] = "melu"
    made["paired"]["als"]["all"]["mae"] = interval
    made["floors"]["als"]["all"]["mae"] = 0.1
    assert expected in report.page("run", made, [], "", dataset, evaluation.ErrorHistogram.of(dataset.label))


def test_floors_reach_their_anchors_on_movielens(ml1m: Location) -> None:
    """MAE on CMML's new users as separate scripts measured it on other splits (a split alone moves it by .011)."""
    dataset = Dataset.open(ml1m)
    table = make(ml1m, "cmml-user", 0, {"max_ratings": 100})
    found = {}
    for name, measured in evaluation.floors(table, dataset, ml1m, FLOORS["rating"]).items():
        found[name] = summarise(measured.tasks.filter(pl.col("cohort") == "C-W"))["mae"]
    assert found["bias"] == pytest.approx(0.739, abs=0.011)
    assert found["als"] == pytest.approx(0.692, abs=0.011)
    assert found["constant"] > found["itemmean"] > found["bias"] > found["als"]
