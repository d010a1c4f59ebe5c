"""DeepFM (Guo et al., IJCAI 2017), the baseline of paper 000 (Table 2): y = y_FM + y_DNN on shared embeddings.

y_FM = ⟨w, x⟩ + Σ_{i<j} ⟨v_i, v_j⟩ over the fields of user and item (their Eq. 2), where v of a field with several
values is their mean; y_DNN an MLP on all v side by side (their Eq. 3, 4). The pairs are summed as
½ (|Σ v|² − Σ |v|²) of each side, once a user and once an item, plus ⟨Σ v_user, Σ v_item⟩ in each row. Pretrained
vectors of scenarios are one field of each side more, of another width: they meet each other only, each coordinate with
a weight that is learned, as the vectors are not.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distmeta.data.schema import Dataset
from distmeta.methods.finetuning import Weights
from distmeta.methods.joint import Joint, Sides
from distmeta.tasks import Bag


class DeepFM(Joint):
    """A factorisation machine and an MLP on the same embeddings."""

    name = "deepfm"
    linear = True

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        width = self.vectors
        self.scale = nn.Parameter(torch.full((width,), 1 / width)) if width else None

    def network(self, w: Weights, sides: Sides) -> Tensor:
        return self.output(w, self.deep(w, sides)) + self.weights(sides) + self.pairs(sides)

    def pairs(self, sides: Sides) -> Tensor:
        """Σ_{i<j} ⟨v_i, v_j⟩ of each row: [b, R]."""
        both = ((sides.user, self.user_fields), (sides.item, self.item_fields))
        user, item = (sides.derived(part, "pairs", lambda x, n=n: self._side(x, n)).rows() for part, n in both)
        across = user[..., 1:] * item[..., 1:]
        if self.scale is not None:
            across = torch.cat((across[..., : -self.vectors], across[..., -self.vectors :] * self.scale), -1)
        return user[..., 0] + item[..., 0] + across.sum(-1)

    def _side(self, x: Tensor, fields: int) -> Tensor:
        """Of one side's features: its own pairs, then what meets the other side [..., 1 + e + v]."""
        v = self.embeddings(x, fields)
        total = v.sum(-2)
        own = (total.square().sum(-1, keepdim=True) - v.square().sum((-2, -1)).unsqueeze(-1)) / 2
        return torch.cat((own, total, x[..., fields * (self.options.embedding + 1) :]), -1)
