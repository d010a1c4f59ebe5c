"""The recurrence over packed rows against torch's own modules, in float64: states and every gradient."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmeta.methods.recurrence import Packing, states

MODULES = {"gru": nn.GRU, "lstm": nn.LSTM}
CASES = [[3, 0, 6, 1, 6], [4], [1, 1], [7, 2, 5, 5, 5, 1, 3], [0, 0]]


def masked(lengths: list[int], rows: int = 8) -> Tensor:
    return torch.arange(rows) < torch.tensor(lengths, dtype=torch.int64)[:, None]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_states_and_gradients_are_those_of_torch(kind, lengths):
    """After every row of every task, so that losses on all of them are passed on; rows and lengths in any order."""
    torch.manual_seed(len(lengths))
    mask = masked(lengths)
    cell = MODULES[kind](3, 5, batch_first=True).double()
    x = torch.randn(*mask.shape, 3, dtype=torch.float64, requires_grad=True)
    packing = Packing.of(mask)
    z = F.linear(x[packing.task, packing.row], cell.weight_ih_l0, cell.bias_ih_l0)  # type: ignore[arg-type]
    ours = states(kind, z, cell.weight_hh_l0, cell.bias_hh_l0, packing)  # type: ignore[arg-type]
    theirs = cell(x)[0][packing.task, packing.row]
    assert len(ours) == sum(lengths)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights, leaves = torch.randn_like(theirs), [x, *cell.parameters()]
    gradients = [torch.autograd.grad((s * weights).sum(), leaves) for s in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_packing_names_each_real_row_once_and_the_last_of_each_task(lengths):
    p = Packing.of(masked(lengths))
    pairs = list(zip(p.row.tolist(), p.task.tolist(), strict=True))
    assert sorted(pairs) == [(r, t) for r in range(8) for t, n in enumerate(lengths) if r < n]
    assert p.counts == [n for n in (sum(n > r for n in lengths) for r in range(8)) if n]
    assert sorted(p.tasks.tolist()) == [t for t, n in enumerate(lengths) if n]
    assert [pairs[i] for i in p.last.tolist()] == [(lengths[t] - 1, t) for t in p.tasks.tolist()]


def test_no_gradient_is_formed_where_none_is_wanted():
    cell, p = nn.GRU(2, 3), Packing.of(masked([4, 2]))
    with torch.inference_mode():
        out = states("gru", torch.randn(6, 9), cell.weight_hh_l0, cell.bias_hh_l0, p)  # type: ignore[arg-type]
    assert not out.requires_grad
