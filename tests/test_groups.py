"""Gradient groups against one plain optimizer a group; untouched ones stay; split over workers; stopped and gone on."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from distmeta import config as config_module
from distmeta.data.loader import Loader
from distmeta.data.schema import Dataset, Field, Label
from distmeta.errors import UserError
from distmeta.exchange import Exchange
from distmeta.parallel import checkpoint, trainer
from distmeta.parallel.update import MetaUpdate, NotFinite
from distmeta.parallel.validation import read_metrics
from distmeta.storage import Location
from distmeta.tasks import TaskBatch

DATASET = Dataset("none", Label("rating", 1, 5), (), (Field("a", "categorical", 2),), 0, 20, 0)
TASKS = {0: [0, 2, 3, 5], 1: [1, 4, 10, 13], 2: [7, 38, 69]}
"""Task ids of each group, as Grouped.group says."""


def fresh(base: type[tiny.Tiny] = tiny.Grouped) -> tiny.Tiny:
    torch.manual_seed(3)
    return base(tiny.TinyOptions(), DATASET, {}).double()


def options(**flags: Any) -> config_module.TrainOptions:
    return config_module.build(config_module.TrainOptions, flags, "test")


def batch(groups: Sequence[int], seed: int) -> TaskBatch:
    """Tasks of these groups, in this order, with random rows in float64."""
    made = tiny.batch(len(groups), seed).to("cpu", torch.float64)
    tasks = torch.tensor([TASKS[g][list(groups[:i]).count(g)] for i, g in enumerate(groups)])
    return replace(made, blocks=tuple(replace(block, task=tasks) for block in made))


def part(whole: TaskBatch, keep: slice) -> TaskBatch:
    (block,) = whole.blocks
    sides = [type(s)(s.item[keep], s.label[keep], s.mask[keep]) for s in (block.support, block.query)]
    mine = type(block)(block.task[keep], {}, *sides)
    return replace(whole, blocks=(mine,) if len(mine.task) else ())


def step(update: MetaUpdate, given: TaskBatch, n: int) -> tuple[float, float]:
    update.local(given)
    return update.apply(given, n)


STEPS = [[0, 1, 0, 2, 1], [0, 1, 0], [1], [2, 1, 2, 1], [0, 0, 0], [0, 1, 2]]


class Plain:
    """The same learning as one can see it: a torch.optim.AdamW a group, which steps when its group was touched."""

    def __init__(self, o: config_module.TrainOptions) -> None:
        self.method, self.clip, self.clipped = fresh(), o.clip, 0
        names = ("own", "shift")
        self.values = {n: p.detach().clone() for n, p in self.method.named_parameters()}
        self.values |= {f"{n}.{k}": self.values[n][k].clone() for n in names for k in range(3)}
        shared = [n for n, _ in self.method.named_parameters() if n not in names]
        self.sets = [shared, *([f"{n}.{k}" for n in names] for k in range(3))]
        self.optimizers = [
            torch.optim.AdamW([self.values[n] for n in s], lr=o.lr, weight_decay=o.weight_decay) for s in self.sets
        ]

    def step(self, given: TaskBatch, lr: float) -> None:
        with torch.no_grad():
            for n, p in self.method.named_parameters():
                own = [self.values[f"{n}.{k}"] for k in range(3)] if n in ("own", "shift") else None
                p.copy_(self.values[n] if own is None else torch.stack(own))
        params = dict(self.method.named_parameters())
        losses, group = self.method.grouped_loss(given)
        for index, (names, optimizer) in enumerate(zip(self.sets, self.optimizers, strict=True)):
            mine = losses if index == 0 else losses[group == index - 1]
            if not len(mine):
                continue
            bare = [n.partition(".")[0] for n in names]
            grads = torch.autograd.grad(mine.mean(), [params[n] for n in bare], retain_graph=True, allow_unused=True)
            for name, n, g in zip(names, bare, grads, strict=True):
                whole = torch.zeros_like(params[n]) if g is None else g
                self.values[name].grad = whole if index == 0 else whole[index - 1].clone()
            every = [self.values[n].grad for n in names]
            norm = torch.cat([g.flatten() for g in every if g is not None]).norm().item()
            if norm > self.clip:
                self.clipped |= 1 << index
                for g in every:
                    assert g is not None
                    g *= self.clip / norm
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()


def test_each_group_learns_as_with_an_optimizer_of_its_own():
    """float64, 1e-12: values and moments; means by own counts, clipped by themselves, decay where touched alone."""
    o = options(lr=0.1, lr_decay=0.2, weight_decay=0.02, clip=0.5, epochs=len(STEPS))
    method, plain = fresh(), Plain(o)
    update = MetaUpdate(method, o, Exchange(), steps=1)
    for n, groups in enumerate(STEPS):
        given = batch(groups, n)
        loss, count = step(update, given, n)
        plain.step(given, update.rate(n))
        assert count == len(groups)
        assert update.counts == [groups.count(k) for k in range(3)]
        assert math.isfinite(loss)
        moments = update.moments()
        assert moments.keys() == {f"{n}.{key}" for n in update.leaves for key in ("step", "exp_avg", "exp_avg_sq")}
        for names, optimizer in zip(plain.sets, plain.optimizers, strict=True):
            for name in names:
                bare, _, k = name.partition(".")
                value = method.get_parameter(bare)
                torch.testing.assert_close(
                    value[int(k)] if k else value, plain.values[name], rtol=1e-12, atol=1e-12, msg=f"{n}: {name}"
                )
                for key, theirs in optimizer.state[plain.values[name]].items():
                    torch.testing.assert_close(
                        moments[f"{name}.{key}"].double(), theirs.double(), rtol=1e-12, atol=1e-12, msg=f"{name}.{key}"
                    )
    assert plain.clipped == 0b1111, "some set was never clipped: the test shows too little"


def state(update: MetaUpdate) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in (*update.leaves.items(), *update.moments().items())}


@pytest.mark.parametrize("before", [[], [[0, 1, 2], [2, 1]]], ids=["new", "moved"])
def test_a_group_without_tasks_stays_bit_for_bit(before):
    """Its value, moments and step count, whatever the decay; all others move."""
    update = MetaUpdate(fresh(), options(lr=0.1, weight_decay=0.5), Exchange(), steps=9)
    for n, groups in enumerate(before):
        step(update, batch(groups, n), n)
    for n, groups in enumerate(([0, 0], [1, 2])):
        was, given = state(update), batch(groups, 10 + n)
        step(update, given, 5 + n)
        now = state(update)
        for name in was:
            k = name.split(".")[1] if name.startswith(("own", "shift")) else None
            moved = not torch.equal(was[name], now[name])
            if k is not None and int(k) not in groups:
                assert not moved, name
            elif not name.startswith("unused.exp_avg"):  # a gradient of zero
                assert moved, name


@pytest.mark.parametrize("cut", [0, 2, 3, 5])
def test_two_workers_with_other_groups_are_one(cut):
    """[2, 0 | 1, 1, 0]: either worker lacks a group that the other has, or all. float64, 1e-12."""
    o = options(lr=0.1, clip=0.5, weight_decay=0.1)
    whole, *workers = (MetaUpdate(fresh(), o, Exchange(), steps=3) for _ in range(3))
    for n in range(3):
        given = batch([2, 0, 1, 1, 0] if n != 1 else [0, 0, 0, 1, 0], n)
        expected = step(whole, given, n)
        halves = [part(given, slice(0, cut)), part(given, slice(cut, 5))]
        for worker, half in zip(workers, halves, strict=True):
            worker.local(half)
        total = workers[0].flat + workers[1].flat
        for worker, half in zip(workers, halves, strict=True):
            worker.flat.copy_(total)
            assert worker.apply(half, n) == pytest.approx(expected, rel=1e-12)
            assert worker.counts == whole.counts
    for worker in workers:
        for name, value in state(whole).items():
            torch.testing.assert_close(state(worker)[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_groups_without_grouped_parameters_change_no_bit():
    class Counting(tiny.Tiny):
        groups = 3

        def grouped_loss(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
            return self.loss(batch), torch.cat([tiny.Grouped.group(block.task) for block in batch])

    o = options(lr=0.1, clip=0.1)
    plain, counting = (MetaUpdate(fresh(c).float(), o, Exchange(), steps=3) for c in (tiny.Tiny, Counting))
    for n in range(3):
        given = batch([0, 1, 2, 0], n).to("cpu", torch.float32)
        assert step(plain, given, n) == step(counting, given, n)
        assert (plain.counts, counting.counts) == ([4], [2, 1, 1])
    for name, value in state(plain).items():
        assert torch.equal(value, state(counting)[name]), name


def test_not_finite_in_one_group_moves_none():
    method = fresh()
    update = MetaUpdate(method, options(lr=0.1, weight_decay=0.1), Exchange(), steps=3)
    was = state(update)
    method.poison = (7, "loss")
    with pytest.raises(NotFinite) as e:
        step(update, batch([0, 2, 1], 0), 0)
    assert e.value.tasks == [7]
    for name, value in state(update).items():
        assert torch.equal(value, was[name]), name


@pytest.mark.parametrize("names", [{"nothing"}, {"offset"}, {"own", "weight"}])
def test_a_method_whose_groups_cannot_be_is_refused(monkeypatch, names):
    monkeypatch.setattr(tiny.Grouped, "grouped", lambda self: frozenset(names))
    wrong = (names - {"own"}).pop()
    with pytest.raises(ValueError, match=rf"tiny: grouped parameter {wrong} is none of shape \[3, \.\.\.\]"):
        MetaUpdate(fresh(), options(), Exchange(), steps=1)


def test_a_task_of_no_group_is_refused(monkeypatch):
    method = fresh(tiny.Tiny)
    update = MetaUpdate(method, options(lr=0.1), Exchange(), steps=1)
    monkeypatch.setattr(method, "grouped_loss", lambda b: (method.loss(b), torch.tensor([0, 1, 0])))
    was = state(update)
    with pytest.raises(ValueError, match=r"tiny: grouped_loss gave a group outside of 0\.\.0"):
        step(update, batch([0, 0, 0], 0), 0)
    assert all(torch.equal(v, was[n]) for n, v in state(update).items())


# ---- whole runs


def run_of(where: Path, small: Location, world: int = 1) -> trainer.Outcome:
    config, dataset, table = tiny.setting(small, "tiny", epochs=2, checkpoint_steps=4)
    run = Location.of(where).make_dir()

    def work(exchange: Exchange) -> trainer.Outcome:
        return trainer.train(config, run, dataset, small, table, exchange, lambda _: None)

    return tiny.together(world, work)[0].result()


def tensors(run: Path) -> dict[str, str]:
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.rglob("*.safetensors")}


class Stop(Exception):
    pass


def test_stopped_between_checkpoints_and_gone_on_with_ends_the_same(tmp_path, small, monkeypatch):
    tiny.register(monkeypatch, tiny.Grouped)
    run_of(tmp_path / "whole", small)
    apply = MetaUpdate.apply

    def stopping(self: MetaUpdate, given: TaskBatch, n: int) -> tuple[float, float]:
        if n == 6:
            raise Stop
        return apply(self, given, n)

    with monkeypatch.context() as m:
        m.setattr(MetaUpdate, "apply", stopping)
        with pytest.raises(Stop):
            run_of(tmp_path / "parts", small)
    run_of(tmp_path / "parts", small)
    assert tensors(tmp_path / "parts") == tensors(tmp_path / "whole")
    run = Location.of(tmp_path / "whole")
    found = checkpoint.newest(run)
    assert found
    moments = checkpoint.load(run, found, "optimizer")
    rare, all_steps = moments["own.2.step"].item(), moments["own.0.step"].item()
    assert 0 < rare < all_steps == moments["weight.step"].item() == found.step


def test_two_workers_train_what_one_trains(tmp_path, small, monkeypatch):
    tiny.register(monkeypatch, tiny.Grouped)
    one = run_of(tmp_path / "one", small)
    two = run_of(tmp_path / "two", small, world=2)
    ends = []
    for name, outcome in (("one", one), ("two", two)):
        run = Location.of(tmp_path / name)
        found = checkpoint.read(run, outcome.steps)
        ends.append({p: checkpoint.load(run, found, p) for p in ("params", "optimizer")})
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_with_another_number_of_groups_is_refused(tmp_path, small, monkeypatch):
    tiny.register(monkeypatch)
    run_of(tmp_path, small)
    tiny.register(monkeypatch, tiny.Grouped)
    with pytest.raises(UserError, match=r"step-\d+: has no tensor own; .*start a new run"):
        run_of(tmp_path, small)


def test_a_group_that_begins_anew_has_no_moments():
    """Its slices then move as with an optimizer that has seen nothing; all others go on."""
    o = options(lr=0.1)
    update, other = (MetaUpdate(fresh(), o, Exchange(), steps=9) for _ in range(2))
    for n, groups in enumerate([[0, 1, 2], [1, 2]]):
        for u in (update, other):
            step(u, batch(groups, n), n)
    before = state(update)
    update.reset(1)
    for name, value in update.moments().items():
        if name.split(".")[1] == "1" and name.startswith(("own", "shift")):
            assert not value.any(), name
        else:
            assert torch.equal(value, before[name]), name
    for u in (update, other):
        step(u, batch([0, 1], 5), 2)
    now, gone_on = state(update), state(other)
    for name in ("own.1", "shift.1"):  # Adam's first step is by the gradient's sign
        moved = (now[name] - before[name]).abs()
        assert ((moved - o.lr).abs() < 1e-6).logical_or(moved == 0).all(), name
        assert moved.any(), name
        assert not torch.equal(now[name], gone_on[name]), name
    for name in ("own.0", "shift.2", "weight"):
        assert torch.equal(now[name], gone_on[name]), name


def test_an_epochs_line_counts_the_tasks_of_each_group(tmp_path, small, monkeypatch):
    """Also where it was stopped within the epoch and gone on with."""
    tiny.register(monkeypatch, tiny.Grouped)
    run_of(tmp_path / "whole", small, world=2)
    apply = MetaUpdate.apply

    def stopping(self: MetaUpdate, given: TaskBatch, n: int) -> tuple[float, float]:
        if n == 6:
            raise Stop
        return apply(self, given, n)

    with monkeypatch.context() as m:
        m.setattr(MetaUpdate, "apply", stopping)
        with pytest.raises(Stop):
            run_of(tmp_path / "parts", small)
    run_of(tmp_path / "parts", small)
    _, dataset, table = tiny.setting(small, "tiny")
    tasks = torch.from_numpy(Loader(table, dataset, "train", 16).tasks()["task"].to_numpy().copy())
    wanted = torch.bincount(tiny.Grouped.group(tasks), minlength=3).tolist()
    for name in ("whole", "parts"):
        assert [row["groups"] for row in read_metrics(Location.of(tmp_path / name))] == [wanted, wanted]
