"""Parameter studies: which runs stand behind them, what they come to by hand, the command from end to end."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest

from distmeta import cli
from distmeta.commands import reproduce_runs, reproduce_studies, train
from distmeta.commands.reproduce_runs import Call, Run
from distmeta.commands.settings import Setting
from distmeta.data.schema import Dataset
from distmeta.errors import Diverged, RunError
from distmeta.evaluation import papertables, report, study, study_page
from distmeta.evaluation.measured import ErrorHistogram, Measured
from distmeta.evaluation.papertables import TABLES, Ours
from distmeta.evaluation.studies import METRICS, STUDIES, Panel, Study
from distmeta.evaluation.study import DEFAULT, Curves, Point
from distmeta.parallel import assessment, rundir
from distmeta.storage import Location

TINY = Study(
    name="tiny-fig",
    title="Tiny, Figure 1",
    dataset="synthetic",
    protocol="mamo",
    ours=(Ours("MAMO", "mamo"), Ours("DNN", "mamo", ("--recommender", "dnn"))),
    panels=(
        Panel("support", "mamo-support", "support size", ("5", "15"), "more is better."),
        Panel("train", "train-share", "share to train on", ("0.5",), "more is better.", same_tasks=False),
    ),
    notes=("A | note.",),
    splits=("train", "test"),
)
RUNS = {
    f"synthetic-mamo-mamo{support}{share}{dnn}-{seed}"
    for support, share in (("", ""), ("-mamo-support-5", ""), ("", "-train-share-0.5"))
    for dnn in ("", "-recommender-dnn")
    for seed in (0, 1)
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDIES, "tiny-fig", TINY)
    monkeypatch.setitem(papertables.PREPARE, "synthetic", "python -m jobs.prepare synthetic --out data/made")


def argv(small: Location, out: Path, *more: str) -> list[str]:
    return ["reproduce", "tiny-fig", "--data", f"synthetic={small}", "--seeds", "2", "--out", str(out), "--epochs", "1",
            "--results", f"{out}/results", "--jobs", "1", "--threads", "1",
            "--set", "embedding=4", "width=6", "hidden=8", "steps=1", *more]  # fmt: skip


@pytest.fixture(scope="module")
def done(small: Location, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study; copy it before changing it."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDIES, "tiny-fig", TINY)
        patch.setitem(papertables.PREPARE, "synthetic", "")
        patch.setattr(report, "write", lambda *_: None)  # each run's own, which takes longer than its training
        assert cli.main(argv(small, out)) == 0
    return out


def panels_of(out: Path) -> dict[str, dict[str, Any]]:
    return {p["name"]: p for p in json.loads((out / "tiny-fig.json").read_text())["panels"]}


def failing(capsys: Any, words: list[str], status: int = 2) -> str:
    capsys.readouterr()
    assert cli.main(words) == status
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    return message


def test_the_default_is_trained_once(done: Path) -> None:
    assert {f.name for f in (done / "runs").iterdir()} == RUNS


def test_numbers_are_those_of_the_runs(done: Path) -> None:
    panels = panels_of(done)
    assert [(p["values"], p["default"]) for p in panels.values()] == [([5, 15], 15), ([0.5, 0.8], 0.8)]
    for name, words in (("support", ("-mamo-support-5", "")), ("train", ("-train-share-0.5", ""))):
        curve = panels[name]["curves"][1]
        assert curve["label"] == "DNN"
        for i, word in enumerate(words):
            places = [done / f"runs/synthetic-mamo-mamo{word}-recommender-dnn-{s}/evaluation.json" for s in (0, 1)]
            found = [json.loads(place.read_text()) for place in places]
            test = curve["points"][i]["splits"]["test"]
            for metric in METRICS:
                values = [e["cohorts"]["all"][metric] for e in found]
                assert test[metric]["seeds"] == values
                assert test[metric]["mean"] == pytest.approx(np.mean(values))
                assert test[metric]["sd"] == pytest.approx(np.std(values, ddof=1))
                floors = [e["floors"]["als"]["all"][metric] for e in found]
                assert panels[name]["floors"]["als"][i][metric]["seeds"] == pytest.approx(floors)
    mine = panels["support"]["curves"][0]["points"]
    assert mine[1]["splits"]["train"]["n_tasks"] == [144, 144]
    assert mine[1]["splits"]["test"]["n_tasks"] == [40, 40]
    assert mine[0]["paired"]["test"].keys() == {DEFAULT, "bias", "als"}
    assert mine[1]["paired"]["test"].keys() == {"bias", "als"}
    assert mine[0]["paired"]["train"].keys() == {DEFAULT}
    assert panels["train"]["curves"][1]["points"][0]["paired"]["test"].keys() == {"MAMO", "bias", "als"}
    means = [p["splits"]["test"]["mae"]["mean"] for p in mine]
    assert mine[0]["paired"]["test"][DEFAULT]["mae"][0] == pytest.approx(means[0] - means[1])


def test_training_tasks_are_measured_with_the_memories_of_the_checkpoint(done: Path, small: Location) -> None:
    """Measured that way, the test tasks come to what the run itself measured."""
    where = Location.of(done / "runs/synthetic-mamo-mamo-0")
    config, step = rundir.stored(where), assessment.best_step(where)
    run = Run("synthetic", "MAMO", 0, where, config, ())
    table = reproduce_runs.tasks(run, small)
    found = assessment.assess_split(config, where, step, Dataset.open(small), small, table, "test")
    assert found.tasks.equals(reproduce_runs.measured(run, table).tasks)
    assert {f.name for f in Path(str(where)).glob("measured-train-*.arrow")} == {f"measured-train-{step:09d}.arrow"}


def test_second_call_trains_and_measures_nothing(
    done: Path, small: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = (out / "tiny-fig.json").read_text()
    for module, name in ((train, "main"), (assessment, "assess_split")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("was made again"))
    assert cli.main(argv(small, out)) == 0
    assert (out / "tiny-fig.json").read_text() == before
    assert cli.main(argv(small, out, "--panels", "train", "--methods", "mamo")) == 0
    assert [*panels_of(out)] == ["train"]
    assert "Left out of this call: support." in (out / "tiny-fig.md").read_text()
    file = next(out.glob("runs/synthetic-mamo-mamo-1/measured-train-*.arrow"))
    file.write_bytes(b"nothing")
    assert f"{file}: is damaged; delete {file}" in failing(capsys, argv(small, out))


def test_page_and_pictures(done: Path) -> None:
    page = (done / "tiny-fig.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == len(TINY.panels) * len(TINY.splits)
    sheet = ElementTree.parse(done / "tiny-fig.svg").getroot()
    said = [ElementTree.tostring(svg, "unicode", "text") for svg in (sheet, *map(ElementTree.fromstring, pictures))]
    for text in said:
        assert all(word in text for word in ("MAE", "NDCG@3", "MAMO", "DNN")), text
    assert all(word in said[0] for word in ("support size", "share to train on", "bias", "als", "Training tasks"))
    assert "als" not in said[1]  # of tasks that the floors were fitted on
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    words = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(nan|none)\b", re.sub(r"<[^>]*>", " ", words), re.IGNORECASE)
    text = (done / "tiny-fig.md").read_text()
    grids = [[row.count("|") for row in part.splitlines()] for part in text.split("\n\n") if part.startswith("|")]
    assert len(grids) == 4
    assert all(len(set(counts)) == 1 for counts in grids)


def test_a_run_that_diverges_is_said_and_left_out(
    done: Path, small: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    (out / "runs/synthetic-mamo-mamo-mamo-support-5-1/run.json").unlink()

    def diverge(words: Sequence[str]) -> int:
        raise Diverged("epoch 1: too large")

    monkeypatch.setattr(train, "main", diverge)
    message = failing(capsys, argv(small, out, "--panels", "support"), 1)
    assert "1 runs diverged" in message
    assert "mamo-support-5-1" in message
    points = panels_of(out)["support"]["curves"][0]["points"]
    assert [p["failed"] for p in points] == ["epoch 1: too large", ""]
    assert points[0]["splits"] == {}
    dnn = panels_of(out)["support"]["curves"][1]["points"]
    assert [p["paired"]["test"].keys() for p in dnn] == [{DEFAULT, "bias", "als"}, {"MAMO", "bias", "als"}]
    page = (out / "tiny-fig.html").read_text()
    assert "; at 5 training diverged (epoch 1: too large)." in page


def made(mae: Sequence[float], tasks: Sequence[int], split: str = "test") -> Measured:
    """Two query rows a task, MAE as given, NDCG 1 − MAE."""
    n = len(mae)
    a = np.asarray(mae)
    sums = {"n": [2] * n, "abs_sum": 2 * a, "sq_sum": a, **{f"ndcg@{k}": 1 - a for k in (1, 3, 5, 10)}}
    frame = pl.DataFrame({"task": tasks, "split": [split] * n, "cohort": ["warm"] * n, **sums})
    return Measured(frame, None, ErrorHistogram(np.linspace(-4, 4, 3), np.zeros(2, np.int64)))


def test_differences_by_hand() -> None:
    """Two split seeds of 3 and 1 tasks: the mean of all four, of the task in both seeds resampled as one."""
    panel = Panel("k", "slots", "K", ("1", "2"), "")
    tiny = Study("s", "S", "d", "mamo", (Ours("A", "mamo"),), (panel,), ())
    ones = [made([0.5, 0.6, 0.7], [1, 2, 3]), made([0.9], [2])]
    twos = [made([0.4, 0.6, 0.6], [1, 2, 3]), made([0.5], [2])]
    floors = {"bias": twos, "als": ones}
    curves = Curves([1, 2], 2, {"A": [Point({"test": ones}), Point({"test": twos})]}, [floors, floors])
    (found,) = study.assemble(tiny, {"k": curves})["panels"]
    one, two = found["curves"][0]["points"]
    difference, low, high = one["paired"]["test"][DEFAULT]["mae"]
    assert difference == pytest.approx((0.1 + 0 + 0.1 + 0.4) / 4)
    assert low == pytest.approx(0.1)  # task 1 and 3 alone: .1; task 2 alone: (0 + .4) / 2
    assert high == pytest.approx(0.2)
    assert one["paired"]["test"]["bias"] == one["paired"]["test"][DEFAULT]
    assert one["paired"]["test"]["als"]["mae"] == [0, 0, 0]
    assert one["paired"]["test"][DEFAULT]["ndcg@3"][0] == pytest.approx(-difference)
    assert one["splits"]["test"]["mae"]["mean"] == pytest.approx((0.6 + 0.9) / 2)
    assert DEFAULT not in two["paired"]["test"]
    assert study.best(found, found["curves"][0], "mae", "test") == 1
    (said,) = study_page._findings(found, "test")
    assert said == "A: MAE is lowest at 2, the default; NDCG@3 is highest at 2, the default."
    curves.points["A"][:] = [Point({"test": twos}), Point({"test": ones})]  # type: ignore[index]
    (found,) = study.assemble(tiny, {"k": curves})["panels"]
    (said,) = study_page._findings(found, "test")
    assert said.startswith("A: MAE is lowest at 1, −0.1500 [−0.2000, −0.1000] against the default 2: the interval excl")
    other = {"bias": [made([0.1], [9]), made([0.1], [2])], "als": ones}
    with pytest.raises(RunError, match="bias: was measured on other test tasks"):
        study.assemble(tiny, {"k": Curves([1, 2], 2, dict(curves.points), [other, other])})


def test_studies_and_table_of_mamo_share_their_runs(tmp_path: Path) -> None:
    """52 runs a split for the three figures; of the table's on MovieLens only MeLU and MetaCS-DNN besides."""
    place = Location.of(tmp_path / "data")
    call = Call(1, Location.of(tmp_path), ["mamo", "melu", "metacs"], [], [])
    found = {name: reproduce_studies.plan(STUDIES[name], [], place, call) for name in STUDIES if name != "tiny-fig"}
    runs = {name: [run for p in planned for run in p.runs()] for name, planned in found.items()}
    assert {name: len({str(r.where) for r in mine}) for name, mine in runs.items()} == {
        "mamo-fig2": 37, "mamo-fig4": 15, "mamo-fig5": 6,
    }  # fmt: skip
    table = reproduce_runs.plan(TABLES["mamo-1"], {"movielens-1m": place}, call)
    every = [*(r for mine in runs.values() for r in mine), *table]
    configs = {str(r.where): r.config for r in every}
    assert len(configs) == 52 + 2
    assert all(configs[str(r.where)] == r.config for r in every)
    assert len({repr(c) for c in configs.values()}) == len(configs)
    for planned in found.values():
        for p in planned:
            assert p.default in p.values
            assert len(p.values) >= 4
            flags = {word for r in p.runs() for word in r.argv}
            assert f"--{p.panel.flag}" in flags
    tau = next(p for p in found["mamo-fig2"] if p.panel.name == "tau")
    (zero,) = tau.curves["MAMO"][0]
    assert zero.where.name == "movielens-1m-mamo-mamo-tau-0-0"
    assert zero.label == "MAMO, tau 0"
    moved = Call(1, call.out, ["mamo"], [Setting.of("tau=0.3", "reproduce", ())], [])
    (only,) = reproduce_studies.plan(STUDIES["mamo-fig2"], ["tau"], place, moved)
    assert (only.default, only.values) == (0.3, (0, 0.05, 0.1, 0.2, 0.3, 0.5))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mamo-fig3"], ["unknown table or study 'mamo-fig3'", "did you mean mamo-fig"]),
        (["tiny-fig"], ["tiny-fig needs synthetic", "--data synthetic=DATASET"]),
        (["tiny-fig", "--data", "synthetic=none"], ["tiny-fig has no data set left"]),
        (["tiny-fig", "--data", "synthetic=HERE", "--panels", "suport"], ["--panels suport", "did you mean support?"]),
        (["paml-3", "--panels", "tau"], ["--panels is for studies", "mamo-fig2"]),
        (["tiny-fig", "paml-3", "--methods", "melu"], ["--methods leaves nothing of tiny-fig", "give mamo"]),
        (["mamo-1", "--data", "movielens-1m=none", "bookcrossing-complete=HERE"], ["holds synthetic", "--complete"]),
        (["tiny-fig", "--data", "synthetic=HERE", "--jobs", "-1"], ["--jobs must be at least 0"]),
        (["tiny-fig", "--data", "synthetic=HERE", "--jobs", "2", "--workers", "2"], ["leave out --workers 2"]),
    ],
)
def test_misuse_is_one_sentence(
    words: list[str], says: list[str], small: Location, tmp_path: Path, capsys: Any
) -> None:
    given = [w.replace("HERE", str(small)) for w in words]
    message = failing(capsys, ["reproduce", *given, "--out", str(tmp_path / "out")])
    assert [s for s in says if s not in message] == [], message
    assert not (tmp_path / "out").exists()
