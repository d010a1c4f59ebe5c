"""AT-PAML (paper 001, Algorithms 1 and 2): PAML that also looks at the step sizes of the users most like the new one.

α(h_i) = α′(h_i) + Σ_k s_k / (Σ_j s_j + σ) · α(h_k)  over the K nearest stored users, s_k = exp(−δ ‖h_i − h_k‖²).
A step searches the index as the steps before left it, and then hands it the gradients of what it found (stored
embeddings and step sizes take plain gradient steps) and its own users, to be stored or updated in place.

Nodes are keyed by user, and nobody finds themselves: a returning user would else meet their own α, which holds α′
already, and it would grow at each visit. α′ starts at 0 for the same reason: the stored steps begin at --local-lr.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmeta.data.protocols.base import KINDS
from distmeta.data.schema import Dataset
from distmeta.errors import RunError
from distmeta.memory.base import Arrays, Memory
from distmeta.memory.neighbours import Neighbours
from distmeta.methods.paml import PAML
from distmeta.networks import Encoded
from distmeta.tasks import Bag, TaskBatch

SIGMA = 1e-5
"""σ: keeps the weights finite where no stored user is near."""


class ATPAML(PAML):
    """PAML with an index of the users seen."""

    name = "at-paml"
    start = 0.0

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self._visit: dict[str, Tensor] | None = None

    def memories(self) -> dict[str, Memory]:
        o = self.options
        return {"index": Neighbours(o.capacity, o.nearest, o.node_lr, exact=o.exact)}

    def step_sizes(self, batch: TaskBatch, encoded: Encoded) -> list[Tensor]:
        if not batch.blocks:
            return []
        h = torch.cat([self.user_embedding(block, encoded) for block in batch])
        task = torch.cat([block.task for block in batch])
        if not h.isfinite().all():
            raise RunError(
                f"{self.name}: the user embedding of task {int(task[~h.isfinite().all(1)][0])} is not finite;"
                " training diverged, lower the step sizes (lr, local_lr)"
            )
        found = self.shared["index"].read({"key": _numpy(task // KINDS), "vector": _numpy(h)})
        key, vector, rate = (torch.from_numpy(np.array(found[n])).to(h.device) for n in ("key", "vector", "rate"))
        own = self.rate(h).squeeze(1)
        if int(found["nodes"][0]) < max(self.options.warm_up, 1):
            key = torch.full_like(key, -1)
            alpha = torch.full_like(own, self.options.local_lr)
        else:
            vector, rate = (t.requires_grad_(torch.is_grad_enabled()) for t in (vector, rate))
            alpha = own + self._looked_up(h, key, vector, rate)
        if torch.is_grad_enabled():
            self._visit = {"task": task, "vector": h, "rate": alpha, "used": key, "nodes": vector, "rates": rate}
        return list(alpha.split([len(block.task) for block in batch]))

    def _looked_up(self, h: Tensor, key: Tensor, vector: Tensor, rate: Tensor) -> Tensor:
        """α̃ [b]: the mean of the step sizes [b, K] found, by similarity of their embeddings [b, K, d]."""
        there = key >= 0
        distance = (h.unsqueeze(1) - vector.masked_fill(~there.unsqueeze(2), 0)).square().sum(2)
        delta = self.options.kernel or 1 / _median(distance.detach(), there)
        similarity = torch.exp(-delta * distance) * there
        return (similarity * rate.masked_fill(~there, 0)).sum(1) / (similarity.sum(1) + SIGMA)

    def write(self) -> None:
        visit, self._visit = self._visit, None
        self.shared["index"].write(self._nothing() if visit is None else _writes(visit))

    def _nothing(self) -> Arrays:
        like = next(self.parameters())
        width, k = self.rate[0].in_features, self.options.nearest  # type: ignore[union-attr]
        shapes = {"task": (0,), "vector": (0, width), "rate": (0,), "nodes": (0, k, width), "rates": (0, k)}
        visit = {name: like.new_zeros(shape) for name, shape in shapes.items()}
        used = torch.zeros(0, k, dtype=torch.int64)
        return _writes({**visit, "task": visit["task"].long(), "used": used})


def _median(distance: Tensor, there: Tensor) -> Tensor:
    """Median squared distance [b, 1] of the neighbours found; 1 where there is none or they are all the same."""
    median = distance.masked_fill(~there, torch.nan).nanmedian(1, keepdim=True).values
    return torch.where(median > 0, median, torch.ones_like(median))


def _writes(visit: dict[str, Tensor]) -> Arrays:
    """What a step's users write to the index, as `Neighbours.merge` wants it."""
    gradients = {
        f"{name}_grad": torch.zeros_like(t) if t.grad is None else t.grad
        for name, t in (("vector", visit["nodes"]), ("rate", visit["rates"]))
    }
    kept = {name: visit[name] for name in ("task", "vector", "rate", "used")}
    arrays = {name: _numpy(t) for name, t in {**kept, **gradients}.items()}
    return {**arrays, "key": arrays["task"] // KINDS}


def _numpy(t: Tensor) -> Any:
    return t.detach().cpu().numpy()
