"""ItemPop for clicks: what many clicked on, everybody will."""

from typing import Any

import torch
from torch import Tensor

from distmeta.data.schema import Dataset
from distmeta.methods.closedform import ClosedForm, refuse_ratings
from distmeta.methods.logistic import fit_logistic
from distmeta.tasks import Bag, TaskBatch


class ItemPop(ClosedForm):
    """Predicts sigmoid(a + b log(1 + clicks on the item by training users)).

    a and b turn the count, which orders the items, into a probability. They are fitted on the training rows, each
    with its own click left out of its item's count, as the clicks of a new user are. That needs no second pass: an
    item's C clicks stand at C − 1, its other rows at C.
    """

    name = "itempop"
    sweeps = 1
    logit: Tensor
    """float64 [items]: a + b log(1 + clicks)."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        refuse_ratings(self.name, dataset)
        self.register_buffer("logit", torch.zeros(dataset.items, dtype=torch.float64))

    def statistics(self, batch: TaskBatch, sweep: int) -> dict[str, Tensor]:
        return self.first_sums(batch)

    def solve(self, statistics: dict[str, Tensor], sweep: int) -> None:
        self.set_mean(statistics)
        clicks, count = statistics["items"].unbind(-1)
        x = torch.cat((clicks.clamp_min(1).log(), clicks.log1p()))
        none = torch.zeros_like(clicks)
        a, b = fit_logistic(x[:, None], torch.cat((clicks, none)), torch.cat((clicks, count - clicks)))
        self.logit.copy_(a + b * clicks.log1p())

    def adapt(self, batch: TaskBatch) -> list[None]:
        return [None] * len(batch.blocks)

    def predict(self, state: list[None], batch: TaskBatch) -> list[Tensor]:
        item = self.logit[batch.items].sigmoid()
        return [item[block.query.item] for block in batch]
