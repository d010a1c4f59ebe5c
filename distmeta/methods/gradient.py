"""What methods that adapt by gradient steps share: MAML for recommendation on the engine of distmeta.adaptation.

A method says which maps adapt and how fast; the rest (support pass, inner steps, query pass, exact or first-order
meta-gradient) is the same for all. So is what a prediction means, which the dataset's labels decide: a rating, or the
logit of a click.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distmeta.adaptation.cost import Plan
from distmeta.adaptation.fast import FastWeights
from distmeta.adaptation.inner import (
    adapt,
    cross_entropy,
    cross_entropy_delta,
    squared_error,
    squared_error_delta,
)
from distmeta.adaptation.maps import Map, Rate
from distmeta.adaptation.tape import Node, Tape
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.methods.base import Method
from distmeta.networks import Decision, Embedding, Encoded, ItemPlace, UserPlace
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock


def absolute_error(prediction: Tensor, rows: Rows) -> Tensor:
    """Mean absolute error of each task over its real rows: [b] from predictions [b, R]; 0 for a task without rows."""
    count = rows.mask.sum(1).clamp(min=1)
    return ((prediction - rows.label).abs() * rows.mask).sum(1) / count


@dataclass(frozen=True)
class Head:
    """What the network's output [b, R] stands for."""

    error: Callable[[Tensor, Rows], Tensor]
    """Query loss [b]."""
    delta: Callable[[Tensor, Rows], Tensor]
    """Derivative [b, R] of the support loss."""
    score: Callable[[Tensor], Tensor]
    """What is predicted, within the labels' range up to clipping."""
    start: float
    """The output to start from, instead of learning it."""


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


class GradientMethod(Method):
    """Embeddings of user and item fields, a decision MLP, and k inner steps on the support's loss."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.head = head(dataset, options.query_loss)
        self.embedding = Embedding(dataset, items, options.embedding, options.item_ids)
        self.decision = Decision(self.embedding.user_width + self.embedding.item_width, options.hidden, options.wide)
        with torch.no_grad():
            self.decision.output_bias.fill_(self.head.start)

    @abstractmethod
    def adapted(self) -> list[Map]:
        """The maps that the inner loop changes."""

    @abstractmethod
    def rates(self, batch: TaskBatch, encoded: Encoded) -> list[Mapping[Map, Rate]]:
        """Step size of each adapted map, for the tasks of each block."""

    def everything(self) -> list[Map]:
        """All maps: the embedding tables and the decision layers."""
        return [*self.embedding.users().values(), *self.embedding.items().values(), *self.decision]

    def forward(self, tape: Tape, users: UserPlace, items: ItemPlace) -> Node:
        """Predictions [b, R, 1] of the rows at `items` for the users at `users`."""
        return self.decision(
            tape, tape.lookup(self.embedding.users(), users), tape.lookup(self.embedding.items(), items)
        )

    def fast_weights(
        self,
        block: TaskBlock,
        encoded: Encoded,
        rates: Mapping[Map, Rate],
        norm: list[Tensor] | None = None,
        steps: int | None = None,
    ) -> FastWeights:
        """The block's tasks after the inner loop; looks at user fields and support rows only.

        Args:
            rates: step size of each adapted map.
            steps: inner steps; None: as many as the options say.
            norm: as `adaptation.inner.adapt` takes it.
        """
        first_order = self.options.first_order
        count = self.options.steps if steps is None else steps
        users, items = encoded.support(block, detach=first_order)
        return adapt(
            lambda tape: self(tape, users, items),
            block.support,
            rates,
            steps=count,
            first_order=first_order,
            plan=Plan(count, block.query.item.shape[1], self.options.form),
            delta=self.head.delta,
            norm=norm,
        )

    def outputs(self, block: TaskBlock, encoded: Encoded, fast: FastWeights) -> Tensor:
        """The network's outputs [b, Q] for the query rows with adapted weights."""
        return self(Tape(fast), *encoded.query(block)).part.rows().squeeze(-1)

    def block_loss(self, block: TaskBlock, encoded: Encoded, rates: Mapping[Map, Rate]) -> Tensor:
        """Query loss [b] of the block's tasks after adaptation, with graph."""
        return self.head.error(self.outputs(block, encoded, self.fast_weights(block, encoded, rates)), block.query)

    def loss(self, batch: TaskBatch) -> Tensor:
        encoded = self.embedding.encode(batch)
        rates = self.rates(batch, encoded)
        losses = [self.block_loss(block, encoded, own) for block, own in zip(batch, rates, strict=True)]
        return torch.cat(losses) if losses else self.decision.output_bias.new_zeros(0)

    @torch.no_grad()
    def adapt(self, batch: TaskBatch) -> list[FastWeights]:
        encoded = self.embedding.encode(batch)
        rates = self.rates(batch, encoded)
        return [self.fast_weights(block, encoded, own) for block, own in zip(batch, rates, strict=True)]

    @torch.no_grad()
    def predict(self, state: list[FastWeights], batch: TaskBatch) -> list[Tensor]:
        encoded = self.embedding.encode(batch)
        pairs = zip(state, batch, strict=True)
        return [self.head.score(self.outputs(block, encoded, fast)) for fast, block in pairs]


class LayerRates(GradientMethod):
    """A step size for each adapted map, positive, the same for all tasks; learned where the options say so (MAML++,
    Antoniou et al. 2019)."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        start = torch.full((len(self.adapted()),), options.local_lr).log()
        self.log_rate = nn.Parameter(start, requires_grad=options.learn_rates)

    def rates(self, batch: TaskBatch, encoded: Encoded) -> list[Mapping[Map, Rate]]:
        rates: dict[Map, Rate] = dict(zip(self.adapted(), self.log_rate.exp().unbind(), strict=True))
        return [rates] * len(batch.blocks)
