"""What the outputs of a network stand for: a rating, the logit of a click, or the logits of each whole rating."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distmeta.adaptation.inner import cross_entropy, cross_entropy_delta, squared_error, squared_error_delta
from distmeta.data.schema import Dataset, Label
from distmeta.errors import UserError
from distmeta.tasks import Rows


def absolute_error(prediction: Tensor, rows: Rows) -> Tensor:
    """Mean absolute error of each task over its real rows: [b] from predictions [b, R]; 0 for a task without rows."""
    count = rows.mask.sum(1).clamp(min=1)
    return ((prediction - rows.label).abs() * rows.mask).sum(1) / count


@dataclass(frozen=True)
class Head:
    """What the network's output [b, R] stands for, or its outputs [b, R, C] where there are several."""

    error: Callable[[Tensor, Rows], Tensor]
    """Query loss [b]."""
    delta: Callable[[Tensor, Rows], Tensor]
    """Derivative of the support loss by the outputs."""
    score: Callable[[Tensor], Tensor]
    """What is predicted [b, R], within the labels' range up to clipping."""
    start: float
    """The output to start from, instead of learning it."""
    outputs: int = 1
    """C."""


def head(dataset: Dataset, query_loss: str) -> Head:
    """The head for the dataset's labels.

    Clicks: the softmax over two outputs of paper 001 (Methods), of which only the difference counts; that is the one
    output here, so that the loss is the cross-entropy of its sigmoid.

    Raises:
        UserError: --query-loss absolute for clicks.
    """
    label = dataset.label
    if label.kind == "click":
        if query_loss != "squared":
            raise UserError(
                f"--query-loss {query_loss}: the labels are clicks, whose loss is the cross-entropy; leave it"
            )
        return Head(cross_entropy, cross_entropy_delta, torch.sigmoid, 0.0)
    error = {"squared": squared_error, "absolute": absolute_error}[query_loss]
    return Head(error, squared_error_delta, lambda output: output, (label.minimum + label.maximum) / 2)


def chosen(dataset: Dataset, query_loss: str) -> Head:
    """The head by the name of its loss; `auto`: squared for ratings, cross-entropy for clicks.

    Raises:
        UserError: a loss of ratings for clicks, or of clicks for ratings.
    """
    kind = dataset.label.kind
    fit = ("cross-entropy", "hinge") if kind == "click" else ("squared", "absolute")
    if query_loss not in ("auto", *fit):
        raise UserError(f"--query-loss {query_loss}: the labels are {kind}s; choose auto, {fit[0]} or {fit[1]}")
    if query_loss == "hinge":
        return Head(hinge, hinge_delta, lambda output: torch.sigmoid(output.double()), 0.0)
    return head(dataset, "absolute" if query_loss == "absolute" else "squared")


def hinge(output: Tensor, rows: Rows) -> Tensor:
    """Eq. 4 of paper 002, margin 1: each positive row against the negative ones: [b] from outputs [b, R].

    The mean over a task's pairs; 0 for a task without any. What is predicted is the output's sigmoid, in double
    precision: it is a score to rank by, not a probability, and must not lose the order of large ones.
    """
    positive, negative = _sides(rows)
    gaps = torch.relu(1 - output.unsqueeze(2) + output.unsqueeze(1))
    pairs = positive.unsqueeze(2) & negative.unsqueeze(1)
    return (gaps * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def hinge_delta(output: Tensor, rows: Rows) -> Tensor:
    """∂ hinge / ∂ output: [b, R]; 0 on padding."""
    positive, negative = _sides(rows)
    pairs = positive.unsqueeze(2) & negative.unsqueeze(1)
    broken = (pairs & (output.unsqueeze(2) - output.unsqueeze(1) < 1)).to(output.dtype)
    return (broken.sum(1) - broken.sum(2)) / pairs.sum((1, 2)).clamp(min=1).unsqueeze(1)


def _sides(rows: Rows) -> tuple[Tensor, Tensor]:
    """Which rows are clicks, and which are none: bool [b, R] each."""
    return rows.mask & (rows.label > 0.5), rows.mask & (rows.label <= 0.5)


def classes(label: Label, query_loss: str) -> Head:
    """One output for each whole rating: cross-entropy of their softmax; predicted is the expected rating.

    Raises:
        UserError: the labels are clicks, or from a rating to a rating that is not whole; --query-loss absolute.
    """
    if label.kind == "click":
        raise UserError("--classes: the labels are clicks, of which there are two; leave it out")
    if label.minimum % 1 or label.maximum % 1:
        raise UserError(
            f"--classes: the ratings are {label.minimum:g} to {label.maximum:g}; a class is a whole one; leave it out"
        )
    if query_loss != "squared":
        raise UserError(f"--query-loss {query_loss}: with --classes the loss is the cross-entropy; leave it")
    values = torch.arange(round(label.minimum), round(label.maximum) + 1)

    def index(rows: Rows) -> Tensor:
        return (rows.label - label.minimum).round().long().clamp(0, len(values) - 1)

    def share(rows: Rows, like: Tensor) -> Tensor:
        return rows.mask.to(like.dtype) / rows.mask.sum(1, keepdim=True).clamp(min=1)

    def error(outputs: Tensor, rows: Rows) -> Tensor:
        losses = F.cross_entropy(outputs.flatten(0, 1), index(rows).flatten(), reduction="none").view_as(rows.label)
        return (losses * share(rows, outputs)).sum(1)

    def delta(outputs: Tensor, rows: Rows) -> Tensor:
        chosen = F.one_hot(index(rows), len(values))
        return (outputs.softmax(-1) - chosen) * share(rows, outputs).unsqueeze(-1)

    def score(outputs: Tensor) -> Tensor:
        return outputs.softmax(-1) @ values.to(outputs)

    return Head(error, delta, score, 0.0, len(values))
