"""Implicit ALS (Hu, Koren & Volinsky, ICDM 2008) with fold-in of new users, and a probability for its score.

Every user likes every item or not: p_ui = 1 where u clicked on i, else 0, also where i was never shown to u. How sure
that is, is c_ui = 1 + α for a click, 1 + α_0 for a row without one, 1 for all other pairs; minimised is
  Σ_ui c_ui (p_ui − x_u · y_i)² + λ (Σ_u |x_u|² + Σ_i |y_i|²),
each side in closed form given the other (their Eq. 4, 5). The paper has α_0 = 0, as it knows of no item that was
shown and left alone.

x · y orders items and is no probability. That is sigmoid(a + b · z), where z are x · y and the log-odds of two click
rates: the item's, by the training users, and the user's, on the support.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmeta import draws
from distmeta.data.schema import Dataset
from distmeta.methods.als import ITEM_SEED, SOLVE_ITEMS
from distmeta.methods.closedform import ClosedForm, refuse_ratings, rows
from distmeta.methods.logistic import fit_logistic
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

ONE_IN_USERS, FOLDS = 10, 5
"""One in ten training users, by hash, has no part in the items' numbers: a and b are fitted on their rows, each fifth
predicted from the user's other rows as a new user's are from the support."""
BINS, REACH = (97, 25, 25), 6.0
"""Of the histogram of z that a and b are fitted on, at each bin's mean: two megabytes however many the users. The bins
reach from −REACH to REACH and have 0 in the middle of one."""


class IALS(ClosedForm):
    """x_u follows from a user's own rows and the item vectors, so training users are solved where their rows are, and
    a new one on the support, by the same equation. Σ_i y_i y_iᵀ, over all items, is kept.
    """

    name = "ials"
    vectors: Tensor
    """float64 [items, factors]: y_i; 0 for an item without training clicks."""
    gram: Tensor
    """float64 [factors, factors]: Σ_i y_i y_iᵀ."""
    rate: Tensor
    """float64 [items]: log-odds of the item's click rate."""
    link: Tensor
    """float64 [4]: a, then b."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        refuse_ratings(self.name, dataset)
        self.sweeps = 2 + options.passes
        self.width = options.factors
        buffers = {"vectors": (dataset.items, self.width), "gram": (self.width, self.width), "rate": (dataset.items,)}
        for name, shape in (buffers | {"link": (1 + len(BINS),)}).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def statistics(self, batch: TaskBatch, sweep: int) -> dict[str, Tensor]:
        """Sweep 0: label sums. The last: clicks, rows and Σ z by bin of z. Between: Σ_u x xᵀ, and by item
        Σ (c − 1) x xᵀ (upper triangle) and Σ c p x."""
        if sweep == self.sweeps - 1:
            return {"histogram": self._histogram(batch)}
        learned = TaskBatch(batch.items, tuple(b.take((~_apart(b)).nonzero()[:, 0]) for b in batch))
        if sweep == 0:
            return {"labels": self.first_sums(batch)["labels"], "items": self.first_sums(learned)["items"]}
        upper = torch.triu_indices(self.width, self.width, device=self.mean.device)
        gram = torch.zeros_like(self.gram)
        sums = self.mean.new_zeros(len(batch.items), upper.shape[1] + self.width)
        for block in learned:
            side = rows(block)
            x = self._users(side, batch.items)
            gram += x.T @ x
            sure, liked = self._weights(side)
            task, row = sure.nonzero(as_tuple=True)  # the others add nothing
            outer = x[:, upper[0]] * x[:, upper[1]]  # the same for all rows of a user
            parts = (outer[task] * sure[task, row, None], x[task] * liked[task, row, None])
            sums.index_add_(0, side.item[task, row], torch.cat(parts, 1))
        return {"gram": gram, "normal": self.by_item(batch, sums)}

    def solve(self, statistics: dict[str, Tensor], sweep: int) -> None:
        if sweep == self.sweeps - 1:
            clicks, count, *z = statistics["histogram"].unbind(-1)
            full = count > 0
            x = torch.stack(z, 1)[full] / count[full, None]
            self.link.copy_(fit_logistic(x, clicks[full], count[full]))
            return
        if sweep == 0:
            self.set_mean(statistics)
            clicks, count = statistics["items"].unbind(-1)
            self.rate.copy_(self._log_odds(clicks, count))
            item, factor = np.arange(self.dataset.items)[:, None], np.arange(self.width)
            start = draws.normal(ITEM_SEED, item, factor, purpose="ials/items") / self.width**0.5
            self.vectors.copy_(torch.from_numpy(start).to(self.vectors) * (clicks > 0)[:, None])
        else:
            upper = torch.triu_indices(self.width, self.width, device=self.mean.device)
            for first in range(0, self.dataset.items, SOLVE_ITEMS):
                normal = statistics["normal"][first : first + SOLVE_ITEMS]
                matrix = normal.new_zeros(len(normal), self.width, self.width)
                matrix[:, upper[0], upper[1]] = normal[:, : -self.width]
                matrix[:, upper[1], upper[0]] = normal[:, : -self.width]
                solved = ridge(matrix + statistics["gram"], normal[:, -self.width :], self.options.penalty)
                self.vectors[first : first + SOLVE_ITEMS] = solved
        self.gram.copy_(self.vectors.T @ self.vectors)

    def adapt(self, batch: TaskBatch) -> list[tuple[Tensor, Tensor]]:
        """The users' vectors x_u, float64 [b, factors], and log-odds of their click rates, float64 [b], a block."""
        return [self._adapted(block.support, batch.items) for block in batch]

    def predict(self, state: list[tuple[Tensor, Tensor]], batch: TaskBatch) -> list[Tensor]:
        pairs = zip(state, batch, strict=True)
        return [(self.link[0] + self._z(user, block.query, batch) @ self.link[1:]).sigmoid() for user, block in pairs]

    def _adapted(self, side: Rows, items: Tensor) -> tuple[Tensor, Tensor]:
        clicks = (side.label.double() * side.mask).sum(1)
        return self._users(side, items), self._log_odds(clicks, side.mask.sum(1).double())

    def _z(self, user: tuple[Tensor, Tensor], side: Rows, batch: TaskBatch) -> Tensor:
        """x · y and the two log-odds of each row, float64 [b, R, 3]."""
        dot = (self.vectors[batch.items][side.item] @ user[0][..., None]).squeeze(-1)
        return torch.stack((dot, self.rate[batch.items][side.item], user[1][:, None].expand_as(dot)), -1)

    def _log_odds(self, clicks: Tensor, count: Tensor) -> Tensor:
        """Of click rates, shrunk to the mean."""
        rate = (clicks + self.options.shrink * self.mean) / (count + self.options.shrink)
        return rate.clamp(1e-6, 1 - 1e-6).logit()  # where all labels are alike

    def _weights(self, side: Rows) -> tuple[Tensor, Tensor]:
        """c − 1 and c p of each row: float64 [b, R], 0 on padding."""
        alpha, click = self.options.alpha, (side.label > 0).double()
        sure = (alpha * click + self.options.alpha_shown * (1 - click)) * side.mask
        return sure, (1 + alpha) * click * side.mask

    def _users(self, side: Rows, items: Tensor) -> Tensor:
        """x_u of each task's rows, [b, factors]; 0 without a click."""
        return folded(self.vectors[items][side.item], self.gram, *self._weights(side), self.options.penalty)

    def _histogram(self, batch: TaskBatch) -> Tensor:
        """(clicks, rows, Σ z) of the rows set apart by bin of z: float64 [bins, 2 + 3]."""
        sums = self.mean.new_zeros(int(np.prod(BINS)), 2 + len(BINS))
        for block in (block.take(_apart(block).nonzero()[:, 0]) for block in batch):
            side = rows(block)
            key = (block.task.cpu().numpy()[:, None], batch.items[side.item].cpu().numpy())
            fold = draws.hashed(ITEM_SEED, *key, purpose="ials/rows") % np.uint64(FOLDS)
            fold = torch.from_numpy(fold.astype(np.int64)).to(side.mask.device)
            for k in range(FOLDS):
                asked = (fold == k) & side.mask
                user = self._adapted(Rows(side.item, side.label, side.mask & ~asked), batch.items)
                z, label = self._z(user, side, batch)[asked], side.label[asked]
                sums.index_add_(0, _bin(z), torch.cat((label[:, None], torch.ones_like(label)[:, None], z), 1))
        return sums


def folded(y: Tensor, gram: Tensor, sure: Tensor, liked: Tensor, penalty: float) -> Tensor:
    """One side's vectors x [n, f] given the other's (Hu et al., Eq. 4, 5).

    Args:
        y: [n, R, f], the others of each one's rows.
        gram: [f, f], Σ y yᵀ over all others.
        sure, liked: [n, R], c − 1 and c p of the rows; 0 on padding.
    """
    return ridge(gram + (y * sure[..., None]).mT @ y, (y * liked[..., None]).sum(1), penalty)


def ridge(matrix: Tensor, right: Tensor, penalty: float) -> Tensor:
    """(matrix + penalty · I)⁻¹ right for [n, f, f] and [n, f]."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(matrix + penalty * eye, right)


def _apart(block: TaskBlock) -> Tensor:
    """The tasks that have no part in the items' numbers: bool [b]."""
    key = draws.hashed(ITEM_SEED, block.task.cpu().numpy(), purpose="ials/users") % np.uint64(ONE_IN_USERS)
    return torch.from_numpy(key == 0).to(block.task.device)


def _bin(z: Tensor) -> Tensor:
    """Bin of each z [n, 3], int64 [n]: x · y, mostly small, on a scale that is logarithmic beyond 0.01."""
    value = torch.stack((torch.asinh(z[:, 0] / 0.01), z[:, 1], z[:, 2]), 1) / REACH
    bins = torch.tensor(BINS, device=z.device)
    place = ((value + 1) / 2 * (bins - 1)).round().long().clamp_min(0).minimum(bins - 1)
    return (place[:, 0] * BINS[1] + place[:, 1]) * BINS[2] + place[:, 2]
