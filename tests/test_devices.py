"""Every method's tensors lie where they are computed with: whole runs on a pretended GPU (pretend.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pretend
import pytest
import scenarioworld
import tiny
import torch
from torch import Tensor

from distmeta import tasks
from distmeta.adaptation import lookup
from distmeta.data.loader import Loader
from distmeta.methods import METHODS
from distmeta.parallel import assessment, checkpoint, embeddings, trainer
from distmeta.storage import Location

SMALL = {"batch_size": 64, "width": 8, "embedding": 4, "hidden": (8,), "floors": False}
RESUMED = ("melu", "hml", "mamo", "at-paml")
"""Those that keep more than parameters, and one that does not."""
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    ("hml", {"warm_epochs": 1, "htc": "query", "htc_steps": 1, "own": "all", "learn_rates": False}),
    ("mamo", {"recommender": "dnn", "wide": True, "classes": True}),
    ("at-paml", {"history": True, "warm_up": 1, "first_order": True}),
    ("metasgd", {"tuned": "all", "steps": 2}),
    ("cmml-softm", {"hybrid": "mlp", "encoder": "gru", "hidden_support": 0.3}),
]


def run(out: Location, place: Location, name: str, flags: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    """The parameters of a run, that some methods' stops after an epoch and goes on, and what it predicts of tasks."""
    given = {**SMALL, **flags, **more}
    if name in RESUMED:
        config, dataset, table = tiny.setting(place, name, **given, epochs=1)
        trainer.train(config, out.make_dir(), dataset, place, table, None, lambda _: None)
    config, dataset, table = tiny.setting(place, name, **given, epochs=1 + (name in RESUMED))
    trainer.train(config, out.make_dir(), dataset, place, table, None, lambda _: None)
    found = assessment.assess(config, out, dataset, place, table).method.tasks
    told = found.select(pl.selectors.float()).fill_nan(0).fill_null(0).to_numpy()
    if name == "paml":  # of which a picture is drawn
        assert embeddings.of_users(config, out, dataset, place, table)
    newest = checkpoint.newest(out)
    assert newest
    return {**checkpoint.load(out, newest, "params"), "told": torch.from_numpy(told.copy())}


def same(tmp_path: Path, place: Location, name: str, flags: dict[str, Any]) -> None:
    """The run on a pretended GPU comes to what it comes to on the CPU."""
    here = run(Location.of(tmp_path / "cpu"), place, name, flags)
    with pytest.MonkeyPatch.context() as m, pretend.gpu(m):
        there = run(Location.of(tmp_path / "gpu"), place, name, flags, gpu=1.0)
    for key, value in here.items():
        torch.testing.assert_close(there[key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {flags}: {key}")


def test_whole_runs_of_every_method(suits: Callable[[str], Location], tmp_path: Path) -> None:
    """Trained, resumed, validated, surveyed and measured without a tensor in the wrong place, to what a CPU makes."""
    for i, (name, flags) in enumerate(CASES):
        same(tmp_path / str(i), suits(name), name, flags)


def test_scenarios(tmp_path: Path) -> None:
    scenarioworld.make(tmp_path / "world", themes=False)
    place = Location.of(tmp_path / "world")
    flags = {**scenarioworld.SMALL, "protocol": "cmml-scenario", "pretrained": "als", "pretrained_width": 4}
    same(tmp_path, place, "cmml-film", flags)


def test_a_tensor_in_the_wrong_place_is_found(small: Location, tmp_path: Path) -> None:
    """In the forward pass, in a reverse pass that is written out, and where one is read as an array."""
    out = Location.of(tmp_path / "run")
    for where, name, broken in (
        (lookup, "_scatter", lambda g, index, size: torch.zeros(size, len(g[0])).index_add_(0, index.view(-1), g)),
        (lookup.F, "embedding", lambda index, table: table.cpu()[index]),
        (tasks.TaskBatch, "__len__", lambda batch: len(batch.items.numpy())),
    ):
        with pytest.MonkeyPatch.context() as m, pretend.gpu(m):
            m.setattr(where, name, broken)
            with pytest.raises(pretend.Mixed):
                run(out, small, "melu", {}, gpu=1.0)
    with pytest.MonkeyPatch.context() as m, pretend.gpu(m):
        x, y = torch.ones(3, device="cuda"), torch.ones(3)
        for mixed in (lambda: x + y, lambda: y.add_(x), lambda: torch.cat([x, torch.ones(1)]), lambda: y[x.long()]):
            with pytest.raises(pretend.Mixed):
                mixed()
        assert (x * torch.tensor(2.0)).device == x.device
        assert x.cpu().device == y.device


def test_packed_batches_are_the_batches(small: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy a type gives the tensors that copies one by one give, the loader's own included."""
    monkeypatch.setattr(tasks, "_joined", torch.cat)
    _, dataset, table = tiny.setting(small, "melu")
    loader = Loader(table, dataset, "train", 32)
    for batch in loader.epoch(0):
        leaves: list[list[Tensor]] = [[], []]
        for each, found in zip((batch, tasks.Packed(batch).to(torch.device("cpu"))), leaves, strict=True):
            tasks._each(each, lambda t, found=found: found.append(t) or t)
            assert (len(each), each.epoch, each.seed) == (len(batch), batch.epoch, batch.seed)
        assert len(leaves[0]) == len(leaves[1]) > 9
        for a, b in zip(*leaves, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
