"""The linear maps that an inner loop can adapt: dense layers and embedding tables."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """z = x W + b with W [d, h]; a place holder of parameters, applied by `tape.Tape.linear`.

    W is stored inputs first, so that every product of the dual form reads it as the formulas are written.
    Both start uniform within ±1/√d, as torch.nn.Linear's do.
    """

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.shape = d, h
        bound = 1 / math.sqrt(d)
        self.weight = nn.Parameter(torch.empty(d, h).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(h).uniform_(-bound, bound))


class Blank(nn.Module):
    """z = x W_u of shape [d, h] without a bias, for a layer that has no weights of its own: each task brings its own
    to start from (a `Mix`)."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.shape = d, h


class Table(nn.Module):
    """Embeddings [V, e] of one field: a linear map of a one-hot, multi-hot or scalar input; lookup.py applies it."""

    def __init__(self, size: int, width: int, scale: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, width) * scale)


Layer = Linear | Blank
Map = Layer | Table


@dataclass(frozen=True)
class Mix:
    """Weights of its own that each task starts from: W_u = W + Σ_k c_uk M_k, and its bias likewise (paper 003, Eq. 4,
    7 and 9). W is the layer's, 0 for a Blank. Neither c nor M carries a graph."""

    coefficient: Tensor
    """c [b, K]."""
    weight: Tensor
    """M [K, d, h]."""
    bias: Tensor | None
    """[K, h]; None for a Blank."""


@dataclass(frozen=True)
class Each:
    """A step size for every parameter of a map (Meta-SGD, Li et al. 2017)."""

    weight: Tensor
    """Like the map's weight."""
    bias: Tensor | None = None
    """Like a dense layer's bias; None for a table."""


Rate = Tensor | float | Each
"""Step size of a map: a number; a tensor that broadcasts against [b, R, S], so a scalar or, personal, [b, 1, 1]; or
one for each parameter."""
