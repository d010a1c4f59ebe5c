"""Meta-SGD (Li et al. 2017), a baseline of paper 001 (Table 2): a learned step size for every adapted parameter.

θ_i = θ − A ∘ ∇L_i(θ), where A has the shape of θ and is learned with it; it may become negative, as in the original.
The element-wise product breaks the low rank of a dense layer's update, so dense layers get private weights; embedding
tables stay dual (adaptation/fast.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distmeta.adaptation.maps import Each, Linear, Map, Rate
from distmeta.data.schema import Dataset
from distmeta.methods.gradient import GradientMethod
from distmeta.networks import Encoded
from distmeta.tasks import Bag, TaskBatch


class MetaSGD(GradientMethod):
    """A step size for every parameter."""

    name = "metasgd"

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)

        def start(parameter: Tensor) -> nn.Parameter:
            return nn.Parameter(torch.full_like(parameter, options.local_lr))

        self.rate_weights = nn.ParameterList(start(m.weight) for m in self.adapted())  # type: ignore[arg-type]
        self.rate_biases = nn.ParameterList(start(m.bias) for m in self.adapted() if isinstance(m, Linear))

    def adapted(self) -> list[Map]:
        return self.everything() if self.options.tuned == "all" else list(self.decision)

    def rates(self, batch: TaskBatch, encoded: Encoded) -> list[Mapping[Map, Rate]]:
        biases = iter(self.rate_biases)
        rates: dict[Map, Rate] = {
            m: Each(weight, next(biases) if isinstance(m, Linear) else None)
            for m, weight in zip(self.adapted(), self.rate_weights, strict=True)
        }
        return [rates] * len(batch.blocks)
