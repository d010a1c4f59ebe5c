"""GRU and LSTM over ragged sequences, without a step on padding and with a reverse pass of their own.

torch's modules unroll over the longest sequence on a CPU, and autograd then walks through a dozen nodes a step. Here
the rows lie packed: all tasks' first rows, then all second ones and so on, the longest task first, so that the k_t
tasks that have a row t are a slice. A step forward is one product and the gates. Backward, whatever does not depend on
what comes from later steps is formed for all rows at once, which leaves a step one product and two passes; the gradient
of the recurrent weights is one product over all rows.

Shape letters: b tasks, S rows of the longest, N rows in all, h units, g gates (3 of a GRU, 4 of an LSTM).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class Packing:
    """Where the real rows of b padded tasks lie when packed."""

    task: Tensor
    """int64 [N]: whose each packed row is."""
    row: Tensor
    """int64 [N]: which of its rows."""
    counts: list[int]
    """k_t: how many tasks have a row t."""
    tasks: Tensor
    """int64 [k_0]: the tasks with rows, the longest first."""
    last: Tensor
    """int64 [k_0]: the packed position of their last rows."""

    @classmethod
    def of(cls, mask: Tensor) -> "Packing":
        """From bool [b, S], in which a task's rows stand first."""
        length = mask.sum(1)
        order = torch.argsort(length, descending=True, stable=True)
        row, place = mask[order].t().nonzero(as_tuple=True)
        counts = mask.sum(0)
        tasks = order[: int((length > 0).sum())]
        first = F.pad(counts.cumsum(0), (1, 0))
        last = first[length[tasks] - 1] + torch.arange(len(tasks), device=mask.device)
        return cls(order[place], row, [k for k in counts.tolist() if k], tasks, last)


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
        h = weight.shape[1]
        gates = torch.empty_like(x)  # r, z, and the inner term of n
        torch.add(x[:, : 2 * h], bias[: 2 * h], out=gates[:, : 2 * h])
        gates[:, 2 * h :] = bias[2 * h :]
        new, states = torch.empty_like(x[:, :h]), torch.empty_like(x[:, :h])
        w = weight.t()
        columns = gates, gates[:, : 2 * h], *gates.split(h, 1), x[:, 2 * h :], new, states
        before = x.new_zeros(max(counts, default=0), h)
        for k, (g, rz, r, z, inner, input_, n, state) in zip(counts, _steps(counts, *columns), strict=True):
            before = before[:k]
            g.addmm_(before, w)
            rz.sigmoid_()
            torch.addcmul(input_, r, inner, out=n).tanh_()
            torch.lerp(n, before, z, out=state)
            before = state
        ctx.save_for_backward(weight, gates, new, states)
        ctx.counts = counts
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> Any:  # type: ignore[override]
        weight, gates, new, states = ctx.saved_tensors
        (r, z, inner), before = gates.chunk(3, 1), _before(states, ctx.counts)
        by_new = _through_tanh(1 - z, new)
        factors = torch.empty_like(gates)
        of_r, of_z, of_n = factors.chunk(3, 1)
        _through_sigmoid.grad_input(by_new * inner, r, grad_input=of_r)
        _through_sigmoid.grad_input(before - new, z, grad_input=of_z)
        torch.mul(by_new, r, out=of_n)
        d = grad[0].clone(memory_format=torch.contiguous_format)
        dgates = torch.empty_like(gates)
        columns = d, d.unsqueeze(1), z, factors.unflatten(1, (3, -1)), dgates, dgates.unflatten(1, (3, -1))
        for earlier, (later, wide, kept, factor, g, g3) in _backwards(_steps(ctx.counts, *columns)):
            torch.mul(wide, factor, out=g3)
            if earlier:
                earlier[0][: len(later)].addcmul_(later, kept).addmm_(g, weight)
        dweight, dbias = dgates.t() @ before, dgates.sum(0)
        torch.mul(d, by_new, out=dgates[:, -d.shape[1] :])  # the input's share of n is not under r
        return dgates, dweight, dbias, None


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
        h = weight.shape[1]
        gates = x + bias  # i, f, g, o
        cells, squashed, states = (torch.empty_like(x[:, :h]) for _ in range(3))
        w = weight.t()
        columns = gates, gates[:, : 2 * h], *gates.split(h, 1), cells, squashed, states
        before = cell = x.new_zeros(max(counts, default=0), h)
        for k, (g, two, i, f, n, o, c, t, state) in zip(counts, _steps(counts, *columns), strict=True):
            g.addmm_(before[:k], w)
            two.sigmoid_()
            n.tanh_()
            o.sigmoid_()
            torch.mul(f, cell[:k], out=c).addcmul_(i, n)
            torch.mul(o, torch.tanh(c, out=t), out=state)
            before, cell = state, c
        ctx.save_for_backward(weight, gates, cells, squashed, states)
        ctx.counts = counts
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> Any:  # type: ignore[override]
        weight, gates, cells, squashed, states = ctx.saved_tensors
        (i, f, n, o), counts = gates.chunk(4, 1), ctx.counts
        factors = torch.empty_like(gates)
        of_i, of_f, of_n, of_o = factors.chunk(4, 1)
        _through_sigmoid.grad_input(n, i, grad_input=of_i)
        _through_sigmoid.grad_input(_before(cells, counts), f, grad_input=of_f)
        _through_tanh.grad_input(i, n, grad_input=of_n)
        _through_sigmoid.grad_input(squashed, o, grad_input=of_o)
        to_cell = _through_tanh(o, squashed)
        d = grad[0].clone(memory_format=torch.contiguous_format)
        dcell, dgates = torch.zeros_like(d), torch.empty_like(gates)
        three = [t[:, : -d.shape[1]].unflatten(1, (3, -1)) for t in (factors, dgates)]
        columns = d, dcell, dcell.unsqueeze(1), f, of_o, to_cell, *three, dgates, dgates[:, -d.shape[1] :]
        for earlier, (later, c, wide, kept, by_o, to_c, factor, g3, g, g_o) in _backwards(_steps(counts, *columns)):
            c.addcmul_(later, to_c)
            torch.mul(wide, factor, out=g3)
            torch.mul(later, by_o, out=g_o)
            if earlier:
                k = len(later)
                earlier[0][:k].addmm_(g, weight)
                torch.mul(c, kept, out=earlier[1][:k])
        return dgates, dgates.t() @ _before(states, counts), dgates.sum(0), None


_through_sigmoid: Any = torch.ops.aten.sigmoid_backward
_through_tanh: Any = torch.ops.aten.tanh_backward
"""What is passed on through them: of (gradient of the output, output), in one pass."""


def _steps(counts: Sequence[int], *columns: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of each step's rows of every column [N, …]."""
    return list(zip(*(c.split(list(counts)) for c in columns), strict=True))


def _backwards(steps: Sequence[tuple[Tensor, ...]]) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """The step before and each step, the last first; of the first step nothing is before."""
    return reversed([*pairwise([(), *steps])])


def _before(states: Tensor, counts: Sequence[int]) -> Tensor:
    """[N, h]: of each row the state of the same task one row earlier; 0 for first rows."""
    earlier = [s[:k] for s, k in zip(states.split(list(counts)), counts[1:], strict=False)]
    return torch.cat([states.new_zeros(max(counts, default=0), states.shape[1]), *earlier])


def states(kind: str, x: Tensor, weight: Tensor, bias: Tensor, packing: Packing) -> Tensor:
    """The state [N, h] after each packed row, from 0.

    Args:
        kind: gru or lstm, whose gates are as torch's.
        x: what the gates get of the rows, packed, biases of the input included [N, g · h].
        weight: recurrent weights [g · h, h]. bias: [g · h].
    """
    return {"gru": _GRU, "lstm": _LSTM}[kind].apply(x, weight, bias, packing.counts)  # type: ignore[return-value]
