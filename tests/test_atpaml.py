"""AT-PAML: Algorithm 1's α by loops over the nodes, gradients by finite differences, and what it writes."""

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from distmeta.data.protocols.base import KINDS
from distmeta.errors import RunError, UserError
from distmeta.memory.base import Arrays, Shared
from distmeta.methods import options
from distmeta.methods.atpaml import ATPAML, SIGMA
from distmeta.tasks import TaskBatch

OPTIONS: dict[str, Any] = {"embedding": 3, "hidden": (6, 5), "local_lr": 0.05, "item_ids": True, "steps": 2}
OPTIONS |= {"nearest": 3, "warm_up": 4, "capacity": 50, "node_lr": 0.5, "exact": True}
RAGGED = ([[5, 3, 1, 0], [7, 6]], [[2, 4, 3, 2], [1, 5]])


def at_paml(**changes: Any) -> ATPAML:
    m: Any = oracle.build(ATPAML, options.ATPAML(**{**OPTIONS, **changes}))
    m.shared = Shared.of(m.memories())
    with torch.no_grad():
        for table in m.embedding.users().values():
            table.weight.mul_(10)
        m.rate[-1].weight.mul_(100)
    return m


def users(*ids: int) -> TaskBatch:
    """The oracle's batch for the given users, whose profiles depend on the position alone."""
    batch = oracle.batch(*RAGGED)
    first = len(batch.blocks[0].task)
    for block, part in zip(batch, (ids[:first], ids[first:]), strict=True):
        block.task[:] = torch.tensor(part) * KINDS
    return batch


def step(m: ATPAML, batch: TaskBatch) -> Tensor:
    """One training step up to the writes; the losses."""
    losses = m.loss(batch)
    losses.sum().backward()
    m.write()
    m.shared["index"].flush()
    return losses.detach()


def by_hand(m: ATPAML, h: Tensor, key: int, stored: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """α(h) = α′(h) + Σ s_k α_k / (Σ s_k + σ) over the 3 nearest others."""
    distance = {k: (h - v).square().sum() for k, (v, _) in stored.items() if k != key}
    nearest = sorted(distance, key=lambda k: (float(distance[k].detach()), k))[:3]
    found = torch.stack([distance[k] for k in nearest])
    median = found.detach().sort().values[(len(found) - 1) // 2]
    s = torch.exp(-found / median)
    return m.rate(h)[0] + (s * torch.stack([stored[k][1] for k in nearest])).sum() / (s.sum() + SIGMA)


def test_warm_up_then_similar_users():
    """Until 4 users are stored all take steps of --local-lr; then α is what Algorithm 1 says, without oneself."""
    m = at_paml()
    first, alphas = users(10, 11, 12, 13, 14, 15), []
    for batch in (first, users(10, 21, 22, 23, 24, 25)):
        encoded = m.embedding.encode(batch)
        alphas.append(torch.cat(m.step_sizes(batch, encoded)).detach())
        hs = torch.cat([m.user_embedding(block, encoded) for block in batch]).detach()
        if batch is first:
            step(m, batch)
    assert torch.equal(alphas[0], torch.full((6,), 0.05, dtype=torch.float64))
    stored = {10 + i: (h, torch.tensor(0.05, dtype=torch.float64)) for i, h in enumerate(hs)}
    keys = (10, 21, 22, 23, 24, 25)
    theirs = torch.stack([by_hand(m, h, key, stored) for h, key in zip(hs, keys, strict=True)])
    torch.testing.assert_close(alphas[1], theirs, rtol=1e-9, atol=1e-9)
    assert len(set(theirs.tolist())) == 6


def test_gradients_reach_the_nodes():
    """The written gradients of stored embeddings and step sizes are those of the summed loss, by finite differences."""
    m = at_paml(kernel=0.5)  # the median that stands in for it is not differentiated
    step(m, users(10, 11, 12, 13, 14, 15))
    batch = users(20, 21, 22, 23, 24, 25)
    losses = m.loss(batch)
    losses.sum().backward()
    visit = m._visit
    assert visit is not None
    shared, used = m.shared["index"], visit["used"]
    state = shared.snapshot()
    read = shared.memory.read

    def total(change: float, name: str, node: int) -> float:
        def moved(request: Arrays) -> Arrays:
            found = read(request)
            at = found["key"] == node
            found[name] = found[name].copy()
            found[name][at] = found[name][at] + change
            return found

        shared.memory.read = moved  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                return float(m.loss(batch).sum())
        finally:
            shared.memory.read = read  # type: ignore[method-assign]

    for name, leaf in (("vector", visit["nodes"]), ("rate", visit["rates"])):
        for node in (10, 13):
            assert (used == node).any()
            assert leaf.grad is not None
            difference = (total(1e-6, name, node) - total(-1e-6, name, node)) / 2e-6
            assert float(leaf.grad[used == node].sum()) == pytest.approx(difference, rel=1e-4, abs=1e-7)
    assert all(np.array_equal(a, b) for a, b in zip(state.values(), shared.snapshot().values(), strict=True))


def test_a_step_stores_its_users_and_moves_the_nodes_it_used():
    """node ← node − β ∇ (mean loss), embedding and step size; then the step's users are stored with their α."""
    m = at_paml()
    step(m, users(10, 11, 12, 13, 14, 15))
    batch = users(10, 21, 22, 23, 24, 25)
    losses = m.loss(batch)
    losses.sum().backward()
    visit = m._visit
    assert visit is not None
    m.write()
    m.shared["index"].flush()
    probe = visit["vector"].detach()
    ask = {"key": np.full(6, -1), "vector": probe.numpy()}
    found = m.shared["index"].memory.read(ask)
    for i, user in enumerate((10, 21, 22, 23, 24, 25)):  # nobody is nearer to oneself
        at = found["key"][i].tolist().index(user)
        assert found["distance"][i, at] == 0
        assert found["rate"][i, at] == pytest.approx(float(visit["rate"][i].detach()), abs=1e-12)
    gradients = visit["rates"].grad
    assert gradients is not None
    at = visit["used"] == 12
    (moved,) = m.shared["index"].memory.read({"key": np.array([-1]), "vector": probe[2:3].numpy()})["rate"]
    expected = 0.05 - 0.5 * float(gradients[at].sum()) / 6
    assert np.isclose(moved, expected, rtol=0, atol=1e-12).any()


def test_evaluation_only_reads():
    m = at_paml()
    step(m, users(10, 11, 12, 13, 14, 15))
    before = {k: v.copy() for k, v in m.shared["index"].snapshot().items()}
    batch = users(20, 21, 22, 23, 24, 25)
    state = m.adapt(batch)
    m.predict(state, batch)
    m.shared["index"].flush()
    assert m._visit is None
    after = m.shared["index"].snapshot()
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_users_who_are_all_alike():
    """Distances of 0: similarities are 1, α̃ is the plain mean, nothing is divided by 0."""
    m = at_paml()
    with torch.no_grad():
        for table in m.embedding.users().values():
            table.weight.zero_()
    step(m, users(10, 11, 12, 13, 14, 15))
    losses = step(m, users(20, 21, 22, 23, 24, 25))
    assert losses.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())


def test_bad_options_and_embeddings():
    with pytest.raises(UserError, match="--capacity"):
        at_paml(nearest=8, capacity=7).memories()
    m = at_paml()
    with torch.no_grad():
        next(iter(m.embedding.users().values())).weight.fill_(torch.nan)
    with pytest.raises(RunError, match="user embedding of task 80 is not finite"):
        step(m, users(10, 11, 12, 13, 14, 15))
