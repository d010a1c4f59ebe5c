"""MeLU (Lee et al., KDD 2019): the decision layers adapt to a user, the embeddings do not.

As paper 002 (Table 3) and paper 003 (§3.3.1) describe it: user and item embeddings side by side into fully connected
layers; the local update (θ ← θ − α ∇L on the support) changes the decision layers only, the global update changes
all parameters through the exact second-order meta-gradient. The public code cuts that gradient; we do not.
"""

from distmeta.adaptation.maps import Map
from distmeta.methods.gradient import LayerRates


class MeLU(LayerRates):
    """Decision layers adapted, embeddings fixed inside."""

    name = "melu"

    def adapted(self) -> list[Map]:
        return list(self.decision)
