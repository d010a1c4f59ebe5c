"""--plateau: a step size that follows the validation error."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from distmeta import config as config_module
from distmeta.data.schema import Dataset, Field, Label
from distmeta.exchange import Exchange
from distmeta.parallel import standing, trainer
from distmeta.parallel.update import MetaUpdate
from distmeta.parallel.validation import read_metrics
from distmeta.storage import Location


class Stop(Exception):
    pass


def update_of(**flags: Any) -> MetaUpdate:
    method = tiny.Tiny(
        tiny.TinyOptions(), Dataset("none", Label("rating", 1, 5), (), (Field("a", "numeric"),), 0, 9, 0), {}
    )
    return MetaUpdate(method, config_module.build(config_module.TrainOptions, flags, "test"), Exchange(), steps=1)


def rates(run: Path) -> list[float]:
    return [row["lr"] for row in read_metrics(Location.of(run))]


def test_rate_follows_the_validation_error_down_to_the_least():
    """As torch's ReduceLROnPlateau has it (threshold 0), along a cosine as well."""
    errors = [0.9, 0.8, 0.8, 0.85, 0.81, 0.79, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
    flags: dict[str, Any] = {"lr": 0.1, "plateau": 0.2, "plateau_patience": 1, "lr_least": 1e-3, "epochs": 13}
    theirs = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        theirs, factor=0.2, patience=1, threshold=0, min_lr=1e-3, eps=0
    )
    update = update_of(**flags)
    both = update_of(**flags, lr_decay=0.5)
    state, found = standing.Standing(), []
    for step, error in enumerate(errors):
        state.judge(error, step, 1)
        schedule.step(error)
        state = state.next()
        update.shrunk = both.shrunk = state.shrunk
        found.append(update.rate(step))
        assert found[-1] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        cosine = 0.1 * (0.5 + 0.25 * (1 + math.cos(math.pi * step / 13)))
        assert both.rate(step) == pytest.approx(max(cosine * 0.2**state.shrunk, 1e-3), rel=1e-12)
    # waits for two epochs in a row without a better error: .8 .85, not .81 alone, then .8 .8 and so on to the least
    assert found == pytest.approx([0.1] * 3 + [0.02] * 4 + [0.004] * 2 + [0.001] * 4)
    assert update_of(lr=1e-4, lr_least=1e-2).rate(0) == 1e-4


def test_a_plateau_ends_the_same_when_stopped_and_gone_on_with(tmp_path, small, monkeypatch):
    """Every epoch but the first comes without a better error: the lines' rates, and the bits after resuming."""
    tiny.register(monkeypatch)
    made = iter([0.5, *[0.6] * 40])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(made), 1.0))
    flags = {"epochs": 6, "patience": 0, "lr": 0.01, "plateau": 0.5, "plateau_patience": 1}
    tiny.run_of(tmp_path / "whole", small, **flags)
    assert rates(tmp_path / "whole") == pytest.approx([0.01] * 3 + [0.005] * 2 + [0.0025])
    made = iter([0.5, *[0.6] * 40])
    apply = MetaUpdate.apply

    def stopping(self: MetaUpdate, batch: Any, step: int) -> tuple[float, float]:
        if step == 31:  # in the fourth epoch, whose rate is a smaller one
            raise Stop
        return apply(self, batch, step)

    with monkeypatch.context() as m:
        m.setattr(MetaUpdate, "apply", stopping)
        with pytest.raises(Stop):
            tiny.run_of(tmp_path / "parts", small, **flags, checkpoint_steps=4)
    tiny.run_of(tmp_path / "parts", small, **flags, checkpoint_steps=4)
    assert rates(tmp_path / "parts") == rates(tmp_path / "whole")
    newest = {k: v for k, v in tiny.digests(tmp_path / "whole").items() if "step-000000054" in k}
    assert newest
    assert newest.items() <= tiny.digests(tmp_path / "parts").items()
