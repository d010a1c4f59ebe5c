"""CMML (Feng et al., CIKM 2021; paper 002): the support is encoded to a context that modulates the recommender.

C = encoder(support) (Eq. 6 and the lost 7), C_h = generator(C, e_u, e_i) for each query row (the lost Eq. 8), and a
backbone on [e_u, e_i] that C_h modulates: the weights of its last layer (Eq. 9, cmml-linear), its layers by a sigmoid
(Eq. 10, cmml-sigmoid) or by FiLM (Eq. 11, cmml-film), or the routes between its modules (Eq. 12, 13, cmml-softm). All
of it is feed-forward: there is no inner loop, and serving needs no gradient. A user's half is worked out once a task
and an item's once a batch wherever a layer is linear in them.

The loss is the query's: squared error of ratings (Eq. 5); of clicks the cross-entropy, as for the other methods, or
with --query-loss hinge that of Eq. 4, which is what scenarios of positives and sampled negatives are learned by in any
case but --query-loss cross-entropy. Their users and items may bring vectors of collaborative filtering (--pretrained;
§4.1.1, after s²Meta). A task without support has a context that is learned, from those whose support
--hidden-support hides.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distmeta import draws
from distmeta.adaptation.features import Features
from distmeta.data.schema import Dataset
from distmeta.methods import modulation, options
from distmeta.methods.contexts import Hybrid, Label, encoder
from distmeta.methods.heads import Heads
from distmeta.methods.pretrained import WithVectors
from distmeta.networks import Embedding, Encoded
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

SIZES: dict[str, dict[str, Any]] = {
    "user": {"encoder": "mean", "encoder_hidden": (64,), "units": 64, "hidden": (64, 64), "hyper": 256},
    "scenario": {"encoder": "gru", "encoder_hidden": (256,), "units": 256, "hidden": (64, 64, 64), "hyper": 64},
    "text": {"encoder": "gru", "encoder_hidden": (128, 128), "units": 128, "hidden": (64, 64, 64), "hyper": 64},
}
"""The paper's sizes: §7.2.2, §7.2.1 and §4.1.4 (a hypernetwork of 128 for Taobao, as its own row says)."""


def sized(given: options.CMML) -> options.CMML:
    """The options with the sizes of --sizes where none is given."""
    unset = (0, (), "auto")
    o = replace(given, **{k: v for k, v in SIZES[given.sizes].items() if getattr(given, k) in unset})
    if isinstance(o, options.CMMLSoftM) and not o.module_layers:
        o = replace(o, module_layers=len(o.hidden))
    return o


class CMML(WithVectors):
    """What the four variants share: everything but the modulation."""

    modulated: ClassVar[type[modulation.Backbone]]
    """The backbone and what modulates it."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        o = sized(options)
        super().__init__(o, dataset, items)
        self.heads = Heads(dataset, o.query_loss)
        vectors = self.vector_width(o)
        self.embedding = Embedding(
            dataset, items, o.embedding, o.item_ids, o.user_ids, o.embedding_std, vectors, o.id_buckets
        )
        self.expect_vectors()
        d = self.embedding.user_width + self.embedding.item_width
        self.label = Label(dataset.label, o.labels, d)
        self.encoder = encoder(o.encoder, d + self.label.width, o.units, o.encoder_hidden, d)
        self.nothing = nn.Parameter(0.1 * torch.randn(d))
        """The context of a task without support."""
        self.hybrid = Hybrid(o.hybrid, d)
        self.backbone = self.modulated(d, o, self.heads.users.start)

    def context(self, block: TaskBlock, encoded: Encoded, hidden: Tensor | None = None) -> Tensor:
        """C [b, d] of the block's tasks from their support; without it where `hidden` (bool [b])."""
        support = block.support
        if hidden is not None:
            support = replace(support, mask=support.mask & ~hidden[:, None])
        if self.options.positives:
            support = self.label.positive(support)
        parts = [place.base() for place in encoded.place(block, support, detach=self.options.detach)]
        c = self.encoder(Features(*parts, *self.label.beside(parts, support)), support.mask)
        return torch.where(support.mask.any(1, keepdim=True), c, self.nothing)

    def rows(self, block: TaskBlock, encoded: Encoded, context: Tensor, rows: Rows) -> tuple[Features, Features]:
        """The features and the hybrid context of some rows of the block."""
        parts = [place.base() for place in encoded.place(block, rows)]
        return Features(*parts), self.hybrid(context, parts)

    def outputs(self, block: TaskBlock, encoded: Encoded, context: Tensor) -> Tensor:
        """Outputs [b, Q] for the query rows, given C [b, d]."""
        return self.backbone(*self.rows(block, encoded, context, block.query))

    def loss(self, batch: TaskBatch) -> Tensor:
        encoded = self.embedding.encode(batch)
        losses = []
        for block in batch:
            context = self.context(block, encoded, self._hidden(batch, block))
            losses.append(self.heads.of(block).error(self.outputs(block, encoded, context), block.query))
        return torch.cat(losses) if losses else next(self.parameters()).new_zeros(0)

    @torch.no_grad()
    def adapt(self, batch: TaskBatch) -> list[Tensor]:
        """The context [b, d] of each block's tasks."""
        encoded = self.embedding.encode(batch)
        return [self.context(block, encoded) for block in batch]

    @torch.no_grad()
    def predict(self, state: list[Tensor], batch: TaskBatch) -> list[Tensor]:
        encoded = self.embedding.encode(batch)
        pairs = zip(state, batch, strict=True)
        return [self.heads.of(block).score(self.outputs(block, encoded, context)) for context, block in pairs]

    def traits(self, state: list[Tensor], batch: TaskBatch) -> dict[str, list[Tensor]]:
        """The context [b, d] of each task (paper 002, Figure 3)."""
        return {"context": state}

    def _hidden(self, batch: TaskBatch, block: TaskBlock) -> Tensor | None:
        """bool [b]: whose support is hidden this epoch."""
        if not self.options.hidden_support:
            return None
        u = draws.uniform(batch.seed, batch.epoch, block.task.cpu().numpy(), purpose="cmml/hidden support")
        return torch.from_numpy(u < self.options.hidden_support).to(block.task.device)


class CMMLLinear(CMML):
    """Weight modulation: the last layer's weights are generated."""

    name = "cmml-linear"
    modulated = modulation.WeightModulation


class CMMLSigmoid(CMML):
    """Layer modulation by weights between 0 and 1."""

    name = "cmml-sigmoid"
    modulated = modulation.SigmoidModulation


class CMMLFilm(CMML):
    """Layer modulation by weights and biases."""

    name = "cmml-film"
    modulated = modulation.FiLM


class CMMLSoftM(CMML):
    """Soft modularization: routes between modules."""

    name = "cmml-softm"
    modulated = modulation.SoftModularization

    @torch.no_grad()
    def routes(self, state: list[Tensor], batch: TaskBatch) -> list[list[Tensor]]:
        """Of each block the probabilities of the routes to each layer and to the output: [b, Q, m, m] and [b, Q, 1, m],
        destinations by sources; [b, 1, …] where the context is the same for all rows (--hybrid none)."""
        encoded = self.embedding.encode(batch)
        assert isinstance(self.backbone, modulation.SoftModularization)
        return [
            self.backbone.routes(self.rows(block, encoded, context, block.query)[1])
            for context, block in zip(state, batch, strict=True)
        ]

    def traits(self, state: list[Tensor], batch: TaskBatch) -> dict[str, list[Tensor]]:
        """Also the routes to each layer [b, m · m] and to the output [b, m], means over a task's query (Figure 4)."""
        found = super().traits(state, batch)
        for block, routes in zip(batch, self.routes(state, batch), strict=True):
            mask = block.query.mask.to(routes[-1].dtype)
            share = mask / mask.sum(1, keepdim=True).clamp(min=1)
            for i, route in enumerate(routes, 1):
                each = route.expand(-1, mask.shape[1], -1, -1)
                found.setdefault(f"route {i}", []).append(torch.einsum("br,brij->bij", share, each).flatten(1))
        return found
