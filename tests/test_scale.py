"""What keeps millions of items affordable: ids in buckets, totals of one sweep at a time, floors left for later."""

import dataclasses
import json
import weakref
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from distmeta import draws
from distmeta.cli import main
from distmeta.commands.evaluate import terminal_table
from distmeta.data.schema import Dataset, Label
from distmeta.exchange import Exchange
from distmeta.methods.base import Method, fit_closed_form
from distmeta.networks import ITEM_ID, Embedding
from distmeta.parallel import trainer
from distmeta.parallel.assessment import assess
from distmeta.storage import Location
from distmeta.tasks import TaskBatch

DATASET = Dataset("many", Label("rating", 1, 5), (), (), 0, 5000, 0)


def hashed(buckets: int, dataset: Dataset = DATASET) -> Embedding:
    torch.manual_seed(0)
    return Embedding(dataset, {}, 3, False, id_buckets=buckets)


def test_ids_share_a_bounded_table_evenly() -> None:
    """Each item in its bucket by hash, whatever the seed and the process; a checkpoint holds the rows alone."""
    embedding = hashed(64)
    table = embedding.items()[ITEM_ID]
    assert table.weight.shape == (64, 3)
    assert embedding.item_names == [ITEM_ID]
    every = torch.arange(5000)
    x, bags = embedding.item_rows(every)
    bucket = bags[ITEM_ID].index[:, 0]
    assert torch.equal(x, table.weight[bucket])
    counts = np.bincount(bucket, minlength=64)
    assert np.abs(counts - 5000 / 64).max() < 5 * np.sqrt(5000 / 64)
    assert bucket.tolist() == (draws.hashed(np.arange(5000), purpose="item bucket") % np.uint64(64)).tolist()
    few, _ = embedding.item_rows(torch.tensor([4999, 7]))
    assert torch.equal(few, x[[4999, 7]])
    assert not [name for name in embedding.state_dict() if "bucket" in name]


def test_gradients_of_one_bucket_add_up() -> None:
    embedding = hashed(8)
    table = embedding.items()[ITEM_ID]
    items = torch.arange(40)
    x, bags = embedding.item_rows(items)
    x.sum().backward()
    expected = torch.bincount(bags[ITEM_ID].index[:, 0], minlength=8)[:, None].expand(8, 3)
    assert table.weight.grad is not None
    assert torch.equal(table.weight.grad, expected.float())


def test_buckets_say_that_ids_are_a_feature(tmp_path, small) -> None:
    """--id-buckets alone is enough, for methods that take gradient steps and for those that do not; it trains."""
    for method in ("melu", "metacs", "cmml-film"):
        flags: dict[str, Any] = {"id_buckets": 16, "epochs": 1, "embedding": 4, "floors": False}
        config, dataset, table = tiny.setting(small, method, **flags)
        place = Location.of(tmp_path / method).make_dir()
        trainer.train(config, place, dataset, small, table, log=lambda _: None)
        found = assess(
            dataclasses.replace(config, train=dataclasses.replace(config.train, floors=False)),
            place,
            dataset,
            small,
            table,
        )
        assert found.floors == {}
        assert np.isfinite(found.method.tasks["abs_sum"].to_numpy()).all()


class Sums(Method):
    """Counts its rows; keeps nothing, and asks at each sweep whether an earlier one's totals still live."""

    name = "sums"
    sweeps = 3

    def __init__(self) -> None:
        super().__init__(None, DATASET, {})
        self.register_buffer("anything", torch.zeros(1))
        self.seen: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def statistics(self, batch: TaskBatch, sweep: int) -> dict[str, Tensor]:
        if not len(batch):
            self.alive.append(sum(ref() is not None for ref in self.seen))
        return {"n": torch.full((2,), float(len(batch)))}

    def solve(self, statistics: dict[str, Tensor], sweep: int) -> None:
        assert statistics["n"].tolist() == [6.0, 6.0]
        self.seen.append(weakref.ref(statistics["n"]))

    def adapt(self, batch: TaskBatch) -> list[Any]:
        return []

    def predict(self, state: list[Any], batch: TaskBatch) -> list[Tensor]:
        return []


@pytest.mark.parametrize("reduce", [None, Exchange().sums])
def test_totals_of_a_sweep_are_gone_before_the_next(reduce: Any) -> None:
    method = Sums()
    fit_closed_form(method, lambda sweep: [tiny.batch(2, 0), tiny.batch(4, 1)], reduce)
    assert len(method.seen) == 3
    assert method.alive == [0, 0, 0]


def test_floors_are_left_for_later(tmp_path, small, capsys) -> None:
    """train --no-floors measures the method alone; evaluate measures the floors too, and the method the same."""
    run = tmp_path / "run"
    flags = ["--data", small.path, "--run", str(run), "--epochs", "1", "--threads", "1", "--protocol", "melu"]
    assert main(["train", "melu", *flags, "--no-floors"]) == 0
    first = json.loads((run / "evaluation.json").read_text())
    assert (first["floors"], first["paired"]) == ({}, {})
    assert "minus that of" not in terminal_table(first)
    assert main(["evaluate", "--run", str(run)]) == 0
    second = json.loads((run / "evaluation.json").read_text())
    assert {"bias", "als"} <= second["floors"].keys() == second["paired"].keys()
    assert second["cohorts"] == first["cohorts"]
