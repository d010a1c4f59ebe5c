"""`reproduce which`: its numbers are those of its runs, its advice follows from them, its pictures can be read."""

import itertools
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from distmeta import cli
from distmeta.evaluation import pareto, report, whichcharts, whichpage
from distmeta.storage import Location


def test_pareto_front_by_hand() -> None:
    """(1, 9) is cheapest, (2, 4) beats (3, 4) and (2, 5); (5, 1) is best; (6, 1) costs more for nothing."""
    points = [(5.0, 1.0), (3.0, 4.0), (1.0, 9.0), (2.0, 4.0), (6.0, 1.0), (2.0, 5.0), (2.0, 4.0)]
    assert pareto.front(points) == [2, 3, 6, 0]
    assert pareto.front([]) == []
    costs = zip("abc", (1, 2, 3), (0.6, 0.7, 0.65), strict=True)
    rows = [{"method": name, "train_s": cost, "quality": quality} for name, cost, quality in costs]
    assert whichcharts.front({"metric": "auc", "rows": rows}, whichcharts.COSTS[0]) == ["a", "b"]
    assert whichcharts.front({"metric": "mae", "rows": rows}, whichcharts.COSTS[0]) == ["a"]


def test_labels_never_overlap() -> None:
    assert whichcharts.spread([0.5, 0.52, 0.1], 0.1) == pytest.approx([0.5, 0.6, 0.1])
    assert whichcharts.spread([1.0, 1.0, 0.95], 0.1) == pytest.approx([0.9, 1.0, 0.8])
    crowded = sorted(whichcharts.spread([0.5] * 11, 0.2))
    assert [b - a for a, b in itertools.pairwise(crowded)] == pytest.approx([0.1] * 10)


@pytest.fixture(scope="module")
def which(small: Location, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("which")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda *_: None)
        words = ["reproduce", "which", "--data", f"shop={small}", "--methods", "melu", "bias", "--jobs", "1"]
        words += ["--out", str(where / "out"), "--results", str(where / "results")]
        assert cli.main([*words, "--set", "epochs=1", "embedding=4", "melu:hidden=8", "query-rows=0"]) == 0
    return where / "results"


def test_which_measures_what_it_says(which: Path) -> None:
    made = json.loads((which / "which-shop.json").read_text())
    melu, bias = made["rows"]
    evaluation = json.loads((which.parent / "out/runs/which-shop-cmml-user-melu-0/evaluation.json").read_text())
    assert melu["quality"] == pytest.approx(evaluation["cohorts"]["C-W"]["mae"], rel=1e-5)
    assert bias["quality"] == pytest.approx(evaluation["floors"]["bias"]["C-W"]["mae"], rel=1e-5)
    assert melu["paired"]["als"] == pytest.approx(evaluation["paired"]["als"]["C-W"]["mae"], rel=1e-4)
    assert bias["paired"]["bias"] is bias["to_best"] is None
    lines = [json.loads(x) for x in (which.parent / "out/runs/which-shop-cmml-user-melu-0/metrics.jsonl").open()]
    assert melu["train_s"] == pytest.approx(sum(x["cpu_s"] for x in lines), rel=1e-5)
    assert (melu["gradient"], melu["closed"], melu["export"]) == (True, False, False)
    assert (bias["gradient"], bias["closed"], bias["clicks"]) == (False, True, False)
    assert melu["user_bytes"] > bias["user_bytes"] > 0
    assert bias["model_bytes"] < melu["model_bytes"]
    assert melu["latency_ms"] <= melu["latency_p95_ms"]
    assert bias["peak_mb"] is None
    assert "item-ids" in melu["settings"]
    assert "epochs=12" not in melu["settings"]
    assert made["command"].startswith("python -m jobs.reproduce which --data shop=data/")


def test_which_advises_from_its_numbers(which: Path) -> None:
    """Turned about, the numbers give other advice (costs are set here: measured ones differ from run to run)."""
    made = json.loads((which / "which-shop.json").read_text())
    melu, bias = made["rows"]
    better = {**melu, "quality": bias["quality"] - 0.1, "to_best": [0, 0, 0], "latency_ms": 1.0, "train_s": 3.0}
    worse = {**bias, "to_best": [0.1, 0.05, 0.2], "latency_ms": 2.0, "train_s": 1.0}
    told = dict(whichpage.findings({**made, "rows": [better, worse]}))
    assert told["Best quality"].startswith("melu ")
    assert told["Best of those within 10 % of the cheapest to serve"].startswith("melu ")
    assert told["Best of those within 10 % of the cheapest to train"].startswith("bias ")
    assert told["Best without a gradient at serving"].startswith("bias ")
    assert told["Best of those that can be exported as one graph"] == "none here"
    assert "Not told apart from it" not in told
    alike = dict(whichpage.findings({**made, "rows": [better, {**worse, "to_best": [0.1, -0.05, 0.2]}]}))
    assert "the fastest to serve is bias" in alike["Not told apart from it"]
    assert "| melu |" in whichpage.front_table({**made, "rows": [better, worse]})


def test_pages_of_which(which: Path, tmp_path: Path) -> None:
    text, page = ((which / f"which-shop.{kind}").read_text() for kind in ("md", "html"))
    for name in ("melu", "bias"):
        assert f"| {name} | " in text
        assert f'<th scope="row">{name}</th>' in page
    svg = ElementTree.fromstring((which / "which-shop.svg").read_text())
    words = ["".join(t.itertext()).strip() for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("melu") == words.count("bias") == 3
    assert not [w for w in words if "$" in w or "mathdefault" in w]
    copy = tmp_path / "results"
    shutil.copytree(which, copy)
    assert cli.main(["reproduce", "--report", "--results", str(copy)]) == 0
    assert "Which method for shop?" in (copy / "report.md").read_text()
