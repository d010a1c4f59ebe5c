"""Backbones that a hybrid context modulates (paper 002, §3.1, §3.4): CMML's four ways to adapt without a gradient.

Each is an MLP on the features of user and item side by side, with one output a row, and a network that maps the
hybrid context C_h to what changes in it. Where C_h is the same in all rows of a task, so is that, and it is made once.
The activation of the backbone's layers is the (leaky) ReLU and comes after the modulation, as in the authors' code.

Shape letters: b tasks, R rows, d inputs, h units of a layer, k layers, m modules.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmeta.adaptation.features import Features
from distmeta.adaptation.maps import Linear
from distmeta.methods.contexts import linear
from distmeta.networks import wide_path


class Hyper(nn.Module):
    """The modulation network (§7.2.1): ReLU layers on C_h, after each of which a linear map gives the values for the
    backbone's layer at that depth.

    Args:
        outputs: how many values at each depth; 0: none there.
        bias: what all its biases start from.
    """

    def __init__(self, d: int, width: int, outputs: Sequence[int], bias: float) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(Linear(a, width) for a in (d, *[width] * (len(outputs) - 1)))
        self.heads = nn.ModuleList(Linear(width, n) if n else nn.Identity() for n in outputs)
        with torch.no_grad():
            for layer in (*self.trunk, *self.heads):
                if isinstance(layer, Linear):
                    layer.bias.fill_(bias)

    def forward(self, hybrid: Features) -> list[Tensor]:
        """Values [b, R or 1, n] of each depth that has any."""
        h, found = hybrid, []
        for layer, last in zip(self.trunk, self.heads, strict=True):
            h = torch.relu(linear(layer, h))
            if isinstance(last, Linear):
                found.append(linear(last, h))
        return found


class Backbone(nn.Module, ABC):
    """What the four share: `slope` of the leaky ReLU, and the layers of an MLP."""

    def __init__(self, d: int, options: Any, start: float) -> None:
        """`start`: the output to begin with."""
        super().__init__()
        self.slope, self.start = options.leaky, start
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise([d, *options.hidden]))
        self.wide = wide_path(d, 1) if options.wide else None
        if self.wide is not None and options.hybrid == "dot":
            nn.init.ones_(self.wide.weight)  # the inner product of C and the row, as matrix factorisation has it

    def forward(self, x: Features, hybrid: Features) -> Tensor:
        """Outputs [b, R] of rows with features x and hybrid context C_h, both [b, R, d]."""
        deep = self.output(x, hybrid)
        return deep if self.wide is None else deep + linear(self.wide, hybrid).squeeze(-1)

    @abstractmethod
    def output(self, x: Features, hybrid: Features) -> Tensor:
        """`forward` without the wide path."""

    def act(self, z: Tensor) -> Tensor:
        return F.leaky_relu(z, self.slope) if self.slope else torch.relu(z)

    def deep(self, x: Features, changes: Sequence[Any]) -> Tensor:
        """The last layer's units [b, R, h], each layer's changed by its function before the activation."""
        first, *others = zip(self.layers, changes, strict=True)
        h = self.act(first[1](linear(first[0], x)))
        for layer, change in others:
            h = self.act(change(linear(layer, h)))
        return h


class WeightModulation(Backbone):
    """Linear (Eq. 9): the hypernetwork generates the weights and the bias of the last linear layer."""

    def __init__(self, d: int, options: Any, start: float) -> None:
        super().__init__(d, options, start)
        width = options.hidden[-1]
        depth = len(options.hidden)
        self.hyper = Hyper(d, options.hyper, [*[0] * (depth - 1), width + 1], options.hyper_bias)
        with torch.no_grad():
            self.hyper.heads[-1].bias[-1] = start  # type: ignore[index]

    def output(self, x: Features, hybrid: Features) -> Tensor:
        (w,) = self.hyper(hybrid)
        h = self.deep(x, [_same] * len(self.layers))
        return (h * w[..., :-1]).sum(-1) + w[..., -1]


class LayerModulation(Backbone):
    """Each layer's units are changed before their activation, by values that the hypernetwork generates."""

    values = 1
    """How many a unit."""

    def __init__(self, d: int, options: Any, start: float) -> None:
        super().__init__(d, options, start)
        self.hyper = Hyper(d, options.hyper, [self.values * h for h in options.hidden], options.hyper_bias)
        self.last = Linear(options.hidden[-1], 1)
        with torch.no_grad():
            self.last.bias.fill_(start)

    @abstractmethod
    def change(self, values: Tensor, z: Tensor) -> Tensor:
        """The units z [b, R, h] under their values [b, R or 1, values · h]."""

    def output(self, x: Features, hybrid: Features) -> Tensor:
        changes = [lambda z, v=v: self.change(v, z) for v in self.hyper(hybrid)]
        return linear(self.last, self.deep(x, changes)).squeeze(-1)


class SigmoidModulation(LayerModulation):
    """Sigmoid (Eq. 10): units times weights between 0 and 1."""

    def change(self, values: Tensor, z: Tensor) -> Tensor:
        return torch.sigmoid(values) * z


class FiLM(LayerModulation):
    """FiLM (Eq. 11; Perez et al. 2018): units times weights plus biases; with `one_plus`, times 1 + weights."""

    values = 2

    def __init__(self, d: int, options: Any, start: float) -> None:
        super().__init__(d, options, start)
        self.one_plus = options.one_plus

    def change(self, values: Tensor, z: Tensor) -> Tensor:
        weight, bias = values.chunk(2, -1)
        changed = torch.addcmul(bias, weight, z)
        return changed + z if self.one_plus else changed


class SoftModularization(Backbone):
    """Soft modularization (Eq. 12, 13; Yang et al. 2020): k layers of m small modules, mixed along routes.

    The first layer's modules all see x; module i of each further layer sees Σ_j p_ij (output of module j before it),
    the output layer Σ_j p_j of the last. p is a softmax over the sources j, as the authors' code and Yang et al. have
    it; Eq. 12 as printed normalises over the destinations.
    """

    def __init__(self, d: int, options: Any, start: float) -> None:
        super().__init__(d, options, start)
        k, m, width = options.module_layers, options.modules, options.module_width
        self.m, self.width = m, width
        self.layers = nn.ModuleList([Linear(d, m * width)])
        self.modules_ = nn.ModuleList(Modules(m, width) for _ in range(k - 1))
        self.hyper = Hyper(d, options.hyper, [*[m * m] * (k - 1), m], options.hyper_bias)
        self.last = Linear(width, 1)
        with torch.no_grad():
            self.last.bias.fill_(start)

    def routes(self, hybrid: Features) -> list[Tensor]:
        """Route probabilities: of each of the k − 1 transitions [b, R or 1, m, m], destinations by sources, and of the
        output [b, R or 1, 1, m]."""
        return [v.unflatten(-1, (-1, self.m)).softmax(-1) for v in self.hyper(hybrid)]

    def output(self, x: Features, hybrid: Features) -> Tensor:
        *routes, out = self.routes(hybrid)
        (first,) = self.layers
        h = self.act(linear(first, x)).unflatten(-1, (self.m, self.width))
        for route, layer in zip(routes, self.modules_, strict=True):
            h = self.act(layer(route @ h))
        # the output layer is linear: mixed is what it makes of each module, one number instead of a vector
        each = linear(self.last, h).squeeze(-1)
        return (out.squeeze(-2) * each).sum(-1)


class Modules(nn.Module):
    """m linear maps side by side: [b, R, m, w] -> [b, R, m, w], the i-th on the i-th."""

    def __init__(self, m: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(m, width, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(m, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("brmi,mio->brmo", x, self.weight) + self.bias


def _same(z: Tensor) -> Tensor:
    return z
