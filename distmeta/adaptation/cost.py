"""Which form a dense layer's fast weights get: pairs, or a private weight matrix a task.

Both forms are exact; only their cost differs (adaptation.md, caveat 4). Counted are multiplications a task beyond
what both share, over the support passes and the query pass; the reverse pass scales both alike.

S support rows, Q query rows, T steps, d inputs, h outputs.
"""

from dataclasses import dataclass
from typing import Literal

from distmeta.adaptation.features import Features, Gathered, PerTask
from distmeta.adaptation.maps import Linear

WEIGHT_TRAFFIC = 40.0
"""Multiplications that cost as much time as writing, reading and differentiating one element of a private weight."""
SMALL_PRODUCT = 1.5
"""A product of one task's small matrices costs this much more a multiplication than one large shared product."""


def dual_cost(s: int, q: int, t: int, d: int, h: int, fixed: bool, base: int) -> float:
    """Multiplications of the dual form: Gram matrices and pair products, plus the shared product of later passes.

    Args:
        fixed: whether the layer's input is the same in every step (first layer over frozen features).
        base: inputs whose product with the shared weight is not hoisted out of the task.
    """
    shared = ((t - 1) * s + q) * base * h
    if fixed:
        grams = (s * s * d if t > 1 else 0) + q * s * d
        pairs = (t - 1) * s * s * h + q * s * h
    else:
        grams = (t * (t - 1) / 2 * s * s + t * q * s) * d
        pairs = (t * (t - 1) / 2 * s * s + t * q * s) * h
        grams *= 2  # δ W'ᵀ runs through the pairs as well
    return SMALL_PRODUCT * (grams + pairs) + shared


def private_cost(s: int, q: int, t: int, d: int, h: int) -> float:
    """Multiplications of the private form: the weight's updates and the products of later passes with it."""
    return SMALL_PRODUCT * (t * s * d * h + ((t - 1) * s + q) * d * h) + WEIGHT_TRAFFIC * t * d * h


@dataclass(frozen=True)
class Plan:
    """Sizes of a block, from which the form of each layer follows.

    Args:
        steps: inner steps T.
        query: query rows Q.
        form: 'auto' by cost; 'dual' or 'private' for all layers (benchmarks and tests).
    """

    steps: int
    query: int
    form: Literal["auto", "dual", "private"] = "auto"

    def private(self, layer: Linear, x: Features, rows: int) -> bool:
        """Whether `layer` gets private weights, given its support input and number of support rows."""
        if self.form != "auto":
            return self.form == "private"
        d, h = layer.weight.shape
        base = sum(p.width for p in x.parts if not isinstance(p, PerTask | Gathered))
        sizes = (rows, self.query, self.steps, d, h)
        return private_cost(*sizes) < dual_cost(*sizes, x.fixed, base)
