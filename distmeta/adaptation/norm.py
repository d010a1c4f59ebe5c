"""The squared norm of each task's inner gradient, without forming the gradient (adaptation.md, Gram trick).

For a dense layer with input x [S, d] and δ [S, h]  ‖xᵀδ‖² + ‖Σδ‖² = Σ (x xᵀ + 1) ∘ (δ δᵀ); for a table the overlap of
the bags stands for x xᵀ and there is no bias. A map used in several places has one gradient, their sum: so the places'
pairs all count, crosswise.
"""

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from distmeta.adaptation.features import Features
from distmeta.adaptation.maps import Linear, Map
from distmeta.adaptation.overlap import overlap
from distmeta.adaptation.products import inner
from distmeta.tasks import Bag


def squared_norm(records: Mapping[Map, list[tuple[Features | Bag, Tensor]]]) -> Tensor:
    """Σ over all maps of the squared norm of each task's gradient: [b], differentiable.

    Args:
        records: (input, δ) of every place of use of every adapted map, as `Tape.backward` gives them.
    """
    terms = []
    for m, places in records.items():
        for (x, delta), (other, its_delta) in product(places, places):
            if isinstance(m, Linear):
                assert isinstance(x, Features)
                assert isinstance(other, Features)
                gram = x.gram(other) + 1
            else:
                assert isinstance(x, Bag)
                assert isinstance(other, Bag)
                gram = overlap(x, other, m.weight.shape[0], delta.dtype)
            terms.append((gram * inner(delta, its_delta)).sum((1, 2)))
    return torch.stack(terms).sum(0)
