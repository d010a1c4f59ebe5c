"""Parameter studies: which runs stand behind them, what they come to by hand, the command from end to end."""

from pathlib import Path

import pytest

from distmeta import cli
from distmeta.evaluation import papertables
from distmeta.evaluation.papertables import Ours
from distmeta.evaluation.studies import STUDIES, Panel, Study
from distmeta.storage import Location

TINY = Study(
    name="tiny-fig",
    title="Tiny, Figure 1",
    dataset="synthetic",
    protocol="mamo",
    ours=(Ours("MeLU", "melu"), Ours("One layer", "melu", ("--hidden", "8"))),
    panels=(
        Panel("support", "mamo-support", "support size", ("5", "15"), "more is better."),
        Panel("steps", "steps", "steps", ("0",), "few are enough."),
        Panel("train", "train-share", "share to train on", ("0.5",), "more is better.", same_tasks=False),
    ),
    notes=("A | note.",),
    splits=("train", "test"),
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDIES, "tiny-fig", TINY)
    monkeypatch.setitem(papertables.PREPARE, "synthetic", "python -m jobs.prepare synthetic --out data/made")


def argv(small: Location, out: Path, *more: str) -> list[str]:
    return ["reproduce", "tiny-fig", "--data", f"synthetic={small}", "--seeds", "2", "--out", str(out), "--epochs", "1",
            "--threads", "1", "--set", "embedding=4", "melu:hidden=8,8", *more]  # fmt: skip


@pytest.fixture(scope="module")
def done(small: Location, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study; copy it before changing it."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDIES, "tiny-fig", TINY)
        patch.setitem(papertables.PREPARE, "synthetic", "")
        assert cli.main(argv(small, out)) == 0
    return out


def test_it_runs(done: Path) -> None:
    print((done / "tiny-fig.md").read_text())
    print(sorted(p.name for p in (done / "runs").iterdir()))
