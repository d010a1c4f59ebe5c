"""Inner products of weighted bags of indices: what `x xᵀ` is when x is one-hot or multi-hot.

Shape letters: b tasks, R and S rows, M values of a bag.
"""

import torch
from torch import Tensor

from distmeta.tasks import Bag

DENSE_VOCABULARY = 64
"""Up to this many indices a multi-hot matrix and one product beat comparing value by value."""


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
    if size <= DENSE_VOCABULARY:
        return torch.bmm(_dense(rows, size, dtype), _dense(others, size, dtype).transpose(1, 2))
    qw, sw = _weights(rows, dtype), _weights(others, dtype)
    total = torch.zeros(q.shape[0], q.shape[1], s.shape[1], dtype=dtype, device=q.device)
    for m in range(q.shape[-1]):
        for n in range(s.shape[-1]):
            product = qw[:, :, m, None] * sw[:, None, :, n]
            total += product.masked_fill_(q[:, :, m, None] != s[:, None, :, n], 0)
    return total


def _weights(bag: Bag, dtype: torch.dtype) -> Tensor:
    return torch.ones(bag.index.shape, dtype=dtype, device=bag.index.device) if bag.weight is None else bag.weight


def _dense(bag: Bag, size: int, dtype: torch.dtype) -> Tensor:
    hot = torch.zeros(*bag.index.shape[:-1], size, dtype=dtype, device=bag.index.device)
    return hot.scatter_add_(-1, bag.index, _weights(bag, dtype))
