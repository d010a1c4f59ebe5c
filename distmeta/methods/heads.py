"""What the outputs of a network stand for: a rating, the logit of a click, or the logits of each whole rating."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distmeta.adaptation.inner import cross_entropy, cross_entropy_delta, squared_error, squared_error_delta
from distmeta.data.schema import Dataset, Label
from distmeta.errors import UserError
from distmeta.tasks import Rows, TaskBlock


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
        return RANKING
    return head(dataset, "absolute" if query_loss == "absolute" else "squared")


def hinge(output: Tensor, rows: Rows) -> Tensor:
    """Eq. 4 of paper 002, margin 1: each positive row against the negative ones: [b] from outputs [b, R].

    The pair has the same user: the task's own, or the rows' where tasks are scenarios. A positive's pairs are averaged,
    then the positives that have any; 0 for a task without. Where a user has one positive and one negative, as a
    rule in scenarios, these are the pairs of s²Meta's code.
    """
    gaps = torch.relu(1 - output.unsqueeze(2) + output.unsqueeze(1))
    return (gaps * _pairs(rows, output.dtype)).sum((1, 2))


def hinge_delta(output: Tensor, rows: Rows) -> Tensor:
    """∂ hinge / ∂ output: [b, R]; 0 on padding."""
    broken = _pairs(rows, output.dtype) * (output.unsqueeze(2) - output.unsqueeze(1) < 1)
    return broken.sum(1) - broken.sum(2)


def _pairs(rows: Rows, dtype: torch.dtype) -> Tensor:
    """Weight [b, R, R] of each pair of a positive row and a negative one, and of the same user; their sum is 1 or 0."""
    clicked = rows.label > 0.5
    pairs = (rows.mask & clicked).unsqueeze(2) & (rows.mask & ~clicked).unsqueeze(1)
    if rows.user is not None:
        pairs = pairs & (rows.user.unsqueeze(2) == rows.user.unsqueeze(1))
    each = pairs.to(dtype) / pairs.sum(2, keepdim=True).clamp(min=1)
    return each / pairs.any(2).sum(1).clamp(min=1)[:, None, None]


RANKING = Head(hinge, hinge_delta, lambda output: torch.sigmoid(output.double()), 0.0)
"""To rank by. What is predicted is no probability; in double precision, so that large outputs keep their order."""


class Heads:
    """What the outputs stand for, by what the tasks are.

    Args:
        query_loss: as `chosen` takes it.
    """

    def __init__(self, dataset: Dataset, query_loss: str) -> None:
        self.users = chosen(dataset, query_loss)
        self.scenarios = self.users if query_loss == "cross-entropy" else RANKING
        """Their rows are positives and negatives whatever the dataset's labels."""

    def of(self, block: TaskBlock) -> Head:
        return self.users if block.query.user is None else self.scenarios


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
