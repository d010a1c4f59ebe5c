"""Fine-tuning: a copy of a trained network for each task, moved by gradient steps on its support alone.

Nothing of it is learned, so that the steps carry no graph; the copies of a block's tasks move at once. They are whole
matrices, not pairs (adaptation/fast.py), as Adam's steps are not of low rank.

Shape letters: b tasks, R rows, d inputs, h outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distmeta.adaptation.fast import Private
from distmeta.adaptation.features import Features

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam: torch's defaults."""


@dataclass
class Weights:
    """The parameters that a network is run with: everybody's, or of some each task's own."""

    own: dict[int, Tensor] = field(default_factory=dict)
    """id of a parameter -> [b, …], its value for each task; of those that are everybody's there is none."""
    user: Tensor | None = None
    """[b, 1, width]: the features of each task's user, where they are its own."""

    def of(self, parameter: Tensor) -> Tensor:
        """The parameter, or [b, …]."""
        return self.own.get(id(parameter), parameter)

    def linear(self, layer: Any, x: Features) -> Tensor:
        """x W + b of a `Linear`: [b, R, h]; [b, 1, h] of features that are per task."""
        weight = self.of(layer.weight)
        if weight is layer.weight:
            return x.times(weight, layer.bias)
        return Private((weight,), self.of(layer.bias).unsqueeze(1), True).forward(x)


def fine_tuned(
    outputs: Callable[[Weights], Tensor],
    delta: Callable[[Tensor], Tensor],
    count: Tensor,
    parameters: Sequence[Tensor],
    user: Tensor | None,
    options: Any,
) -> Weights:
    """Each task's own weights after `options.steps` steps of size `options.local_lr`.

    What is descended is the mean loss of a task's support and, for what has moved by Δ, λ/n · |Δ|²/2 with
    λ = `options.tune_penalty`: ridge regression's compromise, in which few rows move little.

    Args:
        outputs: the network's outputs [b, R] for the support.
        delta: derivative of each task's mean loss by them.
        count: support rows n of each task [b].
        parameters: those that become each task's own.
        user: features of the tasks' users [b, 1, width], where they do too.
    """
    o = options
    leaves = [p.detach().expand(len(count), *p.shape) for p in parameters]
    leaves += [] if user is None else [user]
    start, moments = leaves, [(torch.zeros_like(x), torch.zeros_like(x)) for x in leaves]
    for step in range(o.steps):
        leaves = [x.detach().requires_grad_() for x in leaves]
        with torch.enable_grad():
            y = outputs(_weights(parameters, leaves))
        gradients = torch.autograd.grad(y, leaves, delta(y.detach()), materialize_grads=True)
        moved = []
        for x, x0, g, m in zip(leaves, start, gradients, moments, strict=True):
            pull = o.tune_penalty / count.clamp(min=1).view(-1, *[1] * (x.dim() - 1)).to(x)
            g = torch.addcmul(g, x.detach() - x0, pull)
            moved.append(x.detach() - o.local_lr * (_adam(g, m, step + 1) if o.tuner == "adam" else g))
        leaves = moved
    return _weights(parameters, leaves)


def _weights(parameters: Sequence[Tensor], leaves: Sequence[Tensor]) -> Weights:
    own = {id(p): x for p, x in zip(parameters, leaves, strict=False)}
    return Weights(own, leaves[-1] if len(leaves) > len(parameters) else None)


def _adam(gradient: Tensor, moments: tuple[Tensor, Tensor], step: int) -> Tensor:
    """The direction of Adam's step (Kingma & Ba, 2015); its moments are changed in place."""
    (b1, b2), (m, v) = BETAS, moments
    m.mul_(b1).add_(gradient, alpha=1 - b1)
    v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    return (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + EPSILON)
