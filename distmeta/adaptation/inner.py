"""The inner loop: steps of gradient descent on the support loss of every task of a block at once."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distmeta.adaptation.cost import Plan
from distmeta.adaptation.fast import FastWeights
from distmeta.adaptation.maps import Layer, Map, Mix, Rate
from distmeta.adaptation.tape import Node, Records, Tape
from distmeta.tasks import Rows


def squared_error(prediction: Tensor, rows: Rows) -> Tensor:
    """Mean squared error of each task over its real rows: [b] from predictions [b, R]; 0 for a task without rows."""
    return ((prediction - rows.label).square() * _share(rows, prediction.dtype)).sum(1)


def squared_error_delta(prediction: Tensor, rows: Rows) -> Tensor:
    """∂ squared_error / ∂ prediction: [b, R]; 0 on padding, so that padding moves nothing."""
    return (prediction - rows.label) * _share(rows, prediction.dtype).mul_(2)


def cross_entropy(logit: Tensor, rows: Rows) -> Tensor:
    """Mean cross-entropy of each task's clicks over its real rows: [b] from logits [b, R]; 0 without rows."""
    losses = F.binary_cross_entropy_with_logits(logit, rows.label, reduction="none")
    return (losses * _share(rows, logit.dtype)).sum(1)


def cross_entropy_delta(logit: Tensor, rows: Rows) -> Tensor:
    """∂ cross_entropy / ∂ logit: [b, R]; 0 on padding."""
    return (torch.sigmoid(logit) - rows.label) * _share(rows, logit.dtype)


def _share(rows: Rows, dtype: torch.dtype) -> Tensor:
    """1/n on a task's n real rows, 0 on padding: [b, R]."""
    return rows.mask.to(dtype).div_(rows.mask.sum(1, keepdim=True).clamp_(min=1))


@dataclass(frozen=True)
class Turn:
    """One step: the rows that it looks at, and what predicts them."""

    forward: Callable[[Tape], Node]
    """Predicts the rows on a tape: a node of value [b, S, C]."""
    rows: Rows


def adapt(
    turns: Sequence[Turn],
    rates: Mapping[Map, Rate],
    *,
    first_order: bool,
    plan: Plan,
    delta: Callable[[Tensor, Rows], Tensor] = squared_error_delta,
    mixes: Mapping[Layer, Mix] | None = None,
    watch: Callable[[Records], None] | None = None,
) -> FastWeights:
    """Fast weights of a block's tasks after a gradient step on each turn's rows (the whole support, as a rule).

    Args:
        turns: with `first_order` their inputs must carry no graph (networks.py detaches them), as the stored inputs
            must not (adaptation.md, caveat 1).
        rates: step size of every adapted map; see FastWeights.
        first_order: leave the derivative of the inner gradients out of the meta-gradient. Gradients still reach
            the shared weights through the query pass, and the rates.
        plan: chooses dual or private weights, layer by layer.
        delta: derivative of the support loss by the predictions [b, S], or [b, S, C] of several outputs, in
            differentiable operations.
        mixes: what tasks start from in layers where that is their own.
        watch: is shown each step's (input, δ) of all adapted maps; with graph unless `first_order`.
    """
    fast = FastWeights(rates, plan, mixes)
    for turn in turns:
        with torch.no_grad() if first_order else contextlib.nullcontext():
            tape = Tape(fast)
            out = turn.forward(tape)
            y = out.part.rows()
            records = tape.backward(out, delta(y.squeeze(-1), turn.rows).view_as(y))
            if watch is not None:
                watch(records)
        fast.step(records)
    return fast
