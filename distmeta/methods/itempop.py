"""ItemPop for clicks: what many clicked on, everybody will."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta.data.schema import Dataset
from distmeta.methods.closedform import ClosedForm, refuse_ratings
from distmeta.methods.logistic import fit_logistic
from distmeta.tasks import Bag, Rows, TaskBatch


class ItemPop(ClosedForm):
    """Predicts sigmoid(a + b log(1 + clicks on the item by training users)).

    a and b turn the count, which orders the items, into a probability. They are fitted on the training rows, each
    with its own click left out of its item's count, as the clicks of a new user are. That needs no second pass: an
    item's C clicks stand at C − 1, its other rows at C.

    Scenarios have no users of their own to be predicted: their items are ranked by how often the support took them
    (paper 002, §4.1.3), or with --counts global by how many users took them in any training scenario, pairs that
    validation and test ask about left out. Who ranks shares the places of those that tie.
    """

    name = "itempop"
    sweeps = 1
    logit: Tensor
    """float64 [items]: a + b log(1 + clicks)."""
    taken: Tensor
    """int64 [items]: users who took it in a training scenario, with --counts global."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        refuse_ratings(self.name, dataset)
        self.register_buffer("logit", torch.zeros(dataset.items, dtype=torch.float64))
        self.prepares = options.counts == "global"
        self.register_buffer("taken", torch.zeros(dataset.items if self.prepares else 0, dtype=torch.int64))

    def prepare(self, user: NDArray[np.int64], item: NDArray[np.int64]) -> Iterator[str]:
        self.taken.copy_(torch.from_numpy(np.bincount(item, minlength=len(self.taken))))
        yield f"counted {len(item):,} positives of the training scenarios"

    def statistics(self, batch: TaskBatch, sweep: int) -> dict[str, Tensor]:
        return self.first_sums(batch)

    def solve(self, statistics: dict[str, Tensor], sweep: int) -> None:
        self.set_mean(statistics)
        clicks, count = statistics["items"].unbind(-1)
        x = torch.cat((clicks.clamp_min(1).log(), clicks.log1p()))
        none = torch.zeros_like(clicks)
        a, b = fit_logistic(x[:, None], torch.cat((clicks, none)), torch.cat((clicks, count - clicks)))
        self.logit.copy_(a + b * clicks.log1p())

    def adapt(self, batch: TaskBatch) -> list[Tensor | None]:
        """What each scenario's support took, where that is asked."""
        if self.options.counts == "global" or (self.options.counts == "auto" and batch.users is None):
            return [None] * len(batch.blocks)
        return [took(block.support, batch.items) for block in batch]

    def predict(self, state: list[Tensor | None], batch: TaskBatch) -> list[Tensor]:
        known = self.logit.sigmoid() if batch.users is None else self.taken.double()
        return [
            known[batch.items][block.query.item] if items is None else times_taken(items, batch.items[block.query.item])
            for items, block in zip(state, batch, strict=True)
        ]


def took(support: Rows, items: Tensor) -> Tensor:
    """The items of the support's positives, int64 [b, S]; −1 on other rows. `items`: the batch's."""
    return torch.where(support.mask & (support.label > 0), items[support.item], -1)


def times_taken(took: Tensor, items: Tensor) -> Tensor:
    """How often each of some items [b, Q] is among those taken [b, S]: float64 [b, Q]."""
    return (items.unsqueeze(2) == took.unsqueeze(1)).sum(2).double()
