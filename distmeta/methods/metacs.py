"""MetaCS-DNN (Bharadhwaj, IJCNN 2019): every parameter adapts to a user, from the inputs to the prediction.

As paper 003 (§3.3.1) describes it: MeLU's network, "the difference is the local and global parameters involve all
parameters from the inputs to the predictions"; so the embedding tables adapt too, without a copy a task.
"""

from distmeta.adaptation.maps import Map
from distmeta.methods.gradient import LayerRates


class MetaCS(LayerRates):
    """Embeddings and decision layers adapted."""

    name = "metacs"

    def adapted(self) -> list[Map]:
        return self.everything()
