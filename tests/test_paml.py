"""The PAML family against plain autograd in float64, and the paper's two lemmas in closed form."""

from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from distmeta.adaptation.cost import Plan
from distmeta.adaptation.features import Dense
from distmeta.adaptation.inner import Turn, adapt, squared_error
from distmeta.adaptation.maps import Linear
from distmeta.adaptation.tape import Node, Tape
from distmeta.errors import UserError
from distmeta.methods import options
from distmeta.methods.paml import PAML
from distmeta.methods.regpaml import RegPAML
from distmeta.tasks import Rows, TaskBatch

RAGGED = ([[5, 3, 1, 0], [7, 6]], [[2, 4, 3, 2], [1, 5]])
SIZES = {"embedding": 3, "hidden": (6, 5), "local_lr": 0.05, "item_ids": True}


def embeddings(m: PAML, batch: TaskBatch) -> list[Tensor]:
    """h [b, width] of each block from explicit one-hot matrices."""
    found = []
    for block in batch:
        tables = m.embedding.users()
        h = [oracle.hot(block.user[name], len(t.weight)) @ t.weight for name, t in tables.items()]
        if m.options.history:
            rows = []
            for b in range(len(block.task)):
                inputs, labels = oracle.one_task(m, batch, block, b, support=True)
                items = zip(inputs[len(tables) :], m.embedding.items().values(), strict=True)
                embedded = torch.cat([x @ t.weight for x, t in items], 1)
                rows.append(embedded.mean(0) if len(labels) else embedded.new_zeros(embedded.shape[1]))
            h.append(torch.stack(rows))
        found.append(torch.cat(h, 1))
    return found


def reference(m: PAML, batch: TaskBatch, norms: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Losses [B] and α [B] by plain autograd."""
    alphas = {id(block): m.rate(h).squeeze(1) for block, h in zip(batch, embeddings(m, batch), strict=True)}
    factor = dict(zip(m.adapted(), m.log_factor.exp(), strict=True))
    losses = oracle.losses(m, batch, rate=lambda block, b, map_: alphas[id(block)][b] * factor[map_], norms=norms)
    return losses, torch.cat(list(alphas.values()))


def paml(**changes: Any) -> PAML:
    m: Any = oracle.build(PAML, options.PAML(**{**SIZES, **changes}))
    with torch.no_grad():  # α far apart, some below 0
        m.rate[0].weight.mul_(20)
        m.rate[-1].weight.mul_(20)
        m.rate[-1].bias.fill_(0.005)
        m.log_factor.add_(torch.linspace(-0.3, 0.4, len(m.log_factor), dtype=torch.float64))
    return m


def assert_equal(ours: Tensor, theirs: Tensor, m: PAML) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    a, b = oracle.gradients(ours, m), oracle.gradients(theirs, m)
    assert a["rate.0.weight"].abs().max() > 1e-6
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("history", [False, True])
def test_personal_step_sizes_equal_plain_autograd(history, first_order):
    """Eq. 1: losses, and the gradients of θ, ψ and, through h, of the embeddings."""
    m, batch = paml(history=history, steps=2, first_order=first_order), oracle.batch(*RAGGED)
    theirs, alpha = reference(m, batch)
    assert (alpha < 0).any()
    assert (alpha > 0).any()
    assert_equal(m.loss(batch), theirs, m)
    state = m.adapt(batch)
    torch.testing.assert_close(torch.cat(m.facts(state, batch)["step_size"]), alpha.detach())


def test_regulariser_equals_plain_autograd():
    o = options.RegPAML(**SIZES, steps=2, gamma=0.3)
    m: Any = oracle.build(RegPAML, o)
    m.load_state_dict(paml(steps=2).state_dict())
    batch = oracle.batch([[5, 3, 1], [7, 6]], [[2, 4, 3], [1, 5]])
    norms: list[Tensor] = []
    losses, alpha = reference(m, batch, norms)
    assert_equal(m.loss(batch), losses + 0.3 * torch.stack(norms) * alpha.abs(), m)
    m.options = replace(o, gamma=0.0)
    torch.testing.assert_close(m.loss(batch), losses, rtol=1e-9, atol=1e-9)


def test_without_user_fields():
    bare = replace(oracle.dataset(), user_fields=())
    with pytest.raises(UserError, match="has no user fields to tell users apart by; add --history"):
        PAML(options.PAML(**SIZES), bare, oracle.items())
    PAML(options.PAML(**SIZES, history=True), bare, oracle.items())


class Lemma:
    """Two users whose preferences are x_1 and x_2, with densities p_1 ≥ p_2, and a model that is one number θ."""

    p, x = torch.tensor([0.8, 0.2], dtype=torch.float64), torch.tensor([3.0, -1.0], dtype=torch.float64)

    def __init__(self) -> None:
        self.model = Linear(1, 1).double()
        self.model.weight.requires_grad_(False).zero_()
        label, mask = self.x[:, None], torch.ones(2, 1, dtype=torch.bool)
        self.rows = Rows(torch.zeros(2, 1, dtype=torch.int64), label, mask)

    def losses(self, alpha: Tensor) -> Tensor:
        """(θ_i − x_i)² [2] after a step of size α_i, by the engine."""
        zeros = Node(Dense(torch.zeros(2, 1, 1, dtype=torch.float64)), needs=False)

        def forward(tape: Tape) -> Node:
            return tape.linear(self.model, zeros)

        rates = {self.model: alpha[:, None, None]}
        fast = adapt([Turn(forward, self.rows)], rates, first_order=False, plan=Plan(1, 1))
        return squared_error(forward(Tape(fast)).part.rows().squeeze(-1), self.rows)

    def optimum(self, alpha: Tensor, learned: bool) -> tuple[Tensor, Tensor]:
        """Σ p_i (θ_i − x_i)² and its terms where gradient descent on θ, and on α where `learned`, ends."""
        leaves = [self.model.bias, *([alpha.requires_grad_()] if learned else [])]
        with torch.no_grad():
            self.model.bias.zero_()
        for _ in range(4000):
            loss = (self.p * self.losses(alpha)).sum()
            for leaf, g in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.data -= 0.01 * g
        terms = self.losses(alpha).detach()
        return (self.p * terms).sum(), terms


def test_lemma_1_one_step_size_serves_the_major_user():
    """θ* = Σ p_i x_i, so that the minor user's error is (p_1/p_2)² times the major one's."""
    lemma, alpha = Lemma(), 0.1
    _, (major, minor) = lemma.optimum(torch.full((2,), alpha, dtype=torch.float64), learned=False)
    star, shrunk = (lemma.p * lemma.x).sum(), (1 - 2 * alpha) ** 2
    assert float(lemma.model.bias.detach()) == pytest.approx(float(star), abs=1e-9)
    assert float(major) == pytest.approx(shrunk * float((star - lemma.x[0]) ** 2), rel=1e-6)
    assert float(minor) == pytest.approx(shrunk * float((star - lemma.x[1]) ** 2), rel=1e-6)
    assert major <= minor


def test_lemma_2_personal_step_sizes_serve_both_better():
    """L'* ≤ L* and the minor user's error falls; at α_i = 1/2 a step lands on x_i."""
    lemma, same = Lemma(), torch.full((2,), 0.1, dtype=torch.float64)
    loss, (_, minor) = lemma.optimum(same.clone(), learned=False)
    better, (_, theirs) = lemma.optimum(same.clone(), learned=True)
    assert better <= loss
    assert theirs <= minor
    half = lemma.losses(torch.full((2,), 0.5, dtype=torch.float64)).detach()
    assert float(half.max()) == pytest.approx(0, abs=1e-12)


def test_gradient_of_the_step_size():
    """∂L/∂α_i = −p_i ∇L_q(θ_i) · ∇L_s(θ): the sign that the paper prints, with the factors that it should have."""
    lemma, alpha = Lemma(), torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad((lemma.p * lemma.losses(alpha)).sum(), alpha)
    support = 2 * (lemma.model.bias.detach() - lemma.x)
    query = 2 * (lemma.model.bias.detach() - alpha.detach() * support - lemma.x)
    torch.testing.assert_close(found, -lemma.p * query * support)
