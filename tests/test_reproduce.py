"""`reproduce` from end to end on a small made table: the runs, a second call, both papers' numbers, bad input."""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest

from distmeta import cli
from distmeta.commands import train
from distmeta.evaluation import papertables, plane, report, reproduction, reproduction_page
from distmeta.evaluation.measured import ErrorHistogram, Measured
from distmeta.evaluation.papertables import TABLES, Column, Ours, PaperTable, Printed, Section, printed
from distmeta.storage import Location

TINY = PaperTable(
    name="tiny-1",
    title="Tiny, Table 1",
    protocol="paml",
    columns=(
        Column("synthetic", "mse", "MSE"),
        Column("synthetic", "mse", "MSE, minor", "minor"),
        Column("synthetic", "ndcg@3", "nDCG@3"),
        Column("synthetic", "p", "p"),
    ),
    sections=(
        Section(
            "",
            "all",
            """
            MeLU | 1.451±0.022 | 0.1 | 0.793± 0.002 | 0.071
            Rival | 1.210*± 0.029 | .2 | 0.800 |
            """,
        ),
    ),
    ours=(
        Ours("MeLU", "melu"),
        Ours("MeLU, 1 step", "melu", ("--steps", "1"), against=("MeLU",)),
        Ours("MeLU, 5 steps", "melu", ("--steps", "5")),
        Ours("Transfer", "transfer"),
    ),
    notes=("A | note.",),
    flags={"synthetic": ("--major-over", "1")},
    boxes=True,
    maps=True,
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "tiny-1", TINY)
    monkeypatch.setitem(papertables.PREPARE, "synthetic", "python -m jobs.prepare synthetic --out data/made")


def argv(small: Location, out: Path, *more: str) -> list[str]:
    return ["reproduce", "tiny-1", "--data", f"synthetic={small}", "--seeds", "2", "--out", str(out), "--epochs", "1",
            "--results", f"{out}/results", "--jobs", "1", "--threads", "1",
            "--set", "embedding=4", "melu:hidden=8,8", "transfer:hidden=8", *more]  # fmt: skip


@pytest.fixture(scope="module")
def done(small: Location, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished reproduction; copy it before changing it."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "tiny-1", TINY)
        patch.setitem(papertables.PREPARE, "synthetic", "")
        patch.setattr(report, "write", lambda *_: None)  # each run's own, which takes longer than its training
        assert cli.main(argv(small, out)) == 0
    return out


def failing(capsys: Any, words: list[str], status: int = 2) -> str:
    capsys.readouterr()
    assert cli.main(words) == status
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    return message


def test_rows_that_set_nothing_share_a_run(done: Path) -> None:
    """MeLU takes 5 steps anyway."""
    names = {f"synthetic-paml-{m}-{seed}" for m in ("melu", "melu-steps-1", "transfer") for seed in (0, 1)}
    assert {f.name for f in (done / "runs").iterdir()} == names
    config = (done / "runs" / "synthetic-paml-melu-1" / "config.yaml").read_text()
    assert all(line in config for line in ("split_seed: 1", "major_over: 1", "embedding: 4", "epochs: 1"))


def test_numbers_are_those_of_the_runs(done: Path) -> None:
    found = json.loads((done / "tiny-1.json").read_text())
    (section,) = found["sections"]
    rows = {row["label"]: row for row in section["rows"]}
    assert list(rows) == ["MeLU", "Rival", "MeLU, 1 step", "MeLU, 5 steps", "Transfer", "constant", "bias", "als"]
    assert rows["MeLU"]["paper"] == [[1.451, 0.022], [0.1, None], [0.793, 0.002], [0.071, None]]
    assert rows["Rival"]["ours"] == [None] * 4
    assert rows["MeLU"]["ours"] == rows["MeLU, 5 steps"]["ours"]
    evaluations = [json.loads((done / f"runs/synthetic-paml-transfer-{s}/evaluation.json").read_text()) for s in (0, 1)]
    pooled = next(p for p in section["paired"] if (p["label"], p["against"]) == ("Transfer", "als"))
    for i, (cohort, metric) in enumerate((("all", "mse"), ("minor", "mse"), ("all", "ndcg@3"))):
        a, b = (e["cohorts"][cohort][metric] for e in evaluations)
        expected = {"mean": (a + b) / 2, "sd": abs(a - b) / math.sqrt(2)}
        mine = rows["Transfer"]["ours"][i]
        assert mine.pop("seeds") == [a, b]
        assert mine == pytest.approx(expected)
        floors = [e["floors"]["als"][cohort][metric] for e in evaluations]
        assert rows["als"]["ours"][i]["seeds"] == floors
        n = [e["cohorts"][cohort]["n_ranked" if metric == "ndcg@3" else "n_tasks"] for e in evaluations]
        difference, low, high = pooled["differences"][i]
        assert difference == pytest.approx(np.average([a - floors[0], b - floors[1]], weights=n))
        assert low < difference < high
    assert rows["Transfer"]["ours"][3]["seeds"] == [e["groups"]["major-minor"]["p"] for e in evaluations]
    assert pooled["differences"][3] is None
    assert set(found["split_hashes"]) == {"synthetic 0", "synthetic 1"}


def rows_of(errors: Mapping[str, Sequence[float]]) -> Measured:
    """Query rows of label 3 by cohort, one a task, which is numbered through; scores are above it by the errors."""
    each = [(cohort, e) for cohort, es in errors.items() for e in es]
    task, e = np.arange(len(each)), np.array([e for _, e in each])
    names = pl.Enum(["W-W", "W-C"])
    rows = pl.DataFrame({"task": task, "split": "test", "position": np.zeros(len(task), np.int32)}).with_columns(
        pl.Series("row_cohort", [c for c, _ in each], names), score=pl.lit(3.0) + pl.Series(e), label=pl.lit(3.0)
    )
    sums = {"n": np.ones(len(task), int), "abs_sum": e, "sq_sum": e * e, **{f"ndcg@{k}": e * 0 for k in (1, 3, 5, 10)}}
    tasks = pl.DataFrame({"task": task, "split": "test", "cohort": "warm", **sums})
    return Measured(tasks, rows, ErrorHistogram(np.linspace(-4, 4, 3), np.zeros(2, np.int64)))


def test_rows_against_another_row_by_hand() -> None:
    """Two split seeds: W-C has 2 rows and 1. A row left out of the call is compared with nothing."""
    table = PaperTable(
        "t", "T", "mamo", (Column("d", "mae", "MAE"), Column("d", "ndcg@3", "NDCG@3")), (Section("", "W-C"),),
        (Ours("Full", "mamo"), Ours("Less", "mamo", ("--slots", "1"), against=("Full", "Absent")), Ours("Absent", "x")),
        (),
    )  # fmt: skip
    full = [rows_of({"W-W": [0.5] * 6, "W-C": [0.2, 0.4]}), rows_of({"W-W": [0.5] * 6, "W-C": [0.6]})]
    less = [rows_of({"W-W": [0.1] * 6, "W-C": [0.3, 0.4]}), rows_of({"W-W": [0.1] * 6, "W-C": [1.1]})]
    floors: dict[str, Sequence[Measured]] = dict.fromkeys(papertables.FLOORS, full)
    (section,) = reproduction.assemble(table, {"d": {"Full": full, "Less": less}}, {"d": floors}, ())["sections"]
    assert section["counts"] == {
        "d": [{"n_tasks": 2, "n_rows": 2, "n_clips": 0}, {"n_tasks": 1, "n_rows": 1, "n_clips": 0}]
    }
    assert "W-C" not in reproduction_page._counted(section)
    assert reproduction_page._counted(section).endswith("d: 2 / 1 users; 2 / 1 rows.")
    pairs = {(p["label"], p["against"]): p["differences"] for p in section["paired"]}
    assert pairs.keys() == {("Full", "bias"), ("Full", "als"), ("Less", "bias"), ("Less", "als"), ("Less", "Full")}
    (difference, low, high), ndcg = pairs["Less", "Full"]
    assert difference == pytest.approx((0.1 + 0 + 0.5) / 3)
    assert low == pytest.approx(0)  # the task of .4 alone; that of .2 and .6, one user in both splits: .3
    assert high == pytest.approx(0.3)
    assert ndcg is None, "too few rows for a clip"
    assert pairs["Full", "bias"][0] == [0, 0, 0]


def test_table_for_a_readme(done: Path) -> None:
    text = (done / "tiny-1.md").read_text()
    line = next(row for row in text.splitlines() if row.startswith("| MeLU |"))
    assert line.startswith("| MeLU | 1.451 ± 0.022 |")
    assert next(row for row in text.splitlines() if row.startswith("| Rival |")).startswith(
        "| Rival | **1.210 ± 0.029** | – |"
    )
    grids = [[row.count("|") for row in part.splitlines()] for part in text.split("\n\n") if part.startswith("| ")]
    assert len(grids) == 2
    assert all(len(set(counts)) == 1 for counts in grids)
    for other in ("als", "MeLU"):
        assert re.search(rf"\| MeLU, 1 step − {other} \| [−+]\d\.\d{{4}} \[", text)
    assert re.search(r"^By split seed, of ours\. synthetic: \d+ / \d+ users\.$", text, re.MULTILINE)


def test_page_has_its_pictures(done: Path) -> None:
    page = (done / "tiny-1.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 1 + len(TINY.ours)
    for svg in pictures:
        ElementTree.fromstring(svg)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert page.count("Silhouette of the groups in all 8 dimensions") == len(TINY.ours)
    words = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(nan|none)\b", re.sub(r"<[^>]*>", " ", words), re.IGNORECASE)


def test_second_call_trains_what_is_missing_alone(
    done: Path, small: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A run that was killed after a checkpoint is gone on with; one that left a config.yaml alone begins again."""
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = (out / "tiny-1.json").read_text()
    begun, started = out / "runs/synthetic-paml-transfer-1", out / "runs/synthetic-paml-melu-0"
    (begun / "run.json").unlink()
    (begun / "measured.arrow").unlink()
    for file in [f for f in started.rglob("*") if f.is_file() and f.name != "config.yaml"]:
        file.unlink()
    shutil.rmtree(started / "checkpoints")
    (out / "tiny-1.json").unlink()
    called = []
    real = train.main
    monkeypatch.setattr(train, "main", lambda words: (called.append(words[words.index("--run") + 1]), real(words))[1])
    assert cli.main(argv(small, out)) == 0
    assert {Path(run) for run in called} == {begun, started}
    said = capsys.readouterr().out
    assert "6 runs, 4 finished, 2 to train" in said
    assert re.search(r"\[2/2, 1 left, about \d+ min\] Transfer on synthetic, split 1", said)
    after = json.loads((out / "tiny-1.json").read_text())
    assert after == json.loads(before)


def test_runs_that_are_not_what_is_asked_for(done: Path, small: Location, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    run = out / "runs/synthetic-paml-transfer-1"

    def refused(*more: str) -> str:
        message = failing(capsys, argv(small, out, *more))
        assert str(run) in message or "transfer-0" in message, message
        return message

    assert "trained with method_options.tuned = 'all', not 'decision'" in refused("transfer:tuned=decision")
    assert "trained with train.epochs = 1, not 2" in failing(capsys, [*argv(small, out), "--epochs", "2"])
    (run / "measured.arrow").write_bytes(b"nothing")
    assert "jobs.evaluate --run" in refused()
    (run / "measured.arrow").unlink()
    assert "is missing" in refused()
    (run / "run.json").write_text("{")
    assert "not readable as JSON" in refused()
    summary = json.loads((done / run.relative_to(out) / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**summary, "split_hash": "another"}))
    assert "was trained on another split" in refused()
    (run / "config.yaml").unlink()
    assert "holds other things" in refused()
    assert (done / "tiny-1.json").read_bytes() == (out / "tiny-1.json").read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["palm-2"], ["unknown table or study 'palm-2'", "did you mean paml-2?"]),
        ([], ["TABLE"]),
        (["tiny-1"], ["tiny-1 needs synthetic", "jobs.prepare synthetic", "--data synthetic=DATASET"]),
        (["tiny-1", "--data", "HERE"], ["is not NAME=DATASET"]),
        (["tiny-1", "--data", "syntetic=HERE"], ["no data set 'syntetic'", "did you mean synthetic?"]),
        (["tiny-1", "--data", "synthetic=HERE", "synthetic=x"], ["gives synthetic twice"]),
        (["tiny-1", "--data", "synthetic=none"], ["has no data set left"]),
        (["tiny-1", "--data", "synthetic=nowhere"], ["nowhere: no dataset here"]),
        (
            ["paml-3", "--data", "movielens-1m=HERE", "--methods", "melu"],
            ["holds synthetic", "jobs.prepare movielens-1m"],
        ),
        (["tiny-1", "--data", "synthetic=HERE", "--methods", "mleu"], ["--methods mleu", "did you mean melu?"]),
        (["tiny-1", "--data", "synthetic=HERE", "--seeds", "0"], ["--seeds must be at least 1"]),
        (["tiny-1", "--data", "synthetic=HERE", "--set", "hiden=3"], ["no method here has --hiden", "mean hidden?"]),
        (["tiny-1", "--data", "synthetic=HERE", "--set", "mleu:lr=1"], ["no run of 'mleu'", "did you mean melu?"]),
        (["tiny-1", "--data", "synthetic=HERE", "--set", "split-seed=3"], ["the command sets --split-seed itself"]),
        (["tiny-1", "--data", "synthetic=HERE", "--set", "=3"], ["is not [WHERE:]FLAG[=VALUE]"]),
        (["tiny-1", "--data", "synthetic=HERE", "--set", "melu:tuned=all"], ["train melu", "--tuned"]),
        (["tiny-1", "--data", "synthetic=HERE", "--set", "steps=many"], ["--steps", "invalid int value: 'many'"]),
    ],
)
def test_misuse_is_one_sentence(
    words: list[str], says: list[str], small: Location, tmp_path: Path, capsys: Any
) -> None:
    given = [w.replace("HERE", str(small)) for w in words]
    message = failing(capsys, ["reproduce", *given, *(["--out", str(tmp_path / "out")] if words else [])])
    assert [s for s in says if s not in message] == [], message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", [t for t in TABLES.values() if t is not TINY], ids=lambda t: t.name)
def test_papers_rows_fit_their_tables(table: PaperTable) -> None:
    for section in table.sections:
        columns = table.columns_of(section)
        tables = [c.table for c in columns]
        paper = [name for name in tables if name] or tables
        for label, cells in section.rows().items():
            assert len(cells) == len(paper), label
            for name in set(paper):
                of = [bool(cell) for cell, its in zip(cells, tables, strict=False) if its == name]
                assert all(of) or (name and not any(of)), f"{label}: {name}"
            assert any(cells), label
    labels = {label for section in table.sections for label in section.rows()}
    assert len({o.label for o in table.ours}) == len(table.ours)
    mine = {o.label: o for o in table.ours}
    ablations = {label for label, o in mine.items() if o.against in (("MAMO",), ("CMML-FiLM",))}
    if table.protocol == "cmml-user":
        ablations |= {label for label in mine if label.endswith(", ids") or label.startswith("CMML-")}
    ablations |= {label for label in mine if label.endswith(", fine-tuned")}
    assert mine.keys() - labels <= {"PAML"} | ablations
    assert labels - mine.keys() <= set(table.floors.values())
    assert {other for o in table.ours for other in o.against} <= mine.keys()


def test_papers_numbers() -> None:
    """A few by hand, and PAML's own contradiction: Table 3's REG row is Table 4's γ = 1e-2 with the p of 1e-3."""
    assert printed("1.210*± 0.029") == Printed(1.21, 0.029, True)
    assert printed("") is None
    with pytest.raises(ValueError, match="'1,2' is not a number"):
        printed("1,2")
    gamma = TABLES["paml-4"].sections[0].rows()
    reg = TABLES["paml-3"].sections[0].rows()["REG-PAML"]
    assert [p.mean for p in reg if p] == [1.194, 1.236, 0.312]
    third, second = gamma["REG-PAML (γ = 1e-3)"], gamma["REG-PAML (γ = 1e-2)"]
    assert [p.mean for p in second[:2] if p] == [p.mean for p in reg[:2] if p]
    assert third[2] == reg[2]
    hml = [s.rows() for s in TABLES["hml-2"].sections[:3]]
    lower = [r["HML"][c] for r in hml for c in (2, 5) if r["HML"][c].mean < max(r[m][c].mean for m in r)]  # type: ignore[union-attr]
    assert len(lower) == 3
    mamo = {s.cohort: s.rows() for s in TABLES["mamo-1"].sections}
    printed_of = {name: [p.mean for p in row if p] for name, row in mamo["C-W"].items()}
    assert printed_of["MAMO"] == [0.8967, 0.8799, 1.6217, 0.8565]
    assert printed_of["MeLU"] == [0.7884, 0.8810, 1.8701, 0.8527]
    assert [r["s²Meta"][0] for r in mamo.values() if r] == [Printed(p) for p in (0.7567, 0.8860, 0.8443, 0.9130)]
    assert [r["Feature-level RUM"][3] for r in mamo.values() if r] == [
        Printed(p) for p in (0.8909, 0.8430, 0.8338, 0.8273)
    ]
    assert mamo["all"] == {}


def test_best_is_lowest_error_and_highest_ndcg() -> None:
    rows = [{"paper": [None, [0.8, None]], "ours": [{"mean": m}, {"mean": -m}]} for m in (3.0, 1.0, 2.0)]
    assert reproduction.best(rows, 0, "mse", "ours") == [1]
    assert reproduction.best(rows, 1, "ndcg@5", "ours") == [1]
    assert reproduction.best(rows, 0, "mse", "paper") == []
    assert reproduction.best(rows, 1, "p", "ours") == []
    assert reproduction_page.interval([0.1, 0.05, 0.2], "ndcg@3") == ("+0.1000 [+0.0500, +0.2000]", True)
    assert not reproduction_page.interval([0.1, 0.05, 0.2], "mse")[1]


def test_silhouette_and_plane_by_hand() -> None:
    """Two pairs on a line, 0 and 1 against 10 and 11: a = 1, b = 10.5 and 9.5."""
    points = np.array([[0.0, 0, 5], [1, 0, 5], [10, 0, 5], [11, 0, 5]])
    group = ["x", "x", "y", "y"]
    assert plane.silhouette(points, group) == pytest.approx((2 * (1 - 1 / 10.5) + 2 * (1 - 1 / 9.5)) / 4)
    assert plane.silhouette(points, ["x"] * 4) is None
    assert plane.silhouette(np.zeros((4, 3)), group) == 0.0
    assert np.allclose(plane.project(points), [[-5.5, 0], [-4.5, 0], [4.5, 0], [5.5, 0]])
    assert plane.project(points[:, :1]).shape == (4, 2)
    spread = plane.project(np.random.default_rng(0).normal(size=(50, 4)) * [1, 9, 3, 1])
    assert pl.DataFrame(spread).std().row(0)[0] > 2 * pl.DataFrame(spread).std().row(0)[1]
