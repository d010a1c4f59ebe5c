"""What `reproduce` keeps, the report and README's part that are made of it, `reproduce all`, and `reproduce which`."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_reproduce import TINY, failing

from distmeta import cli
from distmeta.commands import reproduce_call, reproduce_report, reproduce_results, reproduce_runs, train
from distmeta.commands.reproduce_runs import Call
from distmeta.commands.settings import Setting, flags_of, of_flags, told
from distmeta.errors import RunError
from distmeta.evaluation import papertables, report, resultspage
from distmeta.evaluation.papertables import PREPARE, TABLES, Column, Key, PaperTable, Section
from distmeta.evaluation.studies import STUDIES
from distmeta.evaluation.style import FIRST, LAST
from distmeta.methods import METHODS
from distmeta.process import free_memory
from distmeta.storage import Location

REPO = Path(__file__).parent.parent
TINY_3 = dataclasses.replace(
    TINY,
    name="tiny-3",
    key=(Key(0, 0), Key(0, 1)),
    flags={
        "*": ("--epochs", "1", "--embedding", "4", "--hidden", "8"),
        "melu": ("--hidden", "8", "8"),
        "synthetic": ("--major-over", "1"),
        "synthetic/transfer": ("--lr", "1e-3"),
    },
    seeds=2,
    boxes=False,
    maps=False,
)
ELSEWHERE = PaperTable(
    "tiny-4", "Elsewhere", "paml", (Column("nowhere", "mse", "MSE"),), (Section("", "all"),), TINY.ours, ()
)


@pytest.fixture
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch)


def _only(patch: pytest.MonkeyPatch) -> None:
    """Two tables, of which one has no data here; a run's own report takes longer than its training."""
    for name in reversed([*TABLES]):  # put back the other way round, so that they stand as they stood
        patch.delitem(TABLES, name)
    patch.setitem(TABLES, "tiny-3", TINY_3)
    patch.setitem(TABLES, "tiny-4", ELSEWHERE)
    patch.setitem(papertables.PREPARE, "synthetic", "python -m jobs.prepare synthetic --out data/made")
    patch.setitem(papertables.PREPARE, "nowhere", "python -m jobs.prepare nowhere --out data/nowhere")
    patch.setattr(report, "write", lambda *_: None)


def argv(small: Location, where: Path, *more: str) -> list[str]:
    return ["reproduce", "all", "--data", f"synthetic={small}", "--out", str(where / "out"),
            "--results", str(where / "results"), "--jobs", "1", "--methods", "melu", *more]  # fmt: skip


@pytest.fixture(scope="module")
def done(small: Location, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `reproduce all` of two splits, and its report; copy it before changing it."""
    where = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        _only(patch)
        assert cli.main(argv(small, where, "--set", "melu:lr=1e-3")) == 0
        (where / "README.md").write_text(f"# One\n\n{FIRST}\n{LAST}\n\nafter\n")
        words = ["reproduce", "--report", "--results", str(where / "results")]
        assert cli.main([*words, "--readme", str(where / "README.md")]) == 0
    return where


def test_a_table_knows_its_settings(small: Location) -> None:
    """From the widest to the narrowest; a method takes of `*` what it has; --set comes last."""
    call = Call(1, Location.of("out"), ["melu", "transfer"], [Setting.of("hidden=6", "reproduce", ())], [])
    melu, _, _, transfer = reproduce_runs.plan(TINY_3, {"synthetic": small}, call)
    assert (melu.config.method_options.hidden, melu.config.train.epochs, melu.config.data.major_over) == ((6,), 1, 1)
    assert (melu.config.train.lr, transfer.config.train.lr) == (2e-3, 1e-3)
    plain = dataclasses.replace(call, settings=[])
    assert [r.config.method_options.hidden for r in reproduce_runs.plan(TINY_3, {"synthetic": small}, plain)] == [
        *[(8, 8)] * 3, (8,),
    ]  # fmt: skip
    of = [*of_flags({"b/melu": ("--wide",), "b": ("--no-wide", "--lr", "1"), "*": ("--lr", "2", "--hidden", "8", "8")})]
    assert told(of) == ["lr=2", "hidden=8,8", "b:no-wide", "b:lr=1", "b/melu:wide"]
    assert told([*of, Setting.of("lr=3", "reproduce", ())]) == ["hidden=8,8", "b:no-wide", "b/melu:wide", "lr=3"]


@pytest.mark.parametrize("table", [*TABLES.values(), *STUDIES.values()], ids=lambda t: t.name)
def test_settings_of_the_papers_tables_reach_their_rows(table: Any) -> None:
    """A flag of `*` or a data set that no row has would be dropped without a word, a misspelt key too."""
    methods = {ours.method for ours in table.ours}
    for s in of_flags(table.flags):
        named = set(s.where) - PREPARE.keys()
        assert named <= METHODS.keys(), s.text
        assert any(s.flag.removeprefix("no-") in flags_of(method) for method in named or methods), s.text
    if isinstance(table, PaperTable):
        for key in table.key:
            assert table.columns_of(table.sections[key.section])[key.column].ours


def test_a_run_has_one_config_whoever_asks(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for table in TABLES.values():
        call = Call(1, Location.of(tmp_path), [o.method for o in table.ours], [], [])
        for run in reproduce_runs.plan(table, {name: Location.of(tmp_path / name) for name in table.datasets}, call):
            kept = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, run=""))
            assert found.setdefault(str(run.where), kept) == kept, f"{table.name}: {run.where.name}"


def test_all_passes_over_what_has_no_data(done: Path, capsys: Any) -> None:
    assert {f.name for f in (done / "results").glob("*.json")} == {"tiny-3.json"}
    made = json.loads((done / "results/tiny-3.json").read_text())
    assert made["command"] == (
        "python -m jobs.reproduce tiny-3 --data synthetic=data/made --methods melu --set melu:lr=1e-3"
    )
    assert made["runs"] == sorted(f.stem for f in (done / "results/runs").iterdir())
    assert len(made["runs"]) == 4
    assert "hidden=8" in made["settings"]
    assert made["settings"].endswith("melu:lr=1e-3")
    assert made["versions"].keys() >= {"python", "torch", "ray", "polars", "pyarrow", "numpy", "distmeta"}


def test_what_is_kept_of_a_run(done: Path, small: Location) -> None:
    """Enough to repeat it, no place of this machine, nothing of single users; and it is that run's."""
    name = "synthetic-paml-melu-steps-1-1"
    kept = json.loads((done / f"results/runs/{name}.json").read_text())
    run = done / f"out/runs/{name}"
    summary, evaluation = (json.loads((run / f"{f}.json").read_text()) for f in ("run", "evaluation"))
    assert kept["rows"] == ["tiny-3: MeLU, 1 step"]
    assert (kept["split_hash"], kept["split_seed"], kept["seconds"]) == (
        summary["split_hash"], 1, pytest.approx(summary["seconds"], rel=1e-5),
    )  # fmt: skip
    assert kept["cohorts"]["all"]["mse"] == pytest.approx(evaluation["cohorts"]["all"]["mse"], rel=1e-5)
    assert kept["config"]["method_options"] == {"embedding": 4, "hidden": [8, 8], "steps": 1}
    assert kept["config"]["train"] == {"lr": 0.001, "epochs": 1}
    for file in (done / "results").rglob("*.*"):
        text = file.read_text()
        for place in (str(done), str(small), str(REPO), "location"):
            assert place not in text, f"{file}: {place}"
    assert reproduce_results.short({"a": "/x/y/cold.txt", "b": ["s3://k/d", "1/2 of them"], "c": 0.1234567}) == {
        "a": "cold.txt", "b": ["d", "1/2 of them"], "c": 0.123457,
    }  # fmt: skip


def test_report_says_what_the_tables_say(done: Path) -> None:
    text = (done / "results/report.md").read_text()
    own = (done / "out/tiny-3.md").read_text()
    kept = coarse(text)
    assert [line for line in coarse(own) if line and line not in kept] == []
    page = (done / "results/report.html").read_text()
    for word in ('href="#tiny-3"', 'id="tiny-3"', 'src="tiny-3.svg"', "What is missing"):
        assert word in page or word in text
    assert "tiny-4 (Elsewhere): not made yet; `python -m jobs.reproduce tiny-4` does, with nowhere." in text
    assert "`python -m jobs.reproduce tiny-3 --data synthetic=data/made" in text
    svg = ElementTree.fromstring((done / "results/tiny-3.svg").read_text())
    words = " ".join("".join(svg.itertext()).split())
    assert "MSE, minor" in words
    assert re.search(r"[+−]\d\.\d{4}\b", words), "differences keep their digits"
    assert "minus als, on the same tasks" in words or "minus bias, on the same tasks" in words
    assert not re.search(r"\b(nan|None)\b", re.sub(r"<style>.*?</style>", "", page + text, flags=re.DOTALL))


def coarse(text: str) -> list[str]:
    """Lines without the last digits, which may differ by one after six were kept."""
    return re.sub(r"(\.\d\d)\d+", r"\1", text).splitlines()


def test_readme_has_the_key_numbers(done: Path) -> None:
    text = (done / "README.md").read_text()
    made = json.loads((done / "results/tiny-3.json").read_text())
    (section,) = made["sections"]
    rows = {row["label"]: row for row in section["rows"]}
    assert text.startswith("# One\n\n")
    assert text.endswith(f"{LAST}\n\nafter\n")
    assert "[results/report.md](results/report.md)" in text
    assert "| *synthetic, MSE* |  |  |  |  |" in text
    assert "| *synthetic, MSE, minor* |  |  |  |  |" in text
    ours = rows["MeLU"]["ours"][0]
    assert f"| MeLU | 1.451 ± 0.022 | {ours['mean']:.3f} ± {ours['sd']:.3f} |" in text
    assert "| Rival | 1.210 ± 0.029 | – |" in text
    grids = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert [{row.count("|") for row in grid} for grid in grids] == [{6}]


@pytest.mark.usefixtures("_tables")
def test_rendering_twice_is_the_same_and_a_second_call_too(
    done: Path, small: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained again; a README keeps what stands around; a run's row of another table is not forgotten."""
    where = tmp_path / "copy"
    shutil.copytree(done, where)
    before = contents(where)
    kept = where / "results/runs/synthetic-paml-melu-0.json"
    made = json.loads(kept.read_text())
    kept.write_text(json.dumps({**made, "rows": ["paml-2: MeLU", *made["rows"]], "cores": 77}))
    monkeypatch.setattr(train, "main", lambda _: pytest.fail("trained again"))
    assert cli.main([*argv(small, where), "--set", "melu:lr=1e-3"]) == 0
    words = ["reproduce", "--report", "--results", str(where / "results"), "--readme", str(where / "README.md")]
    assert cli.main(words) == 0
    again = json.loads(kept.read_text())
    assert again["rows"] == ["paml-2: MeLU", "tiny-3: MeLU", "tiny-3: MeLU, 5 steps"]
    assert again["cores"] == 77
    kept.write_text(before[str(kept.relative_to(where))])
    assert contents(where) == before


def contents(where: Path) -> dict[str, str]:
    """Text of the files that are kept, by name."""
    files = [*(where / "results").rglob("*.*"), where / "README.md"]
    return {str(f.relative_to(where)): f.read_text() for f in files}


@pytest.mark.usefixtures("_tables")
def test_killed_in_between(
    done: Path, small: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What was finished is kept before the end; the same command goes on and comes to the same."""
    real, called = train.main, []

    def failing_third(words: list[str]) -> int:
        called.append(words)
        if len(called) == 3:
            raise RunError("killed")
        return real(words)

    monkeypatch.setattr(train, "main", failing_third)
    words = argv(small, tmp_path, "--set", "melu:lr=1e-3")
    assert "killed; the 2 runs before it stand" in failing(capsys, words, 1)
    assert len([*(tmp_path / "results/runs").iterdir()]) == 2
    assert not (tmp_path / "results/tiny-3.json").exists()
    assert cli.main(words) == 0
    assert len(called) == 5
    one, other = (json.loads((w / "results/tiny-3.json").read_text()) for w in (done, tmp_path))
    assert one["sections"] == other["sections"]


@pytest.mark.usefixtures("_tables")
def test_misuse_is_one_sentence(done: Path, small: Location, tmp_path: Path, capsys: Any) -> None:
    results, page = tmp_path / "results", tmp_path / "R.md"
    words = ["reproduce", "--report", "--results", str(results)]
    assert f"{results}: no results here; make some with" in failing(capsys, words)
    shutil.copytree(done / "results", results)
    page.write_text("# nothing\n")
    before = (results / "report.md").read_bytes()
    assert f"R.md: has no place for the results; put the lines `{FIRST}`" in failing(
        capsys, [*words, "--readme", str(page)]
    )
    assert "no such file" in failing(capsys, [*words, "--readme", str(tmp_path / "nowhere.md")])
    file = results / "tiny-3.json"
    made = json.loads(file.read_text())
    for text in ("{", "[]", json.dumps({**made, "format": 0}), json.dumps({**made, "sections": [{}]})):
        file.write_text(text)
        message = failing(capsys, words)
        assert str(file) in message
        assert "delete it and make it again with `python -m jobs.reproduce tiny-3" in message
    assert (results / "report.md").read_bytes() == before, "nothing half written"
    for more, says in (
        (["--report", "tiny-3"], "leave out tiny-3"),
        (["tiny-3", "--readme", "x"], "goes with --report"),
        (["tiny-4", "--data", "nowhere=none"], "tiny-4 has no data set left"),
        (["all", "--data", "synthetic=none"], "no table is left"),
        (["all", "--data", f"synthetic={small}", "--jobs", "-1"], "--jobs must be at least 0"),
        (["--report", "--results", "none"], "give --results DIR"),
        (["which", "--data", "a=b", "c=d"], "give one --data NAME=DATASET"),
        (["which", "--data", f"a={small}", "--methods", "itempop"], "is none that learns users' ratings"),
        (["which", "--data", f"a={small}", "--set", "hiden=3"], "has that flag"),
    ):
        assert says in failing(capsys, ["reproduce", *more])


def test_a_submitted_job_keeps_its_results_where_they_last(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "x"}}))
    assert "--results jobs/results: is relative to" in failing(capsys, ["reproduce", "paml-3", "--out", "/store/out"])


def test_as_many_at_once_as_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmeta.process.cores", lambda: 8)
    room = 5 * reproduce_call.RUN_BYTES + 1
    monkeypatch.setattr("distmeta.process.free_memory", lambda: room)
    assert reproduce_call.at_once(0, None, None) == 5
    assert reproduce_call.at_once(0, None, "2") == 4
    assert reproduce_call.at_once(0, "2", None) == 1
    assert reproduce_call.at_once(3, None, None) == 3
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4 kB\n")
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    meminfo, limit = str(tmp_path / "meminfo"), str(tmp_path / "memory")
    assert free_memory(meminfo, limit) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(meminfo, limit) == 4096
    assert free_memory("nowhere", "nowhere") is None


def test_readme_is_what_the_committed_results_make() -> None:
    results, readme = REPO / "jobs" / "results", REPO / "README.md"
    if not [*results.glob("*.json")]:
        pytest.skip("jobs/results has no tables (python -m jobs.reproduce all --data …)")
    where = Location.of(results)
    parts, missing = reproduce_report.told(where)
    expected = resultspage.short(parts, missing, reproduce_report.way(Location.of(readme), where))
    assert resultspage.marked(readme.read_text()) == expected, (
        "run `python -m jobs.reproduce --report --readme README.md`"
    )
    assert (results / "report.md").read_text() == resultspage.markdown(parts, missing)
    assert sum(f.stat().st_size for f in results.rglob("*") if f.is_file()) < 1.8e6
    for file in results.rglob("*.json"):
        assert not re.search(r'"(/|[a-z0-9]+://)', file.read_text()), f"{file}: a place of the machine that made it"
