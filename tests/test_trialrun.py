"""A trial: what it trains on, what it tells, and how it ends."""

import math
from pathlib import Path
from typing import Any

import pytest
import scenarioworld
import tiny

from distmeta import config as config_module
from distmeta.data.loader import Loader, read_items
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError
from distmeta.parallel import trainer, trialrun
from distmeta.parallel.stored import Stored
from distmeta.storage import Location

FLAGS = {"epochs": 2, "patience": 0}


def stored_of(place: Location, memory: int = 1 << 30, **flags: Any) -> tuple[Any, Stored, TaskTable]:
    config, dataset, table = tiny.setting(place, "melu", **FLAGS, **flags)
    return config, Stored.read(table, dataset, place, memory), table


def asked(config: Any, run: Path, **more: Any) -> dict[str, Any]:
    plain = config_module.plain(config)
    plain["train"]["run"] = str(run)
    return {"run": run.name, "config": plain, "metric": "mae", "seeds": 1, **more}


def test_a_trial_trains_what_train_trains_from_the_files(tmp_path, small, monkeypatch):
    config, stored, table = stored_of(small)
    (tmp_path / "plain").mkdir()
    done = trainer.train(config, Location.of(tmp_path / "plain"), stored.dataset, small, table, log=lambda _: None)
    monkeypatch.setattr(TaskTable, "read", lambda *_: pytest.fail("read from the files"))
    told: list[dict[str, Any]] = []
    trialrun._train(asked(config, tmp_path / "trial"), stored, told.append)
    assert tiny.digests(tmp_path / "trial") == tiny.digests(tmp_path / "plain")
    assert [t["epoch"] for t in told] == [1, 2, 2]
    assert told[-1]["over"] and told[-1][trialrun.OBJECTIVE] == done.best_mae
