"""GRU and LSTM over ragged sequences, without a step on padding and with a reverse pass of their own.

torch's modules unroll over the longest sequence on a CPU, and autograd then walks through a dozen nodes a step. Here
the rows lie packed: all tasks' first rows, then all second ones and so on, the longest task first, so that the k_t
tasks that have a row t are a slice. A step forward is one product and the gates. Backward, whatever does not depend on
what comes from later steps is formed for all rows at once, which leaves a step one product and two passes; the gradient
of the recurrent weights is one product over all rows.

Shape letters: b tasks, S rows of the longest, N rows in all, h units, g gates (3 of a GRU, 4 of an LSTM).
"""

from collections.abc import Sequence
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
        gates = torch.cat(
            [x[:, : 2 * h] + bias[: 2 * h], bias[2 * h :].expand(len(x), h)], 1
        )  # r, z, and n's inner term
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
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gates, new, states = ctx.saved_tensors
        (r, z, inner), before = gates.chunk(3, 1), _before(states, ctx.counts)
        by_new = (1 - z) * (1 - new * new)  # ∂h/∂n before its tanh
        factors = torch.cat([by_new * inner * r * (1 - r), (before - new) * z * (1 - z), by_new * r], 1)
        d = grad[0].clone(memory_format=torch.contiguous_format)
        dgates = torch.empty_like(gates)
        columns = (d, d.unsqueeze(1), z, factors.unflatten(1, (3, -1)), dgates, dgates.unflatten(1, (3, -1)))
        steps = _steps(ctx.counts, *columns)
        for (state, *_), (later, wide, kept, factor, g, g3) in reversed([*pairwise([(None,), *steps])]):
            torch.mul(wide, factor, out=g3)
            if state is not None:
                state[: len(later)].addcmul_(later, kept).addmm_(g, weight)
        dx = torch.cat([dgates[:, : -d.shape[1]], d * by_new], 1)
        return dx, dgates.t() @ before, dgates.sum(0), None


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
        h = weight.shape[1]
        gates = x + bias  # i, f, g, o
        cells, squashed, states = (torch.empty_like(x[:, :h]) for _ in range(3))
        w = weight.t()
        columns = gates, gates[:, : 2 * h], *gates.split(h, 1), cells, squashed, states
        before, cell = x.new_zeros(max(counts, default=0), h), x.new_zeros(max(counts, default=0), h)
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
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gates, cells, squashed, states = ctx.saved_tensors
        (i, f, n, o), counts = gates.chunk(4, 1), ctx.counts
        by_cell = torch.cat([n * i * (1 - i), _before(cells, counts) * f * (1 - f), i * (1 - n * n)], 1)
        by_state, to_cell = squashed * o * (1 - o), o * (1 - squashed * squashed)
        d = grad[0].clone(memory_format=torch.contiguous_format)
        dcell, dgates = torch.zeros_like(d), torch.empty_like(gates)
        three, last = dgates[:, : -d.shape[1]].unflatten(1, (3, -1)), dgates[:, -d.shape[1] :]
        columns = d, dcell, dcell.unsqueeze(1), f, by_state, to_cell, by_cell.unflatten(1, (3, -1)), dgates, three, last
        steps = _steps(counts, *columns)
        for earlier, (later, c, wide, kept, of_o, to_c, factor, g, g3, g_o) in reversed([*pairwise([None, *steps])]):
            c.addcmul_(later, to_c)
            torch.mul(wide, factor, out=g3)
            torch.mul(later, of_o, out=g_o)
            if earlier is not None:
                k = len(later)
                earlier[0][:k].addmm_(g, weight)
                torch.mul(c, kept, out=earlier[1][:k])
        return dgates, dgates.t() @ _before(states, counts), dgates.sum(0), None


def _steps(counts: Sequence[int], *columns: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of each step's rows of every column [N, …]."""
    return list(zip(*(c.split(list(counts)) for c in columns), strict=True))


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
