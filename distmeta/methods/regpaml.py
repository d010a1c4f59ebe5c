"""REG-PAML (paper 001, "Regularizer-based PAML"): PAML whose loss also holds γ ‖∂L_i/∂θ‖² |α(h_i)| for each user.

The term bounds how far the users' losses lie apart: where it is 0 the model does well by a user before it adapts. The
gradient is that of the support loss at the first inner step, over all that adapts; its norm comes from Gram matrices
(adaptation/norm.py), so neither it nor a second pass is needed.
"""

from collections.abc import Mapping

from torch import Tensor

from distmeta.adaptation.maps import Map, Rate
from distmeta.adaptation.norm import squared_norm
from distmeta.adaptation.tape import Records
from distmeta.methods.paml import PAML
from distmeta.networks import Encoded
from distmeta.tasks import TaskBlock


class RegPAML(PAML):
    """PAML with a regulariser; it needs no memory of the users."""

    name = "reg-paml"

    def block_loss(self, block: TaskBlock, encoded: Encoded, rates: Mapping[Map, Rate]) -> Tensor:
        norms: list[Tensor] = []

        def watch(records: Records) -> None:
            if not norms:  # the first step's
                norms.append(squared_norm(records))

        fast = self.fast_weights(block, encoded, rates, watch=watch)
        loss = self.head.error(self.outputs(block, encoded, fast), block.query)
        return loss + self.options.gamma * sum(norms) * self.alpha(rates).abs()
