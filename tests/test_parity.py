"""Invariant 2: the same global batches on N workers give the same update as on one, for every method.

Workers are threads here (tiny.together); tests/test_ray.py has processes.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from distmeta.data.loader import Loader, read_items
from distmeta.exchange import Exchange
from distmeta.methods import METHODS, method_class
from distmeta.methods.base import fit_closed_form
from distmeta.methods.closedform import ClosedForm
from distmeta.parallel import trainer
from distmeta.parallel.preparing import prepare
from distmeta.parallel.progress import Progress
from distmeta.parallel.update import MetaUpdate, build_method
from distmeta.storage import Location
from distmeta.tasks import TaskBatch

LEARNED = [name for name in METHODS if not issubclass(method_class(name), ClosedForm)]


def learned(place: Location, name: str, dtype: torch.dtype, steps: int, exchange: Exchange) -> dict[str, Tensor]:
    """The parameters after `steps` meta-updates of batches of 24 tasks."""
    config, dataset, table = tiny.setting(place, name, batch_size=24)
    method = build_method(config, dataset, read_items(place, dataset), torch.device("cpu"), exchange).to(dtype)
    if method.prepares:
        prepare(method, table, dataset, exchange, Progress(lambda _: None))
    tasks = Loader(table, dataset, "train", 24, rank=exchange.rank, world=exchange.world)
    update = MetaUpdate(method, config.train, exchange, tasks.steps)
    for step, batch in zip(range(steps), tasks.epoch(0), strict=False):
        batch = batch.to("cpu", dtype)
        update.local(batch)
        exchange.sum(update.flat)
        update.apply(batch, step)
    return method.state_dict()


def solved(place: Location, name: str, exchange: Exchange) -> dict[str, Tensor]:
    """The buffers of a method in closed form."""
    config, dataset, table = tiny.setting(place, name)
    method = build_method(config, dataset, read_items(place, dataset), torch.device("cpu"))
    tasks = Loader(table, dataset, "train", 24, rank=exchange.rank, world=exchange.world)
    fit_closed_form(method, lambda sweep: tasks.evaluation(), exchange.sums)
    return method.state_dict()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("world", [2, 3, 16])
@pytest.mark.parametrize("name", METHODS)
def test_same_batches_same_update(suits, name, world):
    """float64 1e-9 over 3 updates; 16 workers have 1 or 2 tasks of a batch each, or none."""
    small = suits(name)
    if name in LEARNED:
        one, many = (
            [f.result() for f in tiny.together(n, lambda e: learned(small, name, torch.float64, 3, e))]
            for n in (1, world)
        )
    else:
        one, many = ([f.result() for f in tiny.together(n, lambda e: solved(small, name, e))] for n in (1, world))
    for found in many:
        assert_same(found, one[0], 1e-9)


@pytest.mark.parametrize("name", LEARNED)
def test_same_batch_same_update_in_float32(suits, name):
    small = suits(name)
    one, two = (tiny.together(n, lambda e: learned(small, name, torch.float32, 1, e))[0].result() for n in (1, 2))
    assert_same(two, one, 1e-5)


@pytest.mark.parametrize("name", LEARNED)
def test_elastic(tmp_path: Path, suits, monkeypatch, name):
    """float64 1e-9 over 20 updates: begun by two workers, gone on with by one, then by three."""
    move = TaskBatch.to
    monkeypatch.setattr(TaskBatch, "to", lambda self, device, dtype=None: move(self, device, torch.float64))
    monkeypatch.setattr(trainer, "build_method", lambda *given: build_method(*given).double())

    small = suits(name)

    def run(where: Path, world: int, epochs: int) -> trainer.Outcome:
        config, dataset, table = tiny.setting(small, name, batch_size=40, epochs=epochs)
        place = Location.of(where).make_dir()

        def work(exchange: Exchange) -> trainer.Outcome:
            return trainer.train(config, place, dataset, small, table, exchange, lambda _: None)

        return tiny.together(world, work)[0].result()

    whole = run(tmp_path / "whole", 1, 5)
    assert whole.steps >= 20
    for world, epochs in ((2, 2), (1, 3), (3, 5)):
        run(tmp_path / "parts", world, epochs)
    assert_same(*(last(tmp_path / n, whole.steps) for n in ("parts", "whole")), 1e-9)


def last(run: Path, step: int) -> dict[str, Any]:
    from distmeta.parallel import checkpoint

    return checkpoint.load(Location.of(run), checkpoint.read(Location.of(run), step), "params")
