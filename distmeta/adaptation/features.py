"""Rows of features before they are expanded.

A row's input is parts side by side: what is constant within a task (the user's half), what repeats across tasks
(items: each unique item once, and an index), and what is neither. Products with a shared weight are done on the
small form and expanded afterwards: the user's half is projected once a task, an item once a batch.

Shape letters: b tasks, R rows, U unique items, d inputs, h outputs.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmeta.adaptation import products
from distmeta.adaptation.lookup import gather


class _Expanded:
    """A part that holds its rows."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.count, self.width = x.shape[1:]

    def rows(self) -> Tensor:
        return self.x

    def product(self, weight: Tensor, whole: Tensor, first: int) -> Tensor:
        return products.affine(self.x, weight)


class PerTask(_Expanded):
    """A part that is the same in every row of a task: x [b, 1, d]."""

    def at(self, task: Tensor, row: Tensor) -> "Gathered":
        return Gathered(Unique(self.x.squeeze(1)), task.unsqueeze(0))


class Dense(_Expanded):
    """A part with a value of its own in each row: x [b, R, d]."""

    def at(self, task: Tensor, row: Tensor) -> "Dense":
        return Dense(gather(self.x.flatten(0, 1), (task * self.x.shape[1] + row).unsqueeze(0)))


@dataclass
class Unique:
    """Features of the batch's unique items [U, d], shared by all blocks, and their products with shared weights."""

    x: Tensor
    products: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)

    def product(self, weight: Tensor, whole: Tensor, first: int) -> Tensor:
        """x @ weight, computed once a batch, for weight = whole[first : first + d] (a slice is a new tensor each time).

        A product made without a graph must not serve where one is needed, hence the third part of the key.
        """
        k = (id(whole), first, torch.is_grad_enabled())
        if k not in self.products:
            self.products[k] = products.affine(self.x, weight)
        return self.products[k]

    def detach(self) -> "Unique":
        return Unique(self.x.detach())


class Gathered:
    """A part whose rows are unique items: row r of a task is unique.x[index[r]]; index [b, R]."""

    def __init__(self, unique: Unique, index: Tensor) -> None:
        self.unique = unique
        self.index = index
        self.count, self.width = index.shape[1], unique.x.shape[-1]
        self._rows: Tensor | None = None

    def rows(self) -> Tensor:
        if self._rows is None:
            self._rows = gather(self.unique.x, self.index)
        return self._rows

    def product(self, weight: Tensor, whole: Tensor, first: int) -> Tensor:
        return gather(self.unique.product(weight, whole, first), self.index)

    def at(self, task: Tensor, row: Tensor) -> "Gathered":
        return Gathered(self.unique, self.index[task, row].unsqueeze(0))


class Scaled:
    """A part times a number of each row: by [b, R, 1]."""

    def __init__(self, part: "Part", by: Tensor) -> None:
        self.part = part
        self.by = by
        self.count, self.width = by.shape[1], part.width

    def rows(self) -> Tensor:
        return self.part.rows() * self.by

    def product(self, weight: Tensor, whole: Tensor, first: int) -> Tensor:
        return self.part.product(weight, whole, first) * self.by

    def at(self, task: Tensor, row: Tensor) -> "Scaled":
        return Scaled(self.part.at(task, row), Dense(self.by).at(task, row).x)


Part = PerTask | Dense | Gathered | Scaled
"""Each has `count` (R, or 1), `width`, `rows()` [b, R or 1, d] and `product(weight, whole, first)`
[b, R or 1, h], where weight [d, h] is the slice of `whole` that starts at row `first`; `at(task, row)` is a part of one
task, of the rows [N] named."""


class Features:
    """Rows of a layer's input: parts side by side, d = Σ widths."""

    def __init__(self, *parts: Part, fixed: bool = False) -> None:
        self.parts = parts
        self.fixed = fixed
        """Whether the rows stay what they are while the task adapts."""
        self.starts = [sum(p.width for p in parts[:i]) for i in range(len(parts))]
        self._products: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    @property
    def rows(self) -> int:
        """R; 1 where every part is per task."""
        return next((p.count for p in self.parts if p.count != 1), 1)

    def at(self, task: Tensor, row: Tensor) -> "Features":
        """Of the rows named (int64 [N] each), as if of one task: [1, N, d]."""
        return Features(*(p.at(task, row) for p in self.parts))

    def slices(self, weight: Tensor) -> list[Tensor]:
        """The rows of weight [..., d, h] that belong to each part."""
        return list(weight.split([p.width for p in self.parts], dim=-2))

    def times(self, weight: Tensor, bias: Tensor) -> Tensor:
        """x @ weight + bias [b, R, h] for a shared weight [d, h]; [b, 1, h] where every part is per task.

        Kept where the rows stand still: every step starts from it. Not to be overwritten.
        """
        if not self.fixed:
            return self._times(weight, bias)
        key = (id(weight), torch.is_grad_enabled())
        if key not in self._products:
            self._products[key] = (weight, self._times(weight, bias))  # weight is held, so its id stays its own
        return self._products[key][1]

    def _times(self, weight: Tensor, bias: Tensor) -> Tensor:
        if len(self.parts) == 1 and isinstance(self.parts[0], Dense):
            return products.affine(self.parts[0].x, weight, bias)  # one pass over z instead of two
        slices = zip(self.parts, self.slices(weight), self.starts, strict=True)
        return total([bias, *(p.product(w, weight, first) for p, w, first in slices)])

    def gram(self, other: "Features") -> Tensor:
        """x x'ᵀ [b, R, S] with the rows of `other`, part by part; a per-task part adds one number a task."""
        return total([inner(p, q) for p, q in zip(self.parts, other.cut_like(self), strict=True)])

    def cut_like(self, other: "Features") -> tuple[Part, ...]:
        """The same rows in parts of the other's widths: a shared map may see differently divided inputs."""
        widths = [p.width for p in other.parts]
        if widths == [p.width for p in self.parts]:
            return self.parts
        return tuple(Dense(x) for x in self.dense().split(widths, dim=-1))

    def dense(self) -> Tensor:
        """The expanded input [b, R, d]."""
        rows = self.rows
        expanded = [p.rows().expand(-1, rows, -1) for p in self.parts]
        return expanded[0] if len(expanded) == 1 else torch.cat(expanded, dim=-1)


def inner(p: Part, q: Part) -> Tensor:
    """Inner products of the rows of two parts: [b, R, S], or [b, 1, 1] where both are per task."""
    if isinstance(p, PerTask) and isinstance(q, PerTask):
        return (p.x * q.x).sum(-1, keepdim=True)
    return products.inner(p.rows(), q.rows())


def total(terms: list[Tensor]) -> Tensor:
    """The sum of tensors that broadcast against each other."""
    # the small, broadcast terms first: one expansion instead of one for each
    total, *others = sorted(terms, key=lambda t: t.numel())
    for term in others:
        total = term + total
    return total
