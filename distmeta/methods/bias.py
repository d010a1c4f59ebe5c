"""The bias floor: global mean + item bias + user bias, as in Koren, Bell & Volinsky (Computer 2009)."""

from typing import Any

import torch
from torch import Tensor

from distmeta.data.schema import Dataset
from distmeta.methods.closedform import ClosedForm, rows
from distmeta.methods.itemmean import shrunk
from distmeta.tasks import Bag, Rows, TaskBatch


class Bias(ClosedForm):
    """Predicts mean + b_i + b_u, each bias a shrunk mean of what the other leaves.

    b_i and b_u alternate `passes` times, items first. A user's bias depends on their own rows and the item
    biases only, so it is worked out where the user's rows are and never stored; a new user's is fitted on the
    support in the same way.
    """

    name = "bias"
    item_bias: Tensor
    """float64 [items]; 0 for an item without training ratings."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.sweeps = max(1, options.passes)
        self.register_buffer("item_bias", torch.zeros(dataset.items, dtype=torch.float64))

    def statistics(self, batch: TaskBatch, sweep: int) -> dict[str, Tensor]:
        if sweep == 0:  # no bias is known yet: sums of the labels themselves
            return self.first_sums(batch)
        values = []
        for block in batch:
            side = rows(block)
            left = side.label - self.mean - self._user_bias(side, batch.items, self.options.shrink)[:, None]
            values.append(torch.stack((left, torch.ones_like(left)), -1) * side.mask[..., None])
        return {"items": self.item_sums(batch, values, 2)}

    def solve(self, statistics: dict[str, Tensor], sweep: int) -> None:
        total, count = statistics["items"].unbind(-1)
        if sweep == 0:
            self.set_mean(statistics)
            total = total - count * self.mean
        self.item_bias.copy_(shrunk(total, count, self.options.shrink))

    def adapt(self, batch: TaskBatch) -> list[Tensor]:
        """The users' biases, float64 [b] a block."""
        return [self._user_bias(block.support, batch.items, self.options.shrink_user) for block in batch]

    def predict(self, state: list[Tensor], batch: TaskBatch) -> list[Tensor]:
        item = self.mean + self.item_bias[batch.items]
        return [item[block.query.item] + user[:, None] for user, block in zip(state, batch, strict=True)]

    def _user_bias(self, side: Rows, items: Tensor, shrink: float) -> Tensor:
        """Shrunk mean over each task's rows of what mean and item bias leave, float64 [b]."""
        left = (side.label.double() - self.mean - self.item_bias[items][side.item]) * side.mask
        return shrunk(left.sum(1), side.mask.sum(1).to(left.dtype), shrink)
