"""Inner products of weighted bags of indices: what `x xᵀ` is when x is one-hot or multi-hot.

Shape letters: b tasks, R and S rows, M and N values of a bag, V indices of a vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from distmeta.tasks import Bag

SMALL_VOCABULARY = 64
"""Up to this many indices the multi-hot matrices have a column for each; above, for those that the task has."""
AT_ONCE = 1 << 20
"""Elements of multi-hot matrices that are made at once, so that they stay in the processor's cache."""


def overlap(rows: Bag, others: Bag, size: int, dtype: torch.dtype) -> Tensor:
    """Σ_m Σ_n w_m w'_n [index_m = index'_n] for every pair of rows: [b, R, S].

    Args:
        rows: bags of shape [b, R, M]; `others`: [b, S, N]; weight None means one.
        size: number of indices of the field.
        dtype: of the result (indices have none).
    """
    q, s = rows.index, others.index
    if q.shape[-1] == 1 and s.shape[-1] == 1:
        same = (q == s.transpose(1, 2)).to(dtype)
        return (
            same
            if rows.weight is None or others.weight is None
            else same * (rows.weight * others.weight.transpose(1, 2))
        )
    if size > SMALL_VOCABULARY:
        q, s, size = _local(q, s)
    qw, sw = _weights(rows, dtype), _weights(others, dtype)
    tasks = max(1, AT_ONCE // max(1, (q.shape[1] + s.shape[1]) * size))
    parts = zip(*(t.split(tasks) for t in (q, qw, s, sw)), strict=True)
    return torch.cat([torch.bmm(_hot(i, w, size), _hot(j, v, size).transpose(1, 2)) for i, w, j, v in parts])


def _local(q: Tensor, s: Tensor) -> tuple[Tensor, Tensor, int]:
    """The same indices numbered anew within each task, from 0 in order, and the most that a task has."""
    both = torch.cat([q.flatten(1), s.flatten(1)], 1)
    values, order = both.sort(1)
    number = F.pad((values[:, 1:] != values[:, :-1]).cumsum(1), (1, 0))
    local = torch.empty_like(both).scatter_(1, order, number)
    a, b = local.split([q.shape[1] * q.shape[2], s.shape[1] * s.shape[2]], 1)
    return a.view(q.shape), b.view(s.shape), int(number[:, -1].max()) + 1


def _weights(bag: Bag, dtype: torch.dtype) -> Tensor:
    return torch.ones(bag.index.shape, dtype=dtype, device=bag.index.device) if bag.weight is None else bag.weight


def _hot(index: Tensor, weight: Tensor, size: int) -> Tensor:
    return weight.new_zeros(*index.shape[:-1], size).scatter_add_(-1, index, weight)
