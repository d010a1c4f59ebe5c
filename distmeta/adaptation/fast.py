"""Fast weights of a block of tasks: what the inner loop has added to each adapted map.

A dense layer is kept in one of two forms that agree to rounding (cost.py chooses):
dual, as pairs (x_s, δ) with  x W' + b' = x W + b − Σ_pairs α (x x_sᵀ + 1) δ;
private, as a weight matrix a task. A table is always dual.
The step size α multiplies the Gram matrix, which is smaller than δ, and is the same in every step. One for each
element of a dense layer breaks the low rank, so such a layer is private; a table's stays dual, e' = E[i] − A[i] ∘ Gδ.
W and b are the shared ones, or each task's own to start from (starts.py).

Shape letters: b tasks, R rows at hand, S support rows, d inputs, h outputs, e embedding width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from distmeta.adaptation import chain
from distmeta.adaptation.cost import Plan
from distmeta.adaptation.features import Features, PerTask
from distmeta.adaptation.lookup import gather
from distmeta.adaptation.maps import Each, Layer, Linear, Map, Mix, Rate, Table
from distmeta.adaptation.overlap import overlap
from distmeta.adaptation.products import descend, descend_each, descend_weight, inner
from distmeta.adaptation.starts import Mixed, Own, Start
from distmeta.tasks import Bag


@dataclass
class Pair:
    """Support input x of a dense layer and δ [b, S, h], and Gram matrices with it that are worth keeping."""

    x: Features
    delta: Tensor
    rate: Tensor | float
    bias: bool = True
    """Whether the layer has one that adapts."""
    grams: dict[tuple[int, bool], tuple[Features, Tensor]] = field(default_factory=dict)

    def gram(self, x: Features) -> Tensor:
        """−α (x x_sᵀ + 1) [b, R, S]; the +1 is the bias. Kept: the first layer's inputs return at every step."""
        key = (id(x), torch.is_grad_enabled())
        if key not in self.grams:
            gram = x.gram(self.x) + 1 if self.bias else x.gram(self.x)
            self.grams[key] = (x, gram * -self.rate)  # x is held, so its id is not given to another
        return self.grams[key][1]


class FastLinear(Protocol):
    """An adapted dense layer of b tasks."""

    def state(self) -> chain.State:
        """The form and its tensors, for a chain of layers."""
        ...

    def forward(self, x: Features) -> Tensor:
        """x W' + b' [b, R, h]."""
        ...

    def input_delta(self, delta: Tensor, x: Features, part: int) -> Tensor:
        """δ W'ᵀ for one part of the input: [b, R, d_part], summed over the rows where the part is per task."""
        ...

    def add(self, x: Features, delta: Tensor, rate: Rate) -> "FastLinear":
        """The layer after W' ← W' − α x_sᵀ δ, b' ← b' − α Σ δ."""
        ...


class Dual:
    """What the layer starts from, and pairs."""

    def __init__(self, start: Start, pairs: tuple[Pair, ...] = ()) -> None:
        self.start = start
        self.pairs = pairs

    def state(self) -> chain.State:
        assert isinstance(self.start, Own)  # a layer that starts from a mix is in no chain
        xs, deltas = [pair.x.dense() for pair in self.pairs], [pair.delta for pair in self.pairs]
        x, delta = (xs[0], deltas[0]) if len(xs) == 1 else (torch.cat(xs, 1), torch.cat(deltas, 1))
        tensors, rate = (*self.start.weights(), x, delta), self.pairs[0].rate
        if isinstance(rate, Tensor):
            return chain.State(chain.Pairs, (*tensors, rate))
        return chain.State(chain.Pairs, tensors, (rate,))

    def forward(self, x: Features) -> Tensor:
        z = self.start.times(x)
        for pair in self.pairs:
            gram = pair.gram(x)
            z = torch.baddbmm(z.expand(-1, gram.shape[1], -1), gram, pair.delta)
        return z

    def input_delta(self, delta: Tensor, x: Features, part: int) -> Tensor:
        out = self.start.input_delta(delta, x, part)
        for pair in self.pairs:
            coefficient = inner(delta, pair.delta) * pair.rate
            p = pair.x.cut_like(x)[part]
            if isinstance(p, PerTask):
                out = out - coefficient.sum(-1, keepdim=True) * p.x
            else:
                out = torch.baddbmm(out, coefficient, p.rows(), alpha=-1)
        return out

    def add(self, x: Features, delta: Tensor, rate: Rate) -> "Dual":
        assert not isinstance(rate, Each)
        for i, pair in enumerate(self.pairs):
            if pair.x is x:  # an input that does not move: its pairs share x_s and their δ add up
                merged = Pair(x, pair.delta + delta, rate, pair.bias, pair.grams)
                return Dual(self.start, (*self.pairs[:i], merged, *self.pairs[i + 1 :]))
        return Dual(self.start, (*self.pairs, Pair(x, delta, rate, self.start.bias)))


class Private:
    """A weight matrix [b, d, h] and a bias [b, 1, h] a task; before its first step perhaps the shared ones. A layer
    without a bias has zeros, which stay.

    The weights are kept as the slices that belong to the parts of the input, so that a part that is the same in all
    rows of a task is multiplied once a task.
    """

    def __init__(self, weights: tuple[Tensor, ...], bias: Tensor, adapts: bool) -> None:
        self.weights = weights
        self.bias = bias
        self.adapts = adapts
        """Whether the bias does."""

    @classmethod
    def of(cls, start: Start) -> "Private":
        """What the layer starts from; where that is shared, private from the first step on."""
        weight, bias = start.weights()
        return cls((weight,), bias, start.bias)

    def state(self) -> chain.State:
        return chain.State(chain.Private, (self._slices(None)[0], self.bias))

    def _slices(self, x: Features | None) -> tuple[Tensor, ...]:
        """The weights cut like the parts of x; whole without one."""
        widths = [w.shape[-2] for w in self.weights]
        wanted = [sum(widths)] if x is None else [p.width for p in x.parts]
        if wanted == widths:
            return self.weights
        whole = self.weights[0] if len(widths) == 1 else torch.cat(self.weights, dim=-2)
        return whole.split(wanted, dim=-2) if len(wanted) > 1 else (whole,)

    def forward(self, x: Features) -> Tensor:
        z = self.bias
        # parts that are the same in all rows first: their [b, 1, h] is the bias of the others
        for p, w in sorted(zip(x.parts, self._slices(x), strict=True), key=lambda e: not isinstance(e[0], PerTask)):
            rows = p.rows()
            z = torch.baddbmm(z.expand(-1, rows.shape[1], -1), rows, w)
        return z

    def input_delta(self, delta: Tensor, x: Features, part: int) -> Tensor:
        return inner(delta, self._slices(x)[part])

    def add(self, x: Features, delta: Tensor, rate: Rate) -> "Private":
        if isinstance(rate, Each):
            return self._add_each(x, delta, rate)
        weights, bias = [], self.bias
        for i, (p, w) in enumerate(zip(x.parts, self._slices(x), strict=True)):
            d = delta.sum(1, keepdim=True) if isinstance(p, PerTask) else delta
            if i == 0 and self.adapts:
                w, bias = descend(w, bias, p.rows(), d, rate)
            else:
                w = descend_weight(w, p.rows(), d, rate)
            weights.append(w)
        return Private(tuple(weights), bias, self.adapts)

    def _add_each(self, x: Features, delta: Tensor, rate: Each) -> "Private":
        assert rate.bias is not None
        weights, total = [], delta.sum(1, keepdim=True)
        for p, w, a in zip(x.parts, self._slices(x), x.slices(rate.weight), strict=True):
            d = total if isinstance(p, PerTask) else delta
            weights.append(descend_each(w, p.rows(), d, a))
        return Private(tuple(weights), self.bias - rate.bias * total, self.adapts)


class FastTable:
    """An adapted embedding table of b tasks: bags of support rows and their δ [b, S, e], one entry a place of use."""

    def __init__(self, table: Table, rate: Rate, pairs: tuple[tuple[Bag, Tensor], ...] = ()) -> None:
        self.table = table
        self.rate = rate
        self.pairs = pairs

    def correction(self, bag: Bag, overlaps: dict[tuple[int, int], tuple[Bag, Bag, Tensor]]) -> Tensor:
        """What the steps have subtracted from the embeddings of `bag` [b, R, M]: Σ α overlap · δ, [b, R, e]."""
        if isinstance(self.rate, Each):
            return self._correction_each(bag, self.rate.weight, overlaps)
        return self._moved(bag, self.rate, overlaps)

    def _correction_each(
        self, bag: Bag, rate: Tensor, overlaps: dict[tuple[int, int], tuple[Bag, Bag, Tensor]]
    ) -> Tensor:
        """The same with a step size A [V, e] for each element: value by value, Σ_m w_m A[i_m] ∘ (overlap_m · δ)."""
        b, r, m = bag.index.shape
        if m == 1:
            return gather(rate, bag.index[:, :, 0]) * self._moved(bag, 1.0, overlaps)
        key = (id(bag), 0)
        if key not in overlaps:
            weight = None if bag.weight is None else bag.weight.reshape(b, r * m, 1)
            overlaps[key] = (bag, Bag(bag.index.reshape(b, r * m, 1), weight), rate)
        values = overlaps[key][1]
        moved = gather(rate, values.index[:, :, 0]) * self._moved(values, 1.0, overlaps)
        return moved.view(b, r, m, -1).sum(2)

    def _moved(
        self, bag: Bag, rate: Tensor | float, overlaps: dict[tuple[int, int], tuple[Bag, Bag, Tensor]]
    ) -> Tensor:
        size, total = self.table.weight.shape[0], None
        for other, delta in self.pairs:
            key = (id(bag), id(other))
            if key not in overlaps:
                overlaps[key] = (
                    bag,
                    other,
                    overlap(bag, other, size, delta.dtype),
                )  # both held: ids stay theirs
            term = torch.bmm(overlaps[key][2] * rate, delta)
            total = term if total is None else total + term
        assert total is not None
        return total

    def add(self, bag: Bag, delta: Tensor) -> "FastTable":
        for i, (other, old) in enumerate(self.pairs):
            if other is bag:
                return FastTable(self.table, self.rate, (*self.pairs[:i], (bag, old + delta), *self.pairs[i + 1 :]))
        return FastTable(self.table, self.rate, (*self.pairs, (bag, delta)))


def _number(rate: Rate) -> Rate:
    """A rate that needs no gradient as a number, which costs less in every product; on other devices it stays."""
    if isinstance(rate, Tensor) and not rate.requires_grad and rate.dim() == 0 and rate.device.type == "cpu":
        return float(rate)
    return rate


class FastWeights:
    """What a block's inner loop has changed so far; maps that are not in it are as they were.

    Args:
        rates: step size of each adapted map, the same in every step: a number, a scalar parameter (learned),
            [b, 1, 1] (personal), or one for each parameter.
        plan: chooses the form of a dense layer when it takes its first step; of one that starts from a mix when it is
            first used.
        mixes: what tasks start from in layers where that is their own; a Blank must be among them.
    """

    def __init__(self, rates: Mapping[Map, Rate], plan: Plan, mixes: Mapping[Layer, Mix] | None = None) -> None:
        self.rates = {m: _number(r) for m, r in rates.items()}
        self.plan = plan
        self.mixes = mixes or {}
        self.graph = torch.is_grad_enabled()
        self.linear: dict[Layer, FastLinear] = {}
        self.tables: dict[Table, FastTable] = {}
        self.overlaps: dict[tuple[int, int], tuple[Bag, Bag, Tensor]] = {}
        self.inputs: dict[tuple[int, ...], Features] = {}

    def of(self, layer: Layer, x: Features) -> FastLinear | None:
        """What `layer` is now, about to be applied to x; None where it is as all tasks share it."""
        if layer not in self.linear and layer in self.mixes:
            self.linear[layer] = self._begun(layer, x, x.rows, self.rates.get(layer))
        return self.linear.get(layer)

    def _begun(self, layer: Layer, x: Features, rows: int, rate: Rate | None) -> FastLinear:
        """`layer` before its first step, whose support input is x."""
        own, mix = Own(layer) if isinstance(layer, Linear) else None, self.mixes.get(layer)
        slots = 0 if mix is None else len(mix.weight)
        private = isinstance(rate, Each) or self.plan.private(layer, x, rows, slots)
        formed = private or (slots > 0 and self.plan.formed(layer, x, rows, slots))
        start = own if mix is None else Mixed(own, mix, formed)
        assert start is not None
        with torch.set_grad_enabled(self.graph):  # first order: first used in a pass without, which the query's has
            return Private.of(start) if private else Dual(start)

    def state(self, layer: Linear) -> chain.State:
        """What `layer` is now, for a chain of layers."""
        if layer in self.linear:
            return self.linear[layer].state()
        return chain.State(chain.Shared, (layer.weight, layer.bias))

    def moved(self, layer: Linear) -> tuple[Tensor, Tensor]:
        """W' − W [d, h] and b' − b [h] of a dense layer that has taken a step, summed over the tasks."""
        kind, tensors, numbers = self.state(layer)
        if kind is chain.Private:
            weight, bias = tensors
            return weight.sum(0) - len(weight) * layer.weight, bias.sum((0, 1)) - len(bias) * layer.bias
        _, _, x, delta, *rate = tensors
        scaled = (delta * -(rate[0] if rate else numbers[0])).flatten(0, 1)
        return x.flatten(0, 1).t() @ scaled, scaled.sum(0)

    def step(self, records: Mapping[Map, list[tuple[Features | Bag, Tensor]]]) -> None:
        """One inner step of every adapted map, from (input, δ) of all its places of use.

        All δ of the step exist before the first pair is added: with a shared map, adding one early would change
        what the others are taken at (adaptation.md, caveat 2).
        """
        for m, places in records.items():
            rate = self.rates[m]
            for x, delta in places:
                if isinstance(m, Table):
                    assert isinstance(x, Bag)
                    self.tables[m] = self.tables.get(m, FastTable(m, rate)).add(x, delta)
                else:
                    assert isinstance(x, Features)
                    if m not in self.linear:
                        self.linear[m] = self._begun(m, x, delta.shape[1], rate)
                    self.linear[m] = self.linear[m].add(x, delta, rate)
