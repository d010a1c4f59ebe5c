"""Logistic regression on counts: a probability from numbers that order clicks but are none."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

STEPS = 100
TOLERANCE = 1e-12
ROUNDING = 1e-9
"""So much more loss is none: at the end steps are too small for a sum to tell."""
CONSTANT = 1e-9
"""An x that varies less than this, by its size, does not vary but for rounding."""


def fit_logistic(x: Tensor, clicks: Tensor, count: Tensor) -> Tensor:
    """(a, b) of p(click) = sigmoid(a + b · x), float64 [1 + k]: most likely under a weak prior, by Newton's method.

    The prior weighs as one observation: the mean click at the mean x, and b = 1 in standard deviations of x. So
    nothing diverges where x parts the clicks, and where nothing is known a larger x still means a likelier click.

    Args:
        x: float64 [n, k]. clicks: float64 [n], how many of `count` [n] observations at x are clicks.
    """
    share = (count / count.sum().clamp_min(torch.finfo(x.dtype).tiny))[:, None]
    mean = (share * x).sum(0)
    spread = (share * (x - mean).square()).sum(0).sqrt()
    spread = torch.where(spread > CONSTANT * (1 + mean.abs()), spread, 1.0)
    z = torch.cat((torch.ones_like(x[:, :1]), (x - mean) / spread), 1)
    rate = (clicks.sum() + 0.5) / (count.sum() + 1)
    w = _newton(z, clicks, count, torch.cat((rate.logit()[None], torch.ones_like(mean))))
    slope = w[1:] / spread
    return torch.cat(((w[0] - slope @ mean)[None], slope))


def _newton(z: Tensor, clicks: Tensor, count: Tensor, prior: Tensor) -> Tensor:
    """The w [k] with the least loss of sigmoid(z w) and distance to `prior`; a step that does not help is halved."""

    def loss(w: Tensor) -> Tensor:
        s = z @ w
        return (clicks * softplus(-s) + (count - clicks) * softplus(s)).sum() + (w - prior).square().sum() / 2

    w = prior
    for _ in range(STEPS):
        p = (z @ w).sigmoid()
        gradient = z.T @ (count * p - clicks) + (w - prior)
        hessian = z.T @ (z * (count * p * (1 - p))[:, None]) + torch.eye(len(w), dtype=z.dtype, device=z.device)
        step = torch.linalg.solve(hessian, gradient)
        worse = loss(w) * (1 + ROUNDING)
        while not loss(w - step) <= worse:
            step = step / 2
        w = w - step
        if float(step.abs().max()) <= TOLERANCE * (1 + float(w.abs().max())):
            break
    return w
