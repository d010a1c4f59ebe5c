"""PAML (Yu et al., AAAI 2021; paper 001): each user adapts with a step size of their own, α(h_i; ψ), Eq. 1.

h_i is the user embedding: the user's embedded fields and, with --history, the mean embedding of the support's items
(the paper's footnote 3). α is two fully connected layers with a ReLU between them and an unbounded linear output that
starts at --local-lr, so it may become negative; the report shows how often. With --learn-rates each layer's step is
α times a learned positive factor, 1 at first, the same for all users.

The paper's update of ψ has the right sign and wrong factors (papers' Eq. after 1); here both θ and ψ, and h_i, follow
the gradient of the query loss at θ_i = θ − α(h_i; ψ) ∇L_i(θ).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distmeta.adaptation.fast import FastWeights
from distmeta.adaptation.maps import Map, Rate
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.methods.gradient import GradientMethod
from distmeta.networks import Encoded
from distmeta.tasks import Bag, TaskBatch, TaskBlock


class PAML(GradientMethod):
    """Decision layers adapted with a personal step size."""

    name = "paml"
    start: float | None = None
    """What α is at first; none: --local-lr."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        width = self.embedding.user_width + (self.embedding.item_width if options.history else 0)
        if not width:
            raise UserError(f"{dataset.name}: has no user fields to tell users apart by; add --history")
        self.rate = nn.Sequential(nn.Linear(width, options.rate_hidden), nn.ReLU(), nn.Linear(options.rate_hidden, 1))
        start = options.local_lr if self.start is None else self.start
        with torch.no_grad():  # all users alike at first, but for a tenth of the step
            last: Any = self.rate[-1]
            last.weight.mul_(0.1 * options.local_lr)
            last.bias.fill_(start)
        self.log_factor = nn.Parameter(torch.zeros(len(self.adapted())), requires_grad=options.learn_rates)

    def adapted(self) -> list[Map]:
        return list(self.decision)

    def user_embedding(self, block: TaskBlock, encoded: Encoded) -> Tensor:
        """h [b, width]."""
        parts = [encoded.users(block), *([encoded.history(block)] if self.options.history else [])]
        return torch.cat(parts, 1)

    def step_sizes(self, batch: TaskBatch, encoded: Encoded) -> list[Tensor]:
        """α(h; ψ) [b] of each block's users."""
        return [self.rate(self.user_embedding(block, encoded)).squeeze(1) for block in batch]

    def rates(self, batch: TaskBatch, encoded: Encoded) -> list[Mapping[Map, Rate]]:
        factors = self.log_factor.exp().unbind() if self.options.learn_rates else [1.0] * len(self.adapted())
        return [
            {m: alpha[:, None, None] * factor for m, factor in zip(self.adapted(), factors, strict=True)}
            for alpha in self.step_sizes(batch, encoded)
        ]

    def alpha(self, rates: Mapping[Map, Rate]) -> Tensor:
        """α [b] of the users with these step sizes."""
        rate = rates[self.adapted()[0]]
        assert isinstance(rate, Tensor)
        return rate[:, 0, 0] / self.log_factor[0].exp()

    def facts(self, state: list[FastWeights], batch: TaskBatch) -> dict[str, list[Tensor]]:
        return {"step_size": [self.alpha(fast.rates) for fast in state]}
