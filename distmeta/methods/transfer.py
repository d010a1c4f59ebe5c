"""Transfer learning, the baseline of paper 001 (Table 2): one model for everybody, fine-tuned on the support.

"We train the model with all users in training data and fine-tune the trained model in each user support set in the
test data" (after Tan et al., ICANN 2018). The network is that of the other gradient methods, and fine-tuning is their
inner loop; the difference is that training does not look ahead to it.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from distmeta.adaptation.cost import Plan
from distmeta.adaptation.fast import FastWeights
from distmeta.adaptation.maps import Map, Rate
from distmeta.methods.gradient import LayerRates
from distmeta.networks import Encoded
from distmeta.tasks import TaskBlock


class Transfer(LayerRates):
    """Joint training over support and query rows alike; plain gradient steps on a new user's support."""

    name = "transfer"

    def adapted(self) -> list[Map]:
        if self.options.tuned == "decision":
            return list(self.decision)
        return self.everything()

    def block_loss(self, block: TaskBlock, encoded: Encoded, rates: Mapping[Map, Rate]) -> Tensor:
        """Mean loss [b] over each task's support and query rows at the joint parameters: no inner step."""
        whole = replace(block, query=block.rows())
        unmoved = FastWeights({}, Plan(0, 0))
        return self.head.error(self.outputs(whole, encoded, unmoved), whole.query)
