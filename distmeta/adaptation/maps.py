"""The linear maps that an inner loop can adapt: dense layers and embedding tables."""

import math

import torch
from torch import nn


class Linear(nn.Module):
    """z = x W + b with W [d, h]; a place holder of parameters, applied by `tape.Tape.linear`.

    W is stored inputs first, so that every product of the dual form reads it as the formulas are written.
    Both start uniform within ±1/√d, as torch.nn.Linear's do.
    """

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(d)
        self.weight = nn.Parameter(torch.empty(d, h).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(h).uniform_(-bound, bound))


class Table(nn.Module):
    """Embeddings [V, e] of one field: a linear map of a one-hot, multi-hot or scalar input; lookup.py applies it."""

    def __init__(self, size: int, width: int, scale: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, width) * scale)


Map = Linear | Table
