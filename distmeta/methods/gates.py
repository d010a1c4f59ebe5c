"""s²Meta's coordinate-wise gates, and the reverse pass of what they make of a task's parameters.

Every parameter tensor has an LSTM cell of its own, which all its coordinates share: of each it sees the gradient and
the coordinate, both smoothed, and the task's loss, and gives an input gate i (the coordinate's step size) and a forget
gate f: θ ← f θ − i ∇L (Du et al., KDD 2019; arXiv 1906.00391, "update controller"). What it sees carries no graph
(first order), so the way back through all steps needs no network: a coordinate's gates depend on its own past alone.

That is what the chain here is written for. Going forward, gradients, coordinates and losses are kept, three numbers a
coordinate and step, and nothing of the cell's inside. Going back, some thousand coordinates at a time take all their
steps again and then back, while what is between lies in the cache; the units stand first, so that gates are whole rows
and every pass is over rows. tanh is 2 σ(2x) − 1, which is several times faster; the layer norm's scale and shift are
folded into the weights that follow it, and the initial state into a bias of the first step.

Shape letters: b tasks, P coordinates of a task, s of one tensor, n at a time, u units, T steps.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMOOTH = 10.0
"""p of the smoothing (Andrychowicz et al., NeurIPS 2016, Appendix A)."""
EPSILON = 1e-5
"""Of the layer norm, as torch's."""
_SEEN = 6
"""Rows that a cell sees: log and sign parts of gradient and coordinate, the loss, and 1."""
_AT_ONCE = 4096


def magnitude(x: Tensor) -> Tensor:
    """log|x| / p, −1 below e^−p: the first of the two numbers that x is smoothed to."""
    return x.abs().log_().div_(SMOOTH).clamp_(min=-1)


class Cell(NamedTuple):
    """The weights of one tensor's gates as the chain takes them; gates in the order i, f, o, g, whose rows are
    doubled."""

    first: Tensor
    """[4u, 6]: of the first step, the initial state in its last column."""
    later: Tensor
    """[4u, u + 6]: of the others, the state first."""
    heads: Tensor
    """[2, u + 1]: of the input and the forget gate."""
    cell: Tensor
    """[u]: what the cell starts from."""


class Gates(nn.Module):
    """The learned part of one tensor's gates.

    Args:
        units: u. normed: whether the state is normalised, as s²Meta's is.
        rate: input gate to begin near. forget: what the forget gate's bias starts from.
    """

    def __init__(self, units: int, normed: bool, rate: float, forget: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(units)
        self.seen = nn.Parameter(torch.empty(4 * units, _SEEN - 1).uniform_(-bound, bound))
        self.recurrent = nn.Parameter(torch.empty(4 * units, units).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(4 * units).uniform_(-bound, bound))
        self.state = nn.Parameter(torch.randn(units))
        self.cell = nn.Parameter(torch.randn(units))
        self.heads = nn.Parameter(nn.init.xavier_normal_(torch.empty(2, units)))
        self.levels = nn.Parameter(torch.tensor([math.log(rate / (1 - rate)), forget]))
        self.scale = nn.Parameter(torch.ones(units)) if normed else None
        self.shift = nn.Parameter(torch.zeros(units)) if normed else None
        with torch.no_grad():
            self.bias[units : 2 * units] = 1.0

    def forward(self) -> Cell:
        """The weights of the chain, with graph."""
        u = len(self.cell)
        double = torch.cat([self.bias.new_ones(3 * u), self.bias.new_full((u,), 2.0)]).unsqueeze(1)
        recurrent, bias, heads, levels = self.recurrent, self.bias, self.heads, self.levels
        if self.scale is not None and self.shift is not None:
            recurrent, heads = recurrent * self.scale, heads * self.scale
            bias, levels = bias + self.recurrent @ self.shift, levels + self.heads @ self.shift
        begun = self.bias + self.recurrent @ self.state
        return Cell(
            torch.cat([self.seen, begun.unsqueeze(1)], 1) * double,
            torch.cat([recurrent, self.seen, bias.unsqueeze(1)], 1) * double,
            torch.cat([heads, levels.unsqueeze(1)], 1),
            self.cell,
        )


@dataclass
class Steps:
    """What the inner loop of b tasks went through; tasks leave it one by one, none comes back."""

    normed: bool
    widths: tuple[int, ...]
    """Coordinates s of each tensor, in the order of a task's P."""
    final: Tensor
    """[b, P]: the parameters that tasks leave with; at first those they come with."""
    tasks: list[Tensor] = field(default_factory=list)
    """int64 [b_t] of each step: who takes it."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Gradient, coordinates [b_t, P] and loss [b_t] of each step, without graph."""
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """State and cell [u, b_t, s] of each tensor after the last step."""

    def keep(self, stay: Tensor) -> None:
        """Only the tasks at `stay` (int64 [k], positions among those of the last step) go on."""
        self.states = [(h.index_select(1, stay), c.index_select(1, stay)) for h, c in self.states]

    @torch.no_grad()
    def take(self, cells: Sequence[Cell], tasks: Tensor, gradient: Tensor, theta: Tensor, loss: Tensor) -> tuple:
        """One step of the tasks int64 [b_t]: their new coordinates [b_t, P] and mean input gate [b_t]."""
        begun = bool(self.states)
        self.tasks.append(tasks)
        self.seen.append((gradient, theta, loss))
        moved, rate = torch.empty_like(theta), theta.new_zeros(len(theta))
        states = []
        for k, (cell, (a, e)) in enumerate(zip(cells, spans(self.widths), strict=True)):
            u = len(cell.cell)
            state, memory = (theta.new_empty(u, len(theta), e - a) for _ in range(2))
            for i, j, p, q in _chunks(len(theta), a, e, _size(theta)):
                at = slice(i, j), slice(p, q)
                inner = slice(None), slice(i, j), slice(p - a, q - a)
                before = [t[inner].flatten(1) for t in self.states[k]] if begun else None
                done = _step(cell, self.normed, gradient[at], theta[at], loss[i:j], before)
                state[inner] = done.state.view(u, j - i, q - p)
                memory[inner] = done.cell.view(u, j - i, q - p)
                gates = done.gates.view(2, j - i, q - p)
                moved[at] = gates[1] * theta[at] - gates[0] * gradient[at]
                rate[i:j] += gates[0].sum(1)
            states.append((state, memory))
        self.states = states
        self.final[tasks] = moved
        return moved, rate / theta.shape[1]

    def counts(self) -> Tensor:
        """Steps int64 [b] that each task took."""
        count = torch.zeros(len(self.final), dtype=torch.int64, device=self.final.device)
        for tasks in self.tasks:
            count[tasks] += 1
        return count

    def result(self, start: Tensor, cells: Sequence[Cell]) -> Tensor:
        """[b, P]: `final` with its graph to `start` [P], which all began with, and to the gates' weights."""
        self.states = []
        return _Chain.apply(self, start, *(t for cell in cells for t in cell))  # type: ignore[return-value]


def spans(widths: Sequence[int]) -> list[tuple[int, int]]:
    """First and last (excluded) coordinate of each tensor."""
    ends = [sum(widths[: k + 1]) for k in range(len(widths))]
    return list(zip([0, *ends], ends, strict=False))


def _size(like: Tensor) -> int:
    """Coordinates to take at a time: what a core's cache holds; on a GPU as many as memory should be lent to."""
    return _AT_ONCE if like.device.type == "cpu" else 1 << 19


def _chunks(tasks: int, a: int, e: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Rectangles (first task, last, first coordinate, last) of about `size`: parts of one task's tensor, or those of
    several tasks whole."""
    if e - a >= size:
        parts = max(1, round((e - a) / size))
        cuts = [a + (e - a) * k // parts for k in range(parts + 1)]
        yield from ((i, i + 1, p, q) for i in range(tasks) for p, q in pairwise(cuts))
    else:
        many = max(1, size // (e - a))
        yield from ((i, min(i + many, tasks), a, e) for i in range(0, tasks, many))


class _Step(NamedTuple):
    """A step of n coordinates, with what its way back needs."""

    rows: Tensor
    """What the cell saw: [u + 6, n], [6, n] at first."""
    activations: Tensor
    """[4u, n]: i, f, o and (g + 1) / 2."""
    before: Tensor
    """[u, n]: the cell before, [u, 1] at first."""
    cell: Tensor
    squashed: Tensor
    """[u, n]: (tanh of the cell + 1) / 2."""
    state: Tensor
    """[u, n]: normalised, but for scale and shift."""
    deviation: Tensor | None
    """[1, n]: one over the standard deviation of the state."""
    gates: Tensor
    """[2, n]: input and forget gate."""


def _step(
    cell: Cell, normed: bool, gradient: Tensor, theta: Tensor, loss: Tensor, before: Sequence[Tensor] | None
) -> _Step:
    """A step of the coordinates `theta` [m, k] of m tasks; `before`: state and cell [u, n], none before the first."""
    u, n = len(cell.cell), theta.numel()
    own = 0 if before is None else u
    rows = theta.new_empty(own + _SEEN, n)
    _smooth(rows[own:].view(_SEEN, *theta.shape), gradient, theta, loss)
    memory = cell.cell.unsqueeze(1)
    if before is not None:
        rows[:u] = before[0]
        memory = before[1]
    a = torch.mm(cell.first if before is None else cell.later, rows).sigmoid_()
    i, f, o, g = a.view(4, u, n)
    c = torch.mul(i, g).mul_(2).sub_(i).addcmul_(f, memory)
    squashed = torch.mul(c, 2).sigmoid_()
    state, deviation = torch.mul(squashed, 2).sub_(1).mul_(o), None
    if normed:
        state.sub_(state.mean(0, keepdim=True))
        deviation = state.square().mean(0, keepdim=True).add_(EPSILON).rsqrt_()
        state.mul_(deviation)
    gates = torch.addmm(cell.heads[:, u:], cell.heads[:, :u], state).sigmoid_()
    return _Step(rows, a, memory, c, squashed, state, deviation, gates)


def _smooth(rows: Tensor, gradient: Tensor, theta: Tensor, loss: Tensor) -> None:
    """Fill rows [6, m, k]: log|x| / p or −1, then sign or e^p x, of gradient and coordinate; the loss's; 1.

    Below e^−p both run into the other branch's value, so that neither needs a comparison.
    """
    torch.abs(gradient, out=rows[0])
    torch.abs(theta, out=rows[1])
    rows[:2].log_().div_(SMOOTH).clamp_(min=-1)
    steep = math.exp(SMOOTH)
    torch.mul(gradient, steep, out=rows[2])
    torch.mul(theta, steep, out=rows[3])
    rows[2:4].clamp_(-1, 1)
    rows[4] = magnitude(loss).unsqueeze(1)
    rows[5] = 1


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Steps, start: Tensor, *weights: Tensor) -> Tensor:
        ctx.steps = steps
        ctx.save_for_backward(*weights)
        return steps.final.detach()  # another object: it would hold what holds it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> Any:  # type: ignore[override]
        steps, saved = ctx.steps, ctx.saved_tensors
        cells = [Cell._make(saved[k : k + 4]) for k in range(0, len(saved), 4)]
        sums = [Cell._make(torch.zeros_like(t) for t in cell) for cell in cells]
        reached = grad[0].clone(memory_format=torch.contiguous_format)
        counts = steps.counts()
        for count in counts.unique().tolist():
            if count:
                tasks = (counts == count).nonzero().squeeze(1)
                reached[tasks] = _back_group(steps, cells, sums, tasks, count, reached[tasks])
        return None, reached.sum(0), *(t for total in sums for t in total)


def _back_group(
    steps: Steps, cells: Sequence[Cell], sums: Sequence[Cell], tasks: Tensor, count: int, grad: Tensor
) -> Tensor:
    """Of tasks int64 [k] that took `count` steps: the gradient [k, P] by their start; the weights' goes to `sums`."""
    # tasks stand in ascending order everywhere
    places = [torch.searchsorted(who, tasks) for who in steps.tasks[:count]]
    seen = [tuple(t[place] for t in found) for place, found in zip(places, steps.seen, strict=False)]
    for cell, total, (a, e) in zip(cells, sums, spans(steps.widths), strict=True):
        for i, j, p, q in _chunks(len(tasks), a, e, _size(grad)):
            done: list[_Step] = []
            own = []
            for gradient, theta, loss in seen:
                own.append((gradient[i:j, p:q], theta[i:j, p:q]))
                before = (done[-1].state, done[-1].cell) if done else None
                done.append(_step(cell, steps.normed, own[-1][0], own[-1][1], loss[i:j], before))
            grad[i:j, p:q] = _back(cell, total, done, own, grad[i:j, p:q])
    return grad


def _back(cell: Cell, total: Cell, done: Sequence[_Step], own: Sequence[tuple[Tensor, Tensor]], grad: Tensor) -> Tensor:
    """The gradient [m, k] by the coordinates that began, of those that ended; the weights' is added to `total`."""
    u = len(cell.cell)
    later = further = None
    for t in reversed(range(len(done))):
        step, (gradient, theta) = done[t], own[t]
        d = torch.empty_like(step.gates)
        torch.mul(grad, gradient, out=d[0].view_as(grad)).neg_()
        torch.mul(grad, theta, out=d[1].view_as(grad))
        grad = grad * step.gates[1].view_as(grad)
        d = _through_sigmoid(d, step.gates)
        total.heads[:, :u].addmm_(d, step.state.t())
        total.heads[:, u] += d.sum(1)
        heads = cell.heads[:, :u].t()
        state = heads @ d if later is None else torch.addmm(later, heads, d)
        da, further = _back_cell(step, state, further)
        (total.later if t else total.first).addmm_(da, step.rows.t())
        if t:
            later = cell.later[:, :u].t() @ da
        else:
            total.cell.add_(further.sum(1))
    return grad


def _back_cell(step: _Step, state: Tensor, further: Tensor | None) -> tuple[Tensor, Tensor]:
    """From the gradients by the state and (`further`) by the cell after a step: those by what the activations are of
    [4u, n], and by the cell before it [u, n]."""
    if step.deviation is not None:
        share = torch.mul(state, step.state).mean(0, keepdim=True)
        state = state.sub_(state.mean(0, keepdim=True)).addcmul_(step.state, share, value=-1).mul_(step.deviation)
    u, n = state.shape
    i, f, o, g = step.activations.view(4, u, n)
    da = torch.empty_like(step.activations)
    by_i, by_f, by_o, by_g = da.view(4, u, n)
    torch.mul(step.squashed, 2, out=by_o).sub_(1).mul_(state)
    cell = _through_sigmoid(state.mul_(o), step.squashed).mul_(4)
    if further is not None:
        cell.add_(further)
    torch.mul(g, 2, out=by_i).sub_(1).mul_(cell)
    torch.mul(cell, step.before, out=by_f)
    torch.mul(cell, i, out=by_g).mul_(2)
    _through_sigmoid.grad_input(da, step.activations, grad_input=da)
    return da, cell.mul_(f)


_through_sigmoid: Any = torch.ops.aten.sigmoid_backward
"""What is passed on through σ: of (gradient of the output, output), in one pass."""
