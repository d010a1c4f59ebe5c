"""What the fast weights of a dense layer start from: the shared weights, or a mix of slots that is each task's own.

A mix is kept apart, as products with K slots that are summed in one product: x Σ_k c_k M_k = (c ⊗ x) [M_1; …; M_K].
That costs K products a row and no weight matrix a task (adaptation.md, Personal initial weights).

Shape letters: b tasks, R rows, d inputs, h outputs, K slots.
"""

from typing import Protocol

import torch
from torch import Tensor

from distmeta.adaptation.features import Features, PerTask
from distmeta.adaptation.maps import Linear, Mix


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
        return torch.matmul(delta, x.slices(self.layer.weight)[part].t())

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.layer.weight, self.layer.bias


class Mixed:
    """Weights that are each task's own.

    Args:
        own: the shared ones beneath the mix; none for a Blank.
    """

    def __init__(self, own: Own | None, mix: Mix) -> None:
        self.own, self.mix = own, mix
        self.bias = own is not None

    def times(self, x: Features) -> Tensor:
        c, terms = self.mix.coefficient, [] if self.own is None else [self.own.times(x)]
        if self.mix.bias is not None:
            terms.append((c @ self.mix.bias).unsqueeze(1))
        # what is the same in all rows first: one expansion instead of one for each
        for p, m in sorted(zip(x.parts, x.slices(self.mix.weight), strict=True), key=_rows):
            terms.append(_mixed(p.rows(), c) @ m.flatten(0, 1))
        total, *others = terms
        for term in others:
            total = total + term
        return total

    def input_delta(self, delta: Tensor, x: Features, part: int) -> Tensor:
        slots = x.slices(self.mix.weight)[part].transpose(1, 2).flatten(0, 1)
        out = _mixed(delta, self.mix.coefficient) @ slots
        return out if self.own is None else out + self.own.input_delta(delta, x, part)

    def weights(self) -> tuple[Tensor, Tensor]:
        c, slots = self.mix.coefficient, self.mix.weight
        weight = (c @ slots.flatten(1)).view(-1, *slots.shape[1:])
        if self.own is None or self.mix.bias is None:
            return weight, weight.new_zeros(len(weight), 1, weight.shape[2])
        w, b = self.own.weights()
        return w + weight, b + (c @ self.mix.bias).unsqueeze(1)


def _rows(of: tuple[object, Tensor]) -> bool:
    return not isinstance(of[0], PerTask)


def _mixed(x: Tensor, c: Tensor) -> Tensor:
    """c ⊗ x [b, R, K · d]: the rows once a slot, times the task's share of it."""
    return (x.unsqueeze(2) * c[:, None, :, None]).flatten(2)
