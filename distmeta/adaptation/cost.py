"""Which form a dense layer's fast weights get: pairs, or a private weight matrix a task.

Both forms are exact; only their cost differs (adaptation.md, caveat 4). Counted are multiplications a task beyond
what both share, over the support passes and the query pass; the reverse pass scales both alike. The constants are
fitted to measurements of every combination of forms (MLP 256-64-64-1, support 15 to 60, 1 to 5 steps, one thread):
with them the choice is the fastest combination, or within 3 % of it.

S support rows, Q query rows, T steps, d inputs, h outputs.
"""

from dataclasses import dataclass
from typing import Literal

from distmeta.adaptation.features import Features, Gathered, PerTask
from distmeta.adaptation.maps import Layer

WEIGHT_TRAFFIC = 10.0
"""Multiplications that cost as much time as writing, reading and differentiating one element of a private weight."""
FORMED_TRAFFIC = 25.0
"""The same of a mix that is formed, which no gradient is wanted of (fitted to MAMO's 200-100 layer, 15 + 5 rows, one
step: two slots are a tie, with three forming is faster)."""
PRIVATE_PRODUCT = 1.15
"""A batched product with private weights costs this much more a multiplication than one large shared product."""
PAIR_PRODUCT = 2.2
"""So much more costs a product of the pairs, whose matrices are smaller still: Q × S."""


def dual_cost(s: int, q: int, t: int, d: int, h: int, fixed: bool, base: int) -> float:
    """Multiplications of the dual form: Gram matrices and pair products, plus the shared product of later passes.

    Args:
        d: inputs that differ between the rows of a task; the others add one number to its Gram matrix.
        fixed: whether the layer's input is the same in every step (first layer over frozen features), so that its
            pairs add up and its shared product is taken once.
        base: inputs whose product with the shared weight is not hoisted out of the task.
    """
    if fixed:
        products = ((s * s if t > 1 else 0) + q * s) * d + ((t - 1) * s * s + q * s) * h
        return PAIR_PRODUCT * products + q * base * h
    pairs = t * (t - 1) / 2 * s * s + t * q * s
    # δ W'ᵀ runs through the pairs as well, hence 2 d
    return PAIR_PRODUCT * pairs * (2 * d + h) + ((t - 1) * s + q) * base * h


def private_cost(s: int, q: int, t: int, d: int, h: int, stored: int) -> float:
    """Multiplications of the private form: the weight's updates and the products of later passes with it.

    Args:
        d: inputs that differ between the rows of a task; `stored`: all of them.
    """
    return PRIVATE_PRODUCT * (t * s + (t - 1) * s + q) * d * h + WEIGHT_TRAFFIC * t * stored * h


def mix_costs(s: int, q: int, t: int, d: int, h: int, stored: int, slots: int) -> tuple[float, float]:
    """What a layer that starts from a mix of slots costs besides pairs: kept apart, and formed into a weight a task.

    Apart, every pass and every δ W'ᵀ takes a product with each slot; formed, it takes one, and each of the weight's
    elements costs as many multiplications as there are slots, and its traffic. What is the same in all rows of a task
    stays apart: it has one row.
    """
    rows, same = (2 * t * s + q) * d, (2 * t + 1) * (stored - d) * slots
    return (rows * slots + same) * h, (PRIVATE_PRODUCT * rows + (slots + FORMED_TRAFFIC) * d + same) * h


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

    def private(self, layer: Layer, x: Features, rows: int, slots: int = 0) -> bool:
        """Whether `layer` gets private weights, given its support input and number of support rows.

        Args:
            slots: of the mix that it starts from.
        """
        if self.form != "auto":
            return self.form == "private"
        stored, h, d = *layer.shape, _varying(x)
        base = sum(p.width for p in x.parts if not isinstance(p, PerTask | Gathered))
        sizes = (rows, self.query, self.steps, d, h)
        more = min(mix_costs(*sizes, stored, slots)) if slots else 0.0
        begun = (slots + WEIGHT_TRAFFIC) * stored * h if slots else 0.0  # weights are private in the first pass too
        return private_cost(*sizes, stored) + begun < dual_cost(*sizes, x.fixed, base) + more

    def formed(self, layer: Layer, x: Features, rows: int, slots: int) -> bool:
        """Whether the mix that a layer in dual form starts from is formed into a matrix a task; see `private`."""
        if self.form != "auto":
            return False
        apart, formed = mix_costs(rows, self.query, self.steps, _varying(x), layer.shape[1], layer.shape[0], slots)
        return formed < apart


def _varying(x: Features) -> int:
    """Inputs that differ between the rows of a task."""
    return sum(p.width for p in x.parts if not isinstance(p, PerTask))
