"""One suite for every method: what methods/base.py promises to the trainer, the evaluation and serving."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import scenarioworld
import tiny
import torch
from torch import Tensor

from distmeta.data import tasktable
from distmeta.data.loader import Loader, read_items
from distmeta.data.schema import Dataset
from distmeta.exchange import Exchange
from distmeta.memory.base import Shared
from distmeta.methods import METHODS, method_class
from distmeta.methods.base import Method, fit_closed_form
from distmeta.parallel.preparing import prepare
from distmeta.parallel.progress import Progress
from distmeta.storage import Location
from distmeta.tasks import Rows, TaskBatch, TaskBlock

SMALL = {"embedding": 8, "hidden": (16, 16), "width": 16}


STEADY = ("constant", "itemmean", "itempop", "widedeep", "deepfm", "dcn", "conet")
"""Those that do not adapt, by definition."""


class World:
    """The small synthetic dataset, its tasks, and fresh methods on it."""

    def __init__(self, where: Location) -> None:
        dataset = Dataset.open(where)
        self.items = read_items(where, dataset)
        if dataset.name == "world":
            self.table = tasktable.make(where, "cmml-scenario", 0, scenarioworld.SMALL)
        else:
            self.table = tasktable.make(where, "cmml-user", 0, {"max_ratings": 100})
        self.dataset = self.table.seen(dataset)

    def method(self, name: str, seed: int = 0) -> Method:
        torch.manual_seed(seed)
        options = METHODS[name].options()
        small = {k: v for k, v in SMALL.items() if hasattr(options, k)} | tiny.SMALLER.get(name, {})
        made = method_class(name)(replace(options, **small), self.dataset, self.items)
        made.shared = Shared.of(made.memories())
        return made

    def prepared(self, name: str) -> Method:
        m = self.method(name)
        if m.prepares:
            prepare(m, self.table, self.dataset, Exchange(), Progress(lambda _: None))
        return m

    def loader(self, split: str, batch_size: int = 32) -> Loader:
        return Loader(self.table, self.dataset, split, batch_size)

    def learned(self, name: str, epochs: int = 6) -> Method:
        """A method after a short training: enough to be better than a constant."""
        m, loader = self.prepared(name), self.loader("train")
        if m.sweeps:
            fit_closed_form(m, lambda sweep: loader.epoch(0))
            return m
        optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
        for epoch in range(epochs):
            for batch in loader.epoch(epoch):
                optimizer.zero_grad()
                m.loss(batch).mean().backward()
                m.write()
                optimizer.step()
        return m

    def test_batch(self) -> TaskBatch:
        return next(iter(self.loader("test", 24).evaluation()))


@pytest.fixture(scope="module", params=list(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def world(suits: Callable[[str], Location], name: str) -> World:
    return World(suits(name))


@pytest.fixture(scope="module")
def learned(world: World, name: str) -> Method:
    return world.learned(name)


def scores(m: Method, batch: TaskBatch) -> list[Tensor]:
    return m.predict(m.adapt(batch), batch)


def by_task(batch: TaskBatch, values: list[Tensor]) -> dict[int, Tensor]:
    """Scores of real query rows by task id."""
    return {
        int(task): value[b, block.query.mask[b]]
        for block, value in zip(batch, values, strict=True)
        for b, task in enumerate(block.task)
    }


def cut(rows: Rows, b: int, keep: int | None = None) -> Rows:
    n = int(rows.mask[b].sum()) if keep is None else keep
    user = None if rows.user is None else rows.user[b : b + 1, :n]
    return Rows(rows.item[b : b + 1, :n], rows.label[b : b + 1, :n], rows.mask[b : b + 1, :n], user)


def alone(batch: TaskBatch, support: int | None = None) -> Iterator[TaskBatch]:
    """Every task as a batch of its own without padding, with `support` support rows if given."""
    for block in batch:
        for b in range(len(block.task)):
            one = torch.tensor([b])
            user = {k: v.take(one) for k, v in block.user.items()}
            own = TaskBlock(block.task[one], user, cut(block.support, b, support), cut(block.query, b))
            yield replace(batch, blocks=(own,))


def same(a: dict[int, Tensor], b: dict[int, Tensor]) -> None:
    assert a.keys() == b.keys()
    for task in a:
        torch.testing.assert_close(a[task], b[task], rtol=2e-5, atol=2e-5)


def test_scores_have_the_shape_of_the_query_and_are_finite(world: World, learned: Method):
    batch = world.test_batch()
    for block, value in zip(batch, scores(learned, batch), strict=True):
        assert value.shape == block.query.item.shape
        assert bool(value[block.query.mask].isfinite().all())
        assert not value.requires_grad


def test_nothing_of_the_query_but_its_items_reaches_the_scores(world: World, learned: Method):
    """adapt() sees no query at all; predict() sees no label."""
    batch = world.test_batch()

    def blind(block: TaskBlock) -> TaskBlock:
        return replace(block, query=replace(block.query, label=torch.full_like(block.query.label, float("nan"))))

    def other(block: TaskBlock) -> TaskBlock:
        return replace(blind(block), query=replace(block.query, item=torch.zeros_like(block.query.item)))

    expected = scores(learned, batch)
    hidden = replace(batch, blocks=tuple(blind(b) for b in batch))
    state = learned.adapt(replace(batch, blocks=tuple(other(b) for b in batch)))
    for a, b in zip(expected, learned.predict(state, hidden), strict=True):
        torch.testing.assert_close(a, b)


def test_a_task_s_scores_depend_neither_on_its_batch_nor_on_padding(world: World, learned: Method):
    batch = world.test_batch()
    apart: dict[int, Tensor] = {}
    for one in alone(batch):
        apart |= by_task(one, scores(learned, one))
    same(by_task(batch, scores(learned, batch)), apart)


def test_the_support_matters_and_an_empty_one_is_answered(world: World, learned: Method, name: str):
    batch = world.test_batch()
    full = by_task(batch, scores(learned, batch))
    for one in alone(batch, support=0):
        (empty,) = scores(learned, one)
        assert bool(empty.isfinite().all())
        task = int(one.blocks[0].task)
        if name not in STEADY:
            assert not torch.allclose(empty[0].to(full[task].dtype), full[task], atol=1e-4)
        else:
            torch.testing.assert_close(empty[0], full[task])


def test_a_batch_without_any_support_is_learned_from(world: World, learned: Method, name: str):
    """Tasks of which nothing is known yet, and no other beside them."""
    if learned.sweeps:
        pytest.skip("is fitted in sweeps, without losses")
    one = next(alone(world.test_batch(), support=0))
    loss = learned.loss(one).sum()
    grads = torch.autograd.grad(loss, [p for p in learned.parameters() if p.requires_grad], allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in (loss, *grads) if g is not None)


def test_it_learns_more_than_a_constant(world: World, learned: Method, name: str):
    if world.table.scenarios:  # of a made world without tastes: it ranks what it was shown
        batch = next(world.loader("train").epoch(0))
        assert learned.loss(batch).mean() < 0.95 * world.prepared(name).loss(batch).mean()
        return

    def mae(m: Method) -> float:
        total = rows = 0.0
        for batch in world.loader("test").evaluation():
            for block, value in zip(batch, scores(m, batch), strict=True):
                total += float(((value - block.query.label).abs() * block.query.mask).sum())
                rows += int(block.query.mask.sum())
        return total / rows

    assert mae(learned) < (1.0001 if name == "constant" else 0.95) * mae(world.learned("constant"))


def test_its_state_moves_to_a_new_instance(world: World, learned: Method, name: str):
    """What a checkpoint holds is all there is: another initial state, then the learned one, same scores bit for bit."""
    batch, fresh = world.test_batch(), world.method(name, seed=1)
    fresh.load_state_dict(learned.state_dict())
    for key, shared in learned.shared.items():
        shared.flush()
        fresh.shared[key].restore(shared.snapshot())
    for a, b in zip(scores(learned, batch), scores(fresh, batch), strict=True):
        assert torch.equal(a, b)


def test_initial_parameters_follow_the_seed(world: World, name: str):
    for a, b in zip(world.method(name).state_dict().values(), world.method(name).state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_learning_is_a_sum_over_tasks(world: World, name: str):
    """Gradients (or statistics) of a batch are the sum of its tasks': what the all-reduce relies on (invariant 2)."""
    m = world.learned(name, epochs=1).double()
    batch = next(world.loader("train", 12).epoch(0)).to("cpu", torch.float64)

    def sums(batches: list[TaskBatch]) -> list[Tensor]:
        if m.sweeps:
            parts = [[s.to_dense() for s in m.statistics(b, m.sweeps - 1).values()] for b in batches]
            return [torch.stack(p).sum(0) for p in zip(*parts, strict=True)]
        loss = torch.cat([m.loss(b) for b in batches])
        assert len(loss) == len(batch)
        params = [p for p in m.parameters() if p.requires_grad]
        return list(torch.autograd.grad(loss.sum(), params, materialize_grads=True))

    for whole, parts in zip(sums([batch]), sums(list(alone(batch))), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)


def test_a_batch_without_tasks_is_answered(world: World, learned: Method):
    """A worker whose shards hold no task of a batch still takes part in the exchange."""
    nothing = TaskBatch(torch.zeros(0, dtype=torch.int64), ())
    assert scores(learned, nothing) == []
    if not learned.sweeps:
        assert learned.loss(nothing).shape == (0,)


def test_the_registry_and_methods_import_no_ray():
    code = (
        "import sys; from distmeta.methods import METHODS; assert 'torch' not in sys.modules;"
        "from distmeta.methods import method_class; [method_class(n) for n in METHODS];"
        "assert not any(m.split('.')[0] == 'ray' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
