"""`reproduce` on scenarios: several printed tables beside ours, intervals over seeds; paper 002's own tables."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import scenarioworld as world

from distmeta import cli
from distmeta.commands.reproduce_runs import Call, Run, plan
from distmeta.evaluation import lists, papertables, report, reproduction_page
from distmeta.evaluation.papertables import RARE, TABLES, Column, Ours, PaperTable, Printed, Section
from distmeta.storage import Location

SMALL = tuple(x for k, v in world.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v)))
THREE = ("recall@10", "recall@20", "recall@50")
TINY = PaperTable(
    name="tiny-2",
    title="Tiny, Table 2",
    protocol="cmml-scenario",
    columns=(),
    sections=(
        Section(
            "Movies",
            "all",
            """
            Rival | 12.5 | 13.50 ± 0.25
            ItemPop | 11.0 |
            Linear | | 14.50 ± 0.50
            """,
            (
                Column("movielens-20m", "recall@10", "Recall@10", table="Table 1", ours=False),
                Column("movielens-20m", "recall@10", "Recall@10", table="Table 2"),
                *(Column("world", m, m.capitalize()) for m in THREE),
            ),
        ),
    ),
    ours=(
        Ours("Linear", "cmml-linear"),
        Ours("Max", "cmml-linear", ("--encoder", "max"), against=("Linear",)),
    ),
    notes=("A `note`.",),
    flags={"world": (*SMALL, "--embedding", "4", "--hidden", "8", "--hyper", "8", "--encoder-hidden", "8")},
    digits=2,
    floors={"support-popularity": "ItemPop", "train-popularity": "train-popularity"},
    judged=("ItemPop", "train-popularity"),
    seeds=2,
    confidence=True,
    percent=True,
)


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a call without --seeds, and where it writes."""
    where = tmp_path_factory.mktemp("cmml")
    world.make(where / "data", themes=False)
    manifest = where / "data" / "dataset.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "extra": {"source": "world"}}))
    words = ["reproduce", "tiny-2", "--data", f"world={where / 'data'}", "--epochs", "1", "--threads", "1"]
    words += ["--jobs", "1", "--results", str(where / "results")]
    return [*words, "--out", str(where / "out")], where / "out"


@pytest.fixture(scope="module")
def done(call: tuple[list[str], Path]) -> Path:
    """A finished reproduction."""
    with pytest.MonkeyPatch.context() as patch:
        _tiny(patch)
        patch.setattr(report, "write", lambda *_: None)
        assert cli.main(call[0]) == 0
    return call[1]


def _tiny(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TABLES, "tiny-2", TINY)
    patch.setitem(papertables.PREPARE, "world", "")


def test_recall_is_that_of_the_runs_with_its_interval_over_seeds(done: Path) -> None:
    found = json.loads((done / "tiny-2.json").read_text())
    (section,) = found["sections"]
    rows = {row["label"]: row for row in section["rows"]}
    assert list(rows) == ["Rival", "ItemPop", "Linear", "Max", "train-popularity"]
    assert {f.name for f in (done / "runs").iterdir()} == {
        f"world-cmml-scenario-cmml-linear-{own}{seed}" for own in ("", "encoder-max-") for seed in (0, 1)
    }
    runs = [done / f"runs/world-cmml-scenario-cmml-linear-{s}" for s in (0, 1)]
    for s, run in enumerate(runs):
        config = (run / "config.yaml").read_text()
        assert f"split_seed: {s}\n" in config
        assert f"  seed: {s}\n" in config
    of = [json.loads((run / "evaluation.json").read_text()) for run in runs]
    assert section["counts"]["world"] == [
        {"n_tasks": e["cohorts"]["all"]["n_tasks"], "n_lists": e["cohorts"]["all"]["n_lists"]} for e in of
    ]
    pairs = {(p["label"], p["against"]): p["differences"] for p in section["paired"]}
    assert list(pairs) == [
        (label, floor) for label in ("Linear", "Max") for floor in TINY.judged + ("Linear",) * (label == "Max")
    ]
    for i, metric in enumerate(THREE, 2):
        mine = [e["cohorts"]["all"][metric] for e in of]
        floor = [e["floors"]["support-popularity"]["all"][metric] for e in of]
        assert rows["Linear"]["ours"][i]["seeds"] == mine
        assert rows["ItemPop"]["ours"][i]["seeds"] == floor
        lists_of = [e["cohorts"]["all"]["n_lists"] for e in of]
        expected = sum((a - b) * n for a, b, n in zip(mine, floor, lists_of, strict=True)) / sum(lists_of)
        difference, low, high = pairs["Linear", "ItemPop"][i]
        assert difference == pytest.approx(expected)
        assert low <= difference <= high
        assert (low < high) == (metric != "recall@50"), "no scenario here has more than 50 items"
    assert all(d[:2] == [None, None] for d in pairs.values()), "nothing of ours stands in the paper's columns"
    assert rows["Rival"]["paper"] == [[12.5, None], [13.5, 0.25], None, None, None]
    text = (done / "tiny-2.md").read_text()
    a, b = (100 * e["cohorts"]["all"]["recall@10"] for e in of)
    half = 1.96 * (abs(a - b) / math.sqrt(2)) / math.sqrt(2)
    assert f"| Linear | – | **14.50 ± 0.50** | **{(a + b) / 2:.2f} ± {half:.2f}** |".replace("**", "") in text.replace(
        "**", ""
    )
    assert "mean ± 1.96 · sd / √2 over 2 seeds of split and training" in text
    difference, low, high = (f"{100 * x:+.2f}".replace("-", "−") for x in pairs["Linear", "ItemPop"][2])
    assert f"| {difference} [{low}, {high}] |" in text.replace("**", "")


class Cells(HTMLParser):
    """How many columns each row of each table spans."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[int]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("th", "td"):
            self.tables[-1][-1] += int(dict(attrs).get("colspan") or 1)


def test_page_says_whose_numbers_and_what_is_not_at_hand(done: Path) -> None:
    """The columns of a data set that was not given have the paper's numbers alone, under a heading that says so."""
    page, text = (done / "tiny-2.html").read_text(), (done / "tiny-2.md").read_text()
    said = "MovieLens-20M is not at hand: its columns have the paper's numbers alone."
    assert said in text
    assert said.replace("'", "&#x27;") in page
    assert "8 ranked lists" not in text
    assert re.search(r"world: \d / \d scenarios; \d+ / \d+ ranked lists\.", text)
    heads = next(line for line in text.splitlines() if line.startswith("|  |"))
    assert heads == (
        "|  | MovieLens-20M, Table 1 (paper) Recall@10 | MovieLens-20M, Table 2 (paper) Recall@10 |"
        " world (ours, other data) Recall@10 | Recall@20 | Recall@50 |"
    )
    assert "<code>note</code>" in page
    reader = Cells()
    reader.feed(page)
    assert [set(rows) for rows in reader.tables] == [{6}, {4}]
    assert "same scenarios" in text
    assert not re.search(r"\b(nan|None)\b", text)


def test_second_call_trains_nothing(
    done: Path, call: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _tiny(monkeypatch)
    before = (done / "tiny-2.json").read_text()
    assert cli.main(call[0]) == 0
    assert "4 runs, 4 finished, 0 to train" in capsys.readouterr().out
    assert (done / "tiny-2.json").read_text() == before
    assert cli.main([*call[0], "--seeds", "0"]) == 2
    assert cli.main(["reproduce", "tiny-2", "--data", "world=none"]) == 2
    assert "tiny-2 has no data set left; give at least one of movielens-20m world" in capsys.readouterr().err


def runs_of(name: str, *methods: str) -> list[Run]:
    """The runs of one seed, as if every data set were at hand."""
    table = TABLES[name]
    places = {dataset: Location.of("nowhere") for dataset in table.datasets}
    chosen = methods or {o.method for o in table.ours}
    return plan(table, places, Call(1, Location.of("out"), [*chosen], [], []))


def test_rows_are_the_switches_that_the_paper_names() -> None:
    """Tables 4 and 9: without a hybrid generator but for SE-MLP and SE-dot, which is the CMML-Linear of Table 6."""
    rows = {(r.dataset, r.label): r for r in runs_of("cmml-4")}
    for dataset in ("movielens-1m", "movielens-20m"):
        options = {label: rows[dataset, label].config.method_options for label in TABLES["cmml-4"].sections[0].rows()}
        assert {label: o.hybrid for label, o in options.items()} == {
            "Non-negative": "none", "PE": "none", "SE": "none", "SE-MLP": "mlp", "SE-dot": "dot",
        }  # fmt: skip
        assert {label for label, o in options.items() if o.positives} == {"Non-negative"}
        assert {label for label, o in options.items() if o.encoder == "mean"} == {"Non-negative", "PE"}
        assert {o.sizes for o in options.values()} == {"scenario"}
    linear = {str(r.where) for name in ("cmml-2", "cmml-5") for r in runs_of(name, "cmml-linear")}
    assert len(linear) == len(TABLES["cmml-2"].datasets) == 4
    assert str(rows["movielens-1m", "SE-dot"].where) in linear
    assert {str(r.where) for r in runs_of("cmml-5")} < {str(r.where) for r in runs_of("cmml-2")}
    wide = [r for r in runs_of("cmml-2") if r.dataset in ("hybrid", RARE[1]) and r.config.method.startswith("cmml-")]
    assert {r.config.method_options.hyper for r in wide} == {128}


def test_switches_and_users_share_the_plain_runs() -> None:
    users, switches = ({r.label: r for r in runs_of(name)} for name in ("cmml-3", "cmml-switches"))
    assert switches["CMML-FiLM"].where == users["CMML-FiLM"].where
    assert len({str(r.where) for r in switches.values()}) == len(switches) == 9
    assert len({str(r.where) for r in users.values()}) == len(users) == 21
    assert {label for label, r in users.items() if r.config.method_options.item_ids} == {
        label for label in users if label.endswith(", ids")
    }
    fifty = Call(1, Location.of("out"), ["melu"], [], ["--max-ratings", "50"])
    (run, _) = plan(TABLES["cmml-3"], {"movielens-1m": Location.of("nowhere")}, fifty)
    assert run.config.data.max_ratings == 50


@pytest.mark.parametrize("name", ["cmml-2", "cmml-4", "cmml-5"])
def test_tables_of_scenarios_are_five_seeds_with_the_floors_of_lists(name: str) -> None:
    table = TABLES[name]
    assert tuple(table.floors) == lists.FLOORS
    assert set(table.judged) == set(table.floors.values())
    assert (table.seeds, table.confidence, table.percent) == (5, True, True)
    assert table.datasets[-1] == "movielens-1m" or set(table.datasets) - {"movielens-1m"} <= set(RARE)


def test_the_paper_s_numbers_and_where_its_tables_repeat_themselves() -> None:
    """What one table prints and another prints again is the same number; and what the notes say of them."""
    movies, taobao, hybrid = (s.rows() for s in TABLES["cmml-2"].sections)
    ablation = TABLES["cmml-4"].sections[0].rows()
    modulated = [s.rows() for s in TABLES["cmml-5"].sections]
    names = {"Linear": "CMML-Linear", "S-LM": "CMML-Sigmoid", "F-LM": "CMML-FiLM", "Soft-M": "CMML-Soft-M"}
    for again, first in zip(modulated, (movies, taobao), strict=True):
        for label, variant in names.items():
            assert again[label][2:] == first[variant][3:5]
            if first[variant][0]:
                assert again[label][:2] == first[variant][:2]
    assert ablation["SE-dot"][3:] == movies["CMML-Linear"][3:]
    assert ablation["SE-dot"][:2] == modulated[0]["Linear"][:2]
    assert movies["s²Meta"][3] == Printed(47.56, 0.02)
    assert hybrid["CMML-Soft-M"] == [
        Printed(40.47), Printed(59.94), Printed(73.76), Printed(40.75, 0.08), Printed(60.02, 0.1), Printed(73.89, 0.09)
    ]  # fmt: skip
    means = {
        name: [[c.mean for c in row[3:] if c] for label, row in rows.items() if label.startswith("CMML")]
        for name, rows in (("movies", movies), ("taobao", taobao), ("hybrid", hybrid))
    }
    rival = {n: [c.mean for c in r["s²Meta"][3:] if c] for n, r in zip(means, (movies, taobao, hybrid), strict=True)}
    best = {name: [max(column) for column in zip(*rows, strict=True)] for name, rows in means.items()}
    assert all(a < b for a, b in zip(best["movies"], rival["movies"], strict=True))
    for name in ("taobao", "hybrid"):
        assert all(a > b for a, b in zip(best[name], rival[name], strict=True))
    users = TABLES["cmml-3"].sections[0].rows()
    assert [c.mean for c in users["CMML-FiLM"] if c] == [0.727, 0.771, 0.745, 0.760]
    assert [c.mean for c in users["DCN"] if c] == [0.869, 0.693, 0.907, 0.665]


def test_what_stands_after_plus_minus_moves_below_where_a_row_is_long() -> None:
    assert reproduction_page._narrow("1.00 ± 0.10", tight=True) == "1.00<small>± 0.10</small>"
    assert reproduction_page._narrow("1.00 ± 0.10", tight=False) == "1.00 ± 0.10"
    assert reproduction_page._narrow("+1.00 [+0.10, +2.00]", tight=True) == "+1.00<small>[+0.10, +2.00]</small>"
