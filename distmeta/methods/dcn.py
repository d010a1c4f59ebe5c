"""DCN (Wang et al., ADKDD 2017), and DCN-F, which is fine-tuned on the support: the baselines of paper 002 (§4.1.3).

The cross network maps the features x_0 of user and item to x_{l+1} = x_0 x_lᵀ w_l + b_l + x_l; beside it stands an MLP,
and the output is linear in x_L and in the MLP's last units. Paper 002 has 3 cross layers beside 64-64 (§7.2.1).

x_l is always α_l x_0 + β_l with β_l = Σ_{k<l} b_k, α_0 = 1 and α_{l+1} = α_l (1 + x_0ᵀ w_l) + β_lᵀ w_l. So a row needs
L + 1 products of x_0, with the w_l and with the output's weights, which come from its user's and its item's halves; the
vectors x_l are never formed.
"""

import torch
from torch import Tensor, nn

from distmeta.adaptation.fast import Private
from distmeta.adaptation.features import Features
from distmeta.data.schema import Dataset
from distmeta.methods.finetuning import Weights
from distmeta.methods.joint import Joint, Sides
from distmeta.methods.plain_options import DCN as Options
from distmeta.tasks import Bag


class DCN(Joint):
    """Cross layers and an MLP on the same features."""

    name = "dcn"

    def __init__(self, options: Options, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        d, count = self.width, options.cross_layers
        self.cross = nn.Parameter(torch.empty(d, count + 1).uniform_(-(d**-0.5), d**-0.5))
        """w_l by column, the last one the output's weights of x_L."""
        self.shift = nn.Parameter(torch.zeros(count, d))
        """b_l."""

    def network(self, w: Weights, sides: Sides) -> Tensor:
        return self.output(w, self.deep(w, sides)) + self.crossed(w, sides)

    def crossed(self, w: Weights, sides: Sides) -> Tensor:
        """What x_L adds to the output of each row: [b, R]."""
        cross, shift = w.of(self.cross), w.of(self.shift)
        # β_lᵀ w_l, the first 0
        betas = torch.cat((torch.zeros_like(shift[..., :1, :]), shift.cumsum(-2)), -2)
        constants = (betas * cross.transpose(-1, -2)).sum(-1)
        products = _product(self.features(sides), cross)
        alpha = torch.ones_like(products[..., 0])
        *layers, last = zip(products.unbind(-1), constants.unsqueeze(-2).unbind(-1), strict=True)
        for product, constant in layers:
            alpha = alpha * (1 + product) + constant
        return alpha * last[0] + last[1]

    def tunable(self) -> list[Tensor]:
        return [*super().tunable(), self.cross, self.shift]


class DCNF(DCN):
    """DCN that takes fine-tuning steps on the support."""

    name = "dcn-f"


def _product(x: Features, weight: Tensor) -> Tensor:
    """x W [b, R, h] with everybody's W [d, h], or each task's own [b, d, h]."""
    if weight.dim() == 2:
        return x.times(weight, weight.new_zeros(weight.shape[1]))
    return Private((weight,), weight.new_zeros(1, 1, 1), False).forward(x)
