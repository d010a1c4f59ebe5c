"""Scenarios through the commands: a method that scores items by one number each is trained, resumed and evaluated."""

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import scenarioworld as world
import torch
from torch import Tensor, nn

from distmeta.commands.evaluate import main as evaluate
from distmeta.commands.train import main as train
from distmeta.data import tasktable
from distmeta.data.protocols import scenario as protocol
from distmeta.data.schema import Dataset
from distmeta.evaluation import lists
from distmeta.methods import METHODS, Entry
from distmeta.methods.base import Method
from distmeta.storage import Location
from distmeta.tasks import TaskBatch


@dataclass(frozen=True)
class Options:
    """None."""


class Popular(Method):
    """An item's score is a parameter, learned by the hinge loss (CMML Eq. 4) of pairs that stand side by side."""

    name = "popular"

    def __init__(self, options: Any, dataset: Dataset, items: Any) -> None:
        super().__init__(options, dataset, items)
        assert dataset.label.kind == "click"
        self.score = nn.Parameter(torch.zeros(dataset.items))

    def adapt(self, batch: TaskBatch) -> list[None]:
        return [None for _ in batch]

    def predict(self, state: list[None], batch: TaskBatch) -> list[Tensor]:
        return [self.score[batch.items][block.query.item] for block in batch]

    def loss(self, batch: TaskBatch) -> Tensor:
        found = [(1 - s[:, 0::2] + s[:, 1::2]).clamp_min(0).mean(1) for s in self.predict([], batch)]
        return torch.cat(found) if found else self.score.new_zeros(0)


@pytest.fixture
def popular(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("distmeta.methods.popular")
    module.Popular = Popular  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distmeta.methods.popular", module)
    monkeypatch.setitem(METHODS, "popular", Entry("popular", "Popular", Options, {"lr": 0.02}, scenarios=True))
    return "popular"


def test_a_scenario_method_is_trained_resumed_and_evaluated(
    popular: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It validates by Recall, comes to the same numbers when stopped and resumed, and is compared with the floors."""
    world.make(tmp_path / "data", themes=False)
    flags = [x for k, v in world.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    flags += ["--data", str(tmp_path / "data"), "--protocol", "cmml-scenario", "--batch-size", "3", "--patience", "0"]
    assert train([popular, *flags, "--run", str(tmp_path / "whole"), "--epochs", "4"]) == 0
    said = capsys.readouterr().out
    assert "valid recall@10 ." in said
    assert "Recall@10 minus that of" in said
    assert train([popular, *flags, "--run", str(tmp_path / "parts"), "--epochs", "2"]) == 0
    assert train([popular, "--run", str(tmp_path / "parts"), "--resume", "--epochs", "4"]) == 0
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    for a, b in zip(*lines, strict=True):
        for key in ("epoch", "step", "train_loss", "valid_recall@10", "valid_recall@50"):
            assert a[key] == b[key]
        assert a["valid_mae"] is None
    assert lines[0][-1]["train_loss"] < lines[0][0]["train_loss"] < 1.001
    found = [json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("whole", "parts")]
    assert found[0] == found[1]
    assert tuple(found[0]["floors"]) == lists.FLOORS
    assert found[0]["cohorts"]["all"]["n_lists"] == 7 * found[0]["cohorts"]["all"]["n_tasks"]
    assert "Recall@10" in (tmp_path / "whole" / "report.html").read_text()
    capsys.readouterr()
    assert evaluate(["--run", str(tmp_path / "whole"), str(tmp_path / "parts")]) == 0
    assert "all 2 runs together" in capsys.readouterr().out


def test_scenarios_that_leave_no_support_or_nobody_to_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every second scenario all users are kept apart: no support, predicted all the same; of the others nobody is:
    no lists, left out and told. No scenario has 50 candidates: Recall@50 is 1 for all."""
    world.make(tmp_path / "data", themes=False)
    monkeypatch.setattr(protocol, "_apart", lambda rows, plan: (rows["scenario"] % 2 == 0).to_numpy())
    options = {**world.SMALL, "scenario_apart": True}
    table = tasktable.make(Location.of(tmp_path / "data"), "cmml-scenario", 0, options)
    assert table.dropped[protocol.UNASKED] > 0
    tested = world.stored(table, "test")
    assert tested
    assert not any(protocol.SUPPORT in task["role"] for task in tested.values())
    flags = [x for k, v in world.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    flags += ["--data", str(tmp_path / "data"), "--protocol", "cmml-scenario", "--scenario-apart", "--epochs", "1"]
    sizes = ["--embedding", "4", "--hidden", "8", "--hyper", "8", "--encoder-hidden", "8"]
    assert train(["cmml-linear", *flags, *sizes, "--run", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    everyone = found["cohorts"]["all"]
    assert everyone["n_tasks"] == len(tested)
    asked = [{u for u, role in zip(t["user"], t["role"], strict=True) if role == 1} for t in tested.values()]
    assert everyone["n_lists"] == sum(map(len, asked))
    assert 0 < everyone["recall@10"] < 1 == everyone["recall@50"]
