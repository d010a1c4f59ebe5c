"""Invariant 2 for scenarios: what N workers train, validate and evaluate is what one does, also with more workers than
scenarios, streamed, and begun by other numbers of them. Workers are threads (tiny.together); test_ray has processes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scenarioworld as world
import tiny
import torch

from distmeta import cli
from distmeta.data import pools, tasktable
from distmeta.data.loader import read_items
from distmeta.evaluation import evaluate as evaluation
from distmeta.evaluation import lists
from distmeta.evaluation.measured import Measured
from distmeta.exchange import Exchange
from distmeta.parallel import checkpoint, trainer
from distmeta.parallel.update import build_method
from distmeta.storage import Location

OPTIONS: dict[str, Any] = {
    **world.SMALL,
    "protocol": "cmml-scenario",
    "embedding": 4,
    "hidden": (8, 8),
    "hyper": 8,
    "item_ids": True,
    "batch_size": 5,
    "patience": 0,
    "scenario_draws": 2,
}
NUMBERS = ("train_loss", "valid_recall@10", "valid_recall@50")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """Clicks in themes; a row group holds one scenario, so that they can be streamed."""
    where = tmp_path_factory.mktemp("scenarios") / "data"
    world.make(where, themes=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distmeta.data.taskmaker.GROUP_TASKS", 1)
        table = setting(Location.of(where), "cmml-film")[2]
        tasktable.make(Location.of(where), "cmml-scenario", 0, table.options, shards=2)
    assert 1 < table.counts["test"]["tasks"] < table.counts["train"]["tasks"] < 16
    return Location.of(where)


def setting(place: Location, name: str, **flags: Any) -> Any:
    return tiny.setting(place, name, **{k: v for k, v in (OPTIONS | flags).items() if k != "width"})


def trained(where: Path, place: Location, workers: int, epochs: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl after training, or going on, to `epochs`."""
    config, dataset, table = setting(place, "cmml-film", epochs=epochs)
    run = Location.of(where).make_dir()

    def work(exchange: Exchange) -> trainer.Outcome:
        return trainer.train(config, run, dataset, place, table, exchange, lambda _: None)

    for done in tiny.together(workers, work):
        done.result()
    return [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]


def params(where: Path) -> dict[str, torch.Tensor]:
    """Those of the newest checkpoint."""
    run = Location.of(where)
    newest = checkpoint.newest(run)
    assert newest
    return checkpoint.load(run, newest, "params")


def test_any_number_of_workers_trains_and_validates_the_same(
    tmp_path: Path, place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64 1e-9 after 3 epochs: by 2, 3 and 16 workers, more than scenarios; and by 2, then 1, then 3."""
    tiny.in_float64(monkeypatch)
    wanted, whole = trained(tmp_path / "one", place, 1, 3), params(tmp_path / "one")
    assert {w["valid_recall@10"] for w in wanted} - {None}
    for parts in ([(2, 3)], [(3, 3)], [(16, 3)], [(2, 1), (1, 2), (3, 3)]):
        where = tmp_path / str(parts)
        for workers, epochs in parts:
            found = trained(where, place, workers, epochs)
        assert [f[k] for f in found for k in NUMBERS] == pytest.approx(
            [w[k] for w in wanted for k in NUMBERS], abs=1e-9
        )
        for name, value in params(where).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-9, msg=name)


def evaluated(
    place: Location, workers: int, shards: int = 16, memory: int | None = None
) -> list[tuple[Measured, dict[str, Measured]]]:
    """What each worker knows of an untrained method and of the floors."""
    config, dataset, table = setting(place, "cmml-softm")
    table = tasktable.make(place, "cmml-scenario", 0, table.options, shards=shards)
    items = read_items(place, dataset)

    def work(exchange: Exchange) -> tuple[Measured, dict[str, Measured]]:
        method = build_method(config, dataset, items, torch.device("cpu")).double()
        return (
            evaluation.evaluate(method, table, dataset, exchange, memory),
            lists.floors(table, dataset, exchange, memory),
        )

    return [done.result() for done in tiny.together(workers, work)]


def test_any_number_of_workers_evaluates_the_same(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists, the floors, and the traits of as many supports; also within a budget that streams the scenarios."""
    tiny.in_float64(monkeypatch)
    monkeypatch.setattr("distmeta.evaluation.sample.SUPPORTS", (2, 3))
    ((wanted, floors),) = evaluated(place, 1)
    _, dataset, table = setting(place, "cmml-softm")
    whole = pools.estimate(*table.counts["test"].values(), dataset, True)
    for workers, shards, memory in ((2, 16, None), (3, 16, None), (16, 16, None), (1, 2, whole - 1), (2, 2, whole - 1)):
        supports = 2 if memory else 3  # each is a pass over what is streamed
        assert wanted.traits is not None
        drawn = dataclasses.replace(wanted, traits=wanted.traits.filter(pl.col("support") < supports))
        for found, theirs in evaluated(place, workers, shards, memory):
            same(found, drawn)
            for name, floor in floors.items():
                same(theirs[name], floor)


def same(found: Measured, wanted: Measured) -> None:
    """Both frames, to 1e-9; traits are kept as float32."""
    pairs = [(found.tasks, wanted.tasks, 1e-9)]
    assert (found.traits is None) == (wanted.traits is None)
    if found.traits is not None and wanted.traits is not None:
        pairs.append((found.traits, wanted.traits, 1e-6))
    for a, b, tolerance in pairs:
        assert a.schema == b.schema
        for name in a.columns:
            if a[name].dtype.is_float() or a[name].dtype.is_nested():
                assert np.allclose(a[name].to_numpy(), b[name].to_numpy(), rtol=0, atol=tolerance), name
            else:
                assert a[name].equals(b[name]), name


def test_too_few_scenarios_for_a_test_or_a_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One scenario is left by its number of items: it is trained on, and the rest is said."""
    world.make(tmp_path / "data", themes=True)
    flags = {**OPTIONS, "scenario_least": 28, "epochs": 1, "threads": 1}
    words = ["train", "cmml-film", "--data", str(tmp_path / "data"), "--run", str(tmp_path / "run")]
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words += [flag, *map(str, values)]
    status = cli.main(words)
    said = capsys.readouterr()
    assert (status, said.err) == (0, "")
    assert "0 unseen tasks, 0 lists" in said.out
    assert "There was no test task to evaluate on" in (tmp_path / "run" / "report.html").read_text()
    assert "facts" not in json.loads((tmp_path / "run" / "evaluation.json").read_text())
