"""The squared norm of each task's inner gradient, without forming the gradient where that costs more.

For a dense layer with input x [S, d] and δ [S, h]  ‖xᵀδ‖² + ‖Σδ‖² = Σ (x xᵀ + 1) ∘ (δ δᵀ)  (adaptation.md, Gram
trick). The Gram matrices take S² (d + h) multiplications, the gradient itself S d h: many rows or a narrow layer make
it the cheaper one. A part of x that is the same in all rows needs neither: its share is ‖x‖² ‖Σδ‖². For a table the
overlap of the bags stands for x xᵀ, and there is no bias. A map used in several places has one gradient, their sum: so
the places' pairs all count, crosswise.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from distmeta.adaptation.features import Features, PerTask
from distmeta.adaptation.maps import Map, Table
from distmeta.adaptation.overlap import overlap
from distmeta.adaptation.products import inner, outer
from distmeta.tasks import Bag

Place = tuple[Features | Bag, Tensor]
"""(input, δ) of one place of use."""


def squared_norm(records: Mapping[Map, Sequence[Place]]) -> Tensor:
    """Σ over all maps of the squared norm of each task's gradient: [b], differentiable.

    Args:
        records: (input, δ) of every place of use of every adapted map, as `Tape.backward` gives them.
    """
    terms = []
    for m, places in records.items():
        if not isinstance(m, Table) and len(places) == 1:
            terms.append(_of_layer(*places[0]))
        else:
            terms += [(_gram(m, x, y) * inner(d, e)).sum((1, 2)) for (x, d), (y, e) in product(places, places)]
    return torch.stack(terms).sum(0)


def _of_layer(x: Features | Bag, delta: Tensor) -> Tensor:
    """The squared norm [b] of a dense layer's gradient, from its only place."""
    assert isinstance(x, Features)
    total = delta.sum(1)
    same = [p.x.square().sum((1, 2)) for p in x.parts if isinstance(p, PerTask)]
    norm = total.square().sum(1) * sum(same, start=delta.new_ones(()))
    rows, h, crosses = delta.shape[1], delta.shape[2], None
    for part in x.parts:
        if isinstance(part, PerTask):
            continue
        y = part.rows()
        if rows * (part.width + h) < part.width * h:
            crosses = inner(delta, delta) if crosses is None else crosses
            norm = norm + (inner(y, y) * crosses).sum((1, 2))
        else:
            norm = norm + outer(y, delta).square().sum((1, 2))
    return norm


def _gram(m: Map, x: Features | Bag, y: Features | Bag) -> Tensor:
    if isinstance(m, Table):
        assert isinstance(x, Bag)
        assert isinstance(y, Bag)
        return overlap(x, y, m.weight.shape[0], m.weight.dtype)
    assert isinstance(x, Features)
    assert isinstance(y, Features)
    return x.gram(y) + 1
