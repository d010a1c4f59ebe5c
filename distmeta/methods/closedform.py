"""What the floors share: sums over rows instead of a loss, float64 buffers instead of parameters.

Sums by item are hybrid sparse tensors over the items that a batch touches, so that a batch costs the same
however many items the dataset has; `base.fit_closed_form` adds them up in dense ones.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.methods.base import Method
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock


class ClosedForm(Method):
    """Base of the floors: knows the mean training label, and how to sum rows by item."""

    mean: Tensor
    """float64 []: mean training label, over ratings."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def item_sums(self, batch: TaskBatch, values: list[Tensor], width: int) -> Tensor:
        """Sum values by dataset item.

        Args:
            values: for each block float64 [b, S + Q, width] in the row order of `rows`, 0 on padding.

        Returns:
            sparse float64 [dataset.items, width] with one entry an item of the batch.
        """
        sums = self.mean.new_zeros(len(batch.items), width)
        for block, value in zip(batch, values, strict=True):
            sums.index_add_(0, rows(block).item.flatten(), value.flatten(0, 1))
        return self.by_item(batch, sums)

    def by_item(self, batch: TaskBatch, sums: Tensor) -> Tensor:
        """Sums [U, width] by item of the batch -> sparse [dataset.items, width]."""
        size = (self.dataset.items, sums.shape[1])
        return torch.sparse_coo_tensor(batch.items[None], sums, size, check_invariants=False)

    def first_sums(self, batch: TaskBatch) -> dict[str, Tensor]:
        """The sums of labels that every floor starts from: over all rows, and by item."""
        values = []
        for block in batch:
            side = rows(block)
            ones = side.mask.to(torch.float64)
            values.append(torch.stack((side.label * ones, ones), -1))
        label_and_count = self.mean.new_zeros(2)
        for value in values:
            label_and_count += value.sum((0, 1))
        return {"labels": label_and_count, "items": self.item_sums(batch, values, 2)}

    def set_mean(self, statistics: dict[str, Tensor]) -> None:
        """Set `mean` from `first_sums`; UserError where there was no row at all."""
        total, count = statistics["labels"]
        if not count > 0:
            raise UserError(f"{self.name}: the split train has no ratings to learn from; give the protocol more users")
        self.mean.copy_(total / count)


def rows(block: TaskBlock) -> Rows:
    """Support and query rows of a block side by side, [b, S + Q]; labels in float64.

    A 0-dimensional float64 tensor does not promote a float32 one: `label - mean` would lose half the digits.
    """
    side = block.rows()
    return replace(side, label=side.label.double())


def refuse_ratings(name: str, dataset: Dataset) -> None:
    """UserError where a method for clicks is given a dataset of ratings."""
    if dataset.label.kind != "click":
        raise UserError(f"{dataset.name}: {name} counts clicks and the labels are ratings; take bias or als")
