"""What methods that adapt by gradient steps share: MAML for recommendation on the engine of distmeta.adaptation.

A method says which maps adapt and how fast; the rest (support pass, inner steps, query pass, exact or first-order
meta-gradient) is the same for all.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distmeta.adaptation.cost import Plan
from distmeta.adaptation.fast import FastWeights
from distmeta.adaptation.inner import adapt, squared_error
from distmeta.adaptation.maps import Map
from distmeta.adaptation.tape import Node, Tape
from distmeta.data.schema import Dataset
from distmeta.methods.base import Method
from distmeta.networks import Decision, Embedding, Encoded, ItemPlace, UserPlace
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock


def absolute_error(prediction: Tensor, rows: Rows) -> Tensor:
    """Mean absolute error of each task over its real rows: [b] from predictions [b, R]; 0 for a task without rows."""
    count = rows.mask.sum(1).clamp(min=1)
    return ((prediction - rows.label).abs() * rows.mask).sum(1) / count


QUERY_LOSSES = {"squared": squared_error, "absolute": absolute_error}


class GradientMethod(Method):
    """Embeddings of user and item fields, a decision MLP, and k inner steps on the support's squared error."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.embedding = Embedding(dataset, items, options.embedding, options.item_ids)
        self.decision = Decision(self.embedding.user_width + self.embedding.item_width, options.hidden, options.wide)
        with torch.no_grad():  # start from the middle of the scale instead of learning it
            self.decision.output_bias.fill_((dataset.label.minimum + dataset.label.maximum) / 2)
        names = self.adapted()
        self.log_rate = nn.Parameter(
            torch.full((len(names),), options.local_lr).log(), requires_grad=options.learn_rates
        )

    @abstractmethod
    def adapted(self) -> list[Map]:
        """The maps that the inner loop changes."""

    def rates(self, block: TaskBlock) -> Mapping[Map, Tensor | float]:
        """Step size of each adapted map: positive, one a layer, learned where the options say so (MAML++'s LSLR)."""
        return dict(zip(self.adapted(), self.log_rate.exp().unbind(), strict=True))

    def forward(self, tape: Tape, users: UserPlace, items: ItemPlace) -> Node:
        """Predictions [b, R, 1] of the rows at `items` for the users at `users`."""
        return self.decision(
            tape, tape.lookup(self.embedding.users(), users), tape.lookup(self.embedding.items(), items)
        )

    def fast_weights(self, block: TaskBlock, encoded: Encoded) -> FastWeights:
        """The block's tasks after the inner loop; looks at user fields and support rows only."""
        first_order = self.options.first_order
        users, items = encoded.support(block, detach=first_order)
        return adapt(
            lambda tape: self(tape, users, items),
            block.support,
            self.rates(block),
            steps=self.options.steps,
            first_order=first_order,
            plan=Plan(self.options.steps, block.query.item.shape[1], self.options.form),
        )

    def scores(self, block: TaskBlock, encoded: Encoded, fast: FastWeights) -> Tensor:
        """Predictions [b, Q] of the query rows with adapted weights."""
        return self(Tape(fast), *encoded.query(block)).part.rows().squeeze(-1)

    def loss(self, batch: TaskBatch) -> Tensor:
        encoded = self.embedding.encode(batch)
        error = QUERY_LOSSES[self.options.query_loss]
        losses = [error(self.scores(block, encoded, self.fast_weights(block, encoded)), block.query) for block in batch]
        return torch.cat(losses) if losses else self.log_rate.new_zeros(0)

    @torch.no_grad()
    def adapt(self, batch: TaskBatch) -> list[FastWeights]:
        encoded = self.embedding.encode(batch)
        return [self.fast_weights(block, encoded) for block in batch]

    @torch.no_grad()
    def predict(self, state: list[FastWeights], batch: TaskBatch) -> list[Tensor]:
        encoded = self.embedding.encode(batch)
        return [self.scores(block, encoded, fast) for fast, block in zip(state, batch, strict=True)]
