"""What the fast weights of a dense layer start from: the shared weights, or a mix of slots that is each task's own.

A mix is kept apart, as products with K slots that are summed in one: x Σ_k c_k M_k = (c ⊗ x) [M_1; …; M_K]. That costs
K products a row and no weight matrix a task. Or it is formed into one, which no gradient is wanted of: with many rows a
task the cheaper way, whatever K (cost.py; adaptation.md, Personal initial weights).

Shape letters: b tasks, R rows, d inputs, h outputs, K slots.
"""

from typing import Protocol

import torch
from torch import Tensor

from distmeta.adaptation.features import Features, PerTask
from distmeta.adaptation.maps import Linear, Mix
from distmeta.adaptation.products import back, inner


class Start(Protocol):
    """A dense layer of b tasks before its first step."""

    bias: bool
    """Whether the layer has one that adapts."""

    def times(self, x: Features) -> Tensor:
        """x W + b [b, R, h]; [b, 1, h] where every part of x is per task."""
        ...

    def input_delta(self, delta: Tensor, x: Features, part: int) -> Tensor:
        """δ Wᵀ for one part of the input: [b, R, d_part]."""
        ...

    def weights(self) -> tuple[Tensor, Tensor]:
        """W [d, h] and b [h], or of each task [b, d, h] and [b, 1, h]."""
        ...


class Own:
    """The layer's own weights, shared by all tasks."""

    bias = True

    def __init__(self, layer: Linear) -> None:
        self.layer = layer

    def times(self, x: Features) -> Tensor:
        return x.times(self.layer.weight, self.layer.bias)

    def input_delta(self, delta: Tensor, x: Features, part: int) -> Tensor:
        return back(delta, x.slices(self.layer.weight)[part])

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.layer.weight, self.layer.bias


class Mixed:
    """Weights that are each task's own.

    Args:
        own: the shared ones beneath the mix; none for a Blank.
        formed: whether the mix is formed, for what differs between the rows of a task.
    """

    def __init__(self, own: Own | None, mix: Mix, formed: bool) -> None:
        self.own, self.mix, self.formed = own, mix, formed
        self.bias = own is not None
        self._formed: dict[int, Tensor] = {}

    def times(self, x: Features) -> Tensor:
        c, terms = self.mix.coefficient, [] if self.own is None else [self.own.times(x)]
        if self.mix.bias is not None:
            terms.append((c @ self.mix.bias).unsqueeze(1))
        # what is the same in all rows first: one expansion instead of one for each
        for part in sorted(range(len(x.parts)), key=lambda i: not isinstance(x.parts[i], PerTask)):
            rows, slots = x.parts[part].rows(), x.slices(self.mix.weight)[part]
            if self._apart(x, part):
                terms.append(_spread(rows, c) @ slots.flatten(0, 1))
            else:
                terms.append(torch.bmm(rows, self._matrix(slots, x.starts[part])))
        total, *others = terms
        for term in others:
            total = total + term
        return total

    def input_delta(self, delta: Tensor, x: Features, part: int) -> Tensor:
        slots = x.slices(self.mix.weight)[part]
        if self._apart(x, part):
            out = _spread(delta, self.mix.coefficient) @ slots.transpose(1, 2).flatten(0, 1)
        else:
            out = inner(delta, self._matrix(slots, x.starts[part]))
        return out if self.own is None else out + self.own.input_delta(delta, x, part)

    def weights(self) -> tuple[Tensor, Tensor]:
        weight = _form(self.mix.weight, self.mix.coefficient)
        if self.own is None or self.mix.bias is None:
            return weight, weight.new_zeros(len(weight), 1, weight.shape[2])
        w, b = self.own.weights()
        return w + weight, b + (self.mix.coefficient @ self.mix.bias).unsqueeze(1)

    def _apart(self, x: Features, part: int) -> bool:
        return not self.formed or isinstance(x.parts[part], PerTask)

    def _matrix(self, slots: Tensor, first: int) -> Tensor:
        """Σ_k c_k M_k [b, d_part, h] for the inputs from `first` on; formed once."""
        if first not in self._formed:
            self._formed[first] = _form(slots, self.mix.coefficient)
        return self._formed[first]


def _form(slots: Tensor, c: Tensor) -> Tensor:
    """Σ_k c_k M_k [b, d, h]."""
    if len(slots) > 2:
        return (c @ slots.flatten(1)).view(-1, *slots.shape[1:])
    first, *second = (c[:, k, None, None] * m for k, m in enumerate(slots))  # a product over two is slow (measured)
    return first.add_(second[0]) if second else first


def _spread(x: Tensor, c: Tensor) -> Tensor:
    """c ⊗ x [b, R, K · d]: the rows once a slot, times the task's share of it."""
    return (x.unsqueeze(2) * c[:, None, :, None]).flatten(2)
