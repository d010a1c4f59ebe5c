"""The item-mean floor: what everybody thought of the item."""

from typing import Any

import torch
from torch import Tensor

from distmeta.data.schema import Dataset
from distmeta.methods.closedform import ClosedForm
from distmeta.tasks import Bag, TaskBatch


class ItemMean(ClosedForm):
    """Predicts (Σ labels of the item + shrink · global mean) / (count + shrink): the global mean for an
    unseen item.
    """

    name = "itemmean"
    sweeps = 1
    offset: Tensor
    """float64 [items]: the item's shrunk mean, less the global mean."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.register_buffer("offset", torch.zeros(dataset.items, dtype=torch.float64))

    def statistics(self, batch: TaskBatch, sweep: int) -> dict[str, Tensor]:
        return self.first_sums(batch)

    def solve(self, statistics: dict[str, Tensor], sweep: int) -> None:
        self.set_mean(statistics)
        total, count = statistics["items"].unbind(-1)
        self.offset.copy_(shrunk(total - count * self.mean, count, self.options.shrink))

    def adapt(self, batch: TaskBatch) -> list[None]:
        return [None] * len(batch.blocks)

    def predict(self, state: list[None], batch: TaskBatch) -> list[Tensor]:
        item = self.mean + self.offset[batch.items]
        return [item[block.query.item] for block in batch]


def shrunk(total: Tensor, count: Tensor, shrink: float) -> Tensor:
    """total / (count + shrink), and 0 where both are 0 (no shrinkage asked for and nothing seen)."""
    return total / (count + shrink).clamp_min(torch.finfo(total.dtype).tiny)
