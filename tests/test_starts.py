"""Personal initial weights in the engine: mixes of slots against plain autograd, and what they cost."""

import itertools
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmeta.adaptation.cost import Plan
from distmeta.adaptation.features import Dense, Features, PerTask
from distmeta.adaptation.inner import Turn, adapt
from distmeta.adaptation.maps import Blank, Linear, Mix
from distmeta.adaptation.tape import Node, Tape
from distmeta.memory.base import Shared
from distmeta.methods import options
from distmeta.methods.mamo import MAMO


@pytest.mark.parametrize(
    ("form", "first_order"), list(itertools.product(("auto", "dual", "formed", "private"), (False, True)))
)
def test_personal_initial_weights(form, first_order, monkeypatch):
    """MAMO's mixes: a layer that starts from W + Σ c_k M_k, its bias likewise, and one that has nothing but a mix;
    values, and gradients of what all tasks share. `formed`: pairs, on a matrix a task that the mix was formed into."""
    if form != "auto":
        monkeypatch.setattr(Plan, "formed", lambda *_: form == "formed")
    torch.manual_seed(0)
    layer, blank, rows = Linear(5, 3).double(), Blank(3, 1), oracle.rows([3, 2, 0], torch.Generator().manual_seed(0))
    c, slots, biases, matrices, u, x = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((3, 4), (4, 5, 3), (4, 3), (4, 3, 1), (3, 1, 2), (3, 3, 3))
    )
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    leaves = [layer.weight, layer.bias, rate]
    if not first_order:
        leaves += [u.requires_grad_(), x.requires_grad_()]
    parts = PerTask(u), Dense(x)

    def forward(tape: Tape) -> Node:
        return tape.linear(blank, tape.relu(tape.linear(layer, *(Node(p, needs=False) for p in parts)), 0.1))

    fast = adapt(
        [Turn(forward, rows)] * 2,
        {layer: rate, blank: rate},
        first_order=first_order,
        plan=Plan(2, 3, "dual" if form == "formed" else form),
        mixes={layer: Mix(c, slots, biases), blank: Mix(c, matrices, None)},
    )
    moved = forward(Tape(fast)).part.rows()
    expected = []
    for b, n in enumerate((3, 2, 0)):
        inputs = torch.cat([u[b].expand(3, -1), x[b]], 1)
        weights = [layer.weight + torch.einsum("k,kdh", c[b], slots), layer.bias + c[b] @ biases]
        weights.append(torch.einsum("k,kdh", c[b], matrices).requires_grad_())

        def run(weights: list[Tensor], inputs=inputs) -> Tensor:
            return torch.nn.functional.leaky_relu(inputs @ weights[0] + weights[1], 0.1) @ weights[2]

        for _ in range(2 if n else 0):
            loss = (run(weights)[:n, 0] - rows.label[b, :n]).square().mean()
            steps = torch.autograd.grad(loss, weights, create_graph=not first_order)
            weights = [w - rate * g for w, g in zip(weights, steps, strict=True)]
        expected.append(run(weights))
    theirs = torch.stack(expected)
    torch.testing.assert_close(moved, theirs, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in (moved, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize(("form", "recommender"), [("auto", "nmf"), ("dual", "memory"), ("private", "nmf")])
def test_no_task_has_a_matrix_where_the_mix_is_kept_apart(form, recommender):
    """A step with all its writes and its reverse pass makes no tensor of one weight a task: for the user network,
    which sees one row a task, by the engine's own choice; for M_uI where the form says so."""
    m: Any = oracle.build(MAMO, options.MAMO(embedding=32, width=150, steps=1, form=form, recommender=recommender))
    m.shared = Shared.of(m.memories())
    tasks = 40
    batch = oracle.batch([[8] * tasks], [[3] * tasks])
    smallest = 96 * 150  # weights of the user network's first layer
    with Largest() as made:
        m.loss(batch).sum().backward()
        m.write()
        m.shared["memory"].flush()
    assert (made.elements >= tasks * smallest) == (form == "private")


def test_the_form_of_a_layer_of_mixes_follows_cost():
    """One row a task: pairs and the mix. Many rows, slots and steps: a weight a task is cheaper."""
    user, preference = Linear(96, 100), Blank(200, 100)
    profile = Features(PerTask(torch.zeros(2, 1, 96)), fixed=True)
    pairs = Features(PerTask(torch.zeros(2, 1, 100)), Dense(torch.zeros(2, 20, 100)))
    for slots, steps in ((1, 1), (3, 1), (8, 1), (1, 5), (3, 5)):
        assert not Plan(steps, 5).private(user, profile, 1, slots)
    assert Plan(5, 20).private(preference, pairs, 20, 8)
    assert not Plan(1, 5).private(preference, pairs, 5, 1)
