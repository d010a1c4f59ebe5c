"""Alternating least squares with biases and fold-in of new users: what a practitioner would use instead.

Ridge-regularised ALS (Zhou et al., AAIM 2008, with a flat penalty) on residuals from the global mean. With
biases inside:
  r ≈ mean + b_u + b_i + p_u · q_i,   z_u = (b_u, p_u),   z_i = (b_i, q_i).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmeta import draws
from distmeta.data.schema import Dataset
from distmeta.methods.closedform import ClosedForm, rows
from distmeta.methods.itemmean import shrunk
from distmeta.tasks import Bag, Rows, TaskBatch

ITEM_SEED = 0
"""The floor is one fixed yardstick: its initial factors do not depend on a run's seed."""

SOLVE_ITEMS = 1 << 14
"""Items solved at a time, which bounds the memory of the expanded matrices."""


class Als(ClosedForm):
    """Explicit ALS. A user's vector follows from their own rows and the item vectors by ridge regression, so
    training users are solved where their rows are and never stored, and a new user is folded in with the same
    equation.
    """

    name = "als"
    vectors: Tensor
    """float64 [items, 1 + factors]: item bias, then the factors; 0 for an item without training ratings."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.sweeps = 1 + options.passes
        self.width = 1 + options.factors
        self.register_buffer("vectors", torch.zeros(dataset.items, self.width, dtype=torch.float64))

    def statistics(self, batch: TaskBatch, sweep: int) -> dict[str, Tensor]:
        """Sweep 0: label sums. Then by item Σ x xᵀ (upper triangle), Σ x t: x = (1, p_u), t = r − mean − b_u."""
        if sweep == 0:
            return self.first_sums(batch)
        upper = torch.triu_indices(self.width, self.width, device=self.mean.device)
        values = []
        for block in batch:
            side = rows(block)
            user = self._users(side, batch.items)
            target = (side.label - self.mean - user[:, None, 0]) * side.mask
            x = torch.cat((torch.ones_like(user[:, :1]), user[:, 1:]), 1)
            outer = x[:, upper[0]] * x[:, upper[1]]  # the same for all rows of a user
            values.append(torch.cat((outer[:, None] * side.mask[..., None], x[:, None] * target[..., None]), -1))
        return {"normal": self.item_sums(batch, values, upper.shape[1] + self.width)}

    def solve(self, statistics: dict[str, Tensor], sweep: int) -> None:
        if sweep == 0:
            self.set_mean(statistics)
            total, count = statistics["items"].unbind(-1)
            self.vectors[:, 0] = shrunk(total - count * self.mean, count, self.options.penalty)
            item, factor = np.arange(self.dataset.items)[:, None], np.arange(self.options.factors)
            start = 0.1 * draws.normal(ITEM_SEED, item, factor, purpose="als/items")
            self.vectors[:, 1:] = torch.from_numpy(start).to(self.vectors) * (count > 0)[:, None]
            return
        upper = torch.triu_indices(self.width, self.width, device=self.mean.device)
        for first in range(0, self.dataset.items, SOLVE_ITEMS):
            normal = statistics["normal"][first : first + SOLVE_ITEMS]
            matrix = normal.new_zeros(len(normal), self.width, self.width)
            matrix[:, upper[0], upper[1]] = normal[:, : -self.width]
            matrix[:, upper[1], upper[0]] = normal[:, : -self.width]
            self.vectors[first : first + SOLVE_ITEMS] = self._ridge(matrix, normal[:, -self.width :])

    def adapt(self, batch: TaskBatch) -> list[Tensor]:
        """The users' vectors (b_u, p_u), float64 [b, 1 + factors] a block."""
        return [self._users(block.support, batch.items) for block in batch]

    def predict(self, state: list[Tensor], batch: TaskBatch) -> list[Tensor]:
        vectors = self.vectors[batch.items]
        scores = []
        for user, block in zip(state, batch, strict=True):
            item = vectors[block.query.item]
            dot = (item[..., 1:] @ user[:, 1:, None]).squeeze(-1)
            scores.append(self.mean + user[:, None, 0] + item[..., 0] + dot)
        return scores

    def _users(self, side: Rows, items: Tensor) -> Tensor:
        """Ridge solution of each task's rows for the user's vector, [b, 1 + factors]; 0 without rows."""
        item = self.vectors[items][side.item]
        x = torch.cat((torch.ones_like(item[..., :1]), item[..., 1:]), -1) * side.mask[..., None]
        target = side.label.double() - self.mean - item[..., 0]
        return self._ridge(x.mT @ x, (x.mT @ target[..., None]).squeeze(-1))

    def _ridge(self, matrix: Tensor, right: Tensor) -> Tensor:
        """(matrix + penalty · I)⁻¹ right for [n, w, w] and [n, w]; least-norm where the penalty is 0."""
        if self.options.penalty <= 0:
            return (torch.linalg.pinv(matrix, hermitian=True) @ right[..., None]).squeeze(-1)
        eye = torch.eye(self.width, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve(matrix + self.options.penalty * eye, right)
