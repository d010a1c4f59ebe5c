"""What methods that adapt by gradient steps share: MAML for recommendation on the engine of distmeta.adaptation.

A method says which maps adapt and how fast; the rest (support pass, inner steps, query pass, exact or first-order
meta-gradient) is the same for all. So is what a prediction means, which the dataset's labels decide: a rating, or the
logit of a click.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distmeta.adaptation.cost import Plan
from distmeta.adaptation.fast import FastWeights
from distmeta.adaptation.inner import Turn, adapt
from distmeta.adaptation.maps import Layer, Map, Mix, Rate
from distmeta.adaptation.tape import Node, Records, Tape
from distmeta.data.schema import Dataset
from distmeta.methods.base import Method
from distmeta.methods.heads import head
from distmeta.networks import Decision, Embedding, Encoded, RowPlace, UserPlace
from distmeta.tasks import Bag, TaskBatch, TaskBlock


class GradientMethod(Method):
    """Embeddings of user and item fields, a decision MLP, and k inner steps on the support's loss."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.head = head(dataset, options.query_loss)
        self.embedding = Embedding(dataset, items, options.embedding, options.item_ids, id_buckets=options.id_buckets)
        self.decision = self.output_layers()
        with torch.no_grad():
            self.decision.output_bias.fill_(self.head.start)

    @abstractmethod
    def adapted(self) -> list[Map]:
        """The maps that the inner loop changes."""

    @abstractmethod
    def rates(self, batch: TaskBatch, encoded: Encoded) -> list[Mapping[Map, Rate]]:
        """Step size of each adapted map, for the tasks of each block."""

    def everything(self) -> list[Map]:
        """All maps: the embedding tables and the decision layers."""
        return [*self.embedding.users().values(), *self.embedding.items().values(), *self.decision]

    def output_layers(self) -> Decision:
        """The layers that give the output, on the features of user and item side by side."""
        return Decision(self.embedding.user_width + self.embedding.item_width, self.options.hidden, self.options.wide)

    def forward(self, tape: Tape, users: UserPlace | RowPlace, items: RowPlace) -> Node:
        """Outputs [b, R, C] of the rows at `items` for the users at `users`."""
        return self.decision(
            tape, tape.lookup(self.embedding.users(), users), tape.lookup(self.embedding.items(), items)
        )

    def fast_weights(
        self,
        block: TaskBlock,
        encoded: Encoded,
        rates: Mapping[Map, Rate],
        steps: int | None = None,
        watch: Callable[[Records], None] | None = None,
    ) -> FastWeights:
        """The block's tasks after the inner loop; looks at user fields and support rows only.

        Args:
            rates: step size of each adapted map.
            steps: inner steps; None: as many as the options say.
            watch: as `adaptation.inner.adapt` takes it.
        """
        turns = self.turns(block, encoded, self.options.steps if steps is None else steps)
        return adapt(
            turns,
            rates,
            first_order=self.options.first_order,
            plan=Plan(len(turns), block.query.item.shape[1], self.options.form),
            delta=self.head.delta,
            mixes=self.mixes(block, encoded),
            watch=watch,
        )

    def mixes(self, block: TaskBlock, encoded: Encoded) -> Mapping[Layer, Mix]:
        """What the block's tasks start from in layers where that is their own: nowhere."""
        return {}

    def turns(self, block: TaskBlock, encoded: Encoded, steps: int) -> list[Turn]:
        """What each inner step looks at: the whole support."""
        users, items = encoded.place(block, block.support, detach=self.options.first_order)
        return [Turn(lambda tape: self(tape, users, items), block.support)] * steps

    def outputs(self, block: TaskBlock, encoded: Encoded, fast: FastWeights) -> Tensor:
        """The network's outputs [b, Q] (or [b, Q, C]) for the query rows with adapted weights."""
        return self(Tape(fast), *encoded.place(block, block.query)).part.rows().squeeze(-1)

    def block_loss(self, block: TaskBlock, encoded: Encoded, rates: Mapping[Map, Rate]) -> Tensor:
        """Query loss [b] of the block's tasks after adaptation, with graph."""
        return self.head.error(self.outputs(block, encoded, self.fast_weights(block, encoded, rates)), block.query)

    def loss(self, batch: TaskBatch) -> Tensor:
        encoded = self.embedding.encode(batch)
        rates = self.rates(batch, encoded)
        losses = [self.block_loss(block, encoded, own) for block, own in zip(batch, rates, strict=True)]
        return torch.cat(losses) if losses else self.decision.output_bias.new_zeros(0)

    @torch.no_grad()
    def adapt(self, batch: TaskBatch) -> list[FastWeights]:
        encoded = self.embedding.encode(batch)
        rates = self.rates(batch, encoded)
        return [self.fast_weights(block, encoded, own) for block, own in zip(batch, rates, strict=True)]

    @torch.no_grad()
    def predict(self, state: list[FastWeights], batch: TaskBatch) -> list[Tensor]:
        encoded = self.embedding.encode(batch)
        pairs = zip(state, batch, strict=True)
        return [self.head.score(self.outputs(block, encoded, fast)) for fast, block in pairs]


class LayerRates(GradientMethod):
    """A step size for each adapted map, positive, the same for all tasks; learned where the options say so (MAML++,
    Antoniou et al. 2019)."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        start = torch.full((len(self.adapted()),), options.local_lr).log()
        self.log_rate = nn.Parameter(start, requires_grad=options.learn_rates)

    def rates(self, batch: TaskBatch, encoded: Encoded) -> list[Mapping[Map, Rate]]:
        rates: dict[Map, Rate] = dict(zip(self.adapted(), self.log_rate.exp().unbind(), strict=True))
        return [rates] * len(batch.blocks)
