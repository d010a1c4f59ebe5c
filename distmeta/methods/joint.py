"""Recommenders that are trained jointly, on all rows of all tasks alike, and what fine-tunes them on a support.

One network for everybody: the loss of a task is that of its support and query rows together, and nothing adapts while
it is trained. A new task is answered by the network as it is, or, with `steps`, by a copy of its own that is
fine-tuned on its support (DCN-F, paper 002, §4.1.3 and §7.2.2: Adam). What a task may fine-tune are the layers, and the
features of its user: fields, and an id of which a user who was not trained on has the embedding 0. Tables stay.

A network is written once for both: `Weights` says whether a layer is everybody's, whose product with a user is then
taken once a task and with an item once a batch, or each task's own.

Shape letters: b tasks, R rows, F fields, e embedding width, U unique items of a batch, v width of pretrained vectors.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distmeta import draws
from distmeta.adaptation.features import Dense, Features, Gathered, Part, PerTask, Unique
from distmeta.adaptation.maps import Linear
from distmeta.data.protocols.base import KINDS
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.methods.finetuning import Weights, fine_tuned
from distmeta.methods.heads import Heads
from distmeta.methods.pretrained import WithVectors
from distmeta.networks import USER_ID, Embedding, Encoded
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock


@dataclass
class Sides:
    """The features of some rows: their users' and their items'."""

    user: Part
    item: Part
    block: TaskBlock
    batch: TaskBatch
    kept: dict[tuple[int, str], tuple[Unique, Unique]]
    """What was made of the batch's unique users and items; see `derived`."""

    def derived(self, part: Part, name: str, make: Callable[[Tensor], Tensor]) -> Part:
        """make(x) of a part's features x [..., d]: of unique ones once a batch, under `name`."""
        if isinstance(part, PerTask):
            return PerTask(make(part.x))
        assert isinstance(part, Gathered)
        key = (id(part.unique), f"{name} {torch.is_grad_enabled()}")
        if key not in self.kept:
            self.kept[key] = (part.unique, Unique(make(part.unique.x)))  # held, so its id stays its own
        return Gathered(self.kept[key][1], part.index)


class Joint(WithVectors):
    """Base: a subclass has the network.

    The features of a user or item are, for each of its fields, e numbers (and one more where `linear`), then its
    pretrained vector.
    """

    linear = False
    """Whether each field value has a weight besides its embedding: the last number of its row."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        o = options
        self.heads = Heads(dataset, o.query_loss)
        self.vectors = self.vector_width(o)
        self.embedding = Embedding(
            dataset,
            items,
            o.embedding + self.linear,
            o.item_ids,
            o.user_ids,
            vectors=self.vectors,
            id_buckets=o.id_buckets,
        )
        with torch.no_grad():
            for table in (*self.embedding.user_tables, *self.embedding.item_tables):
                table.weight[:, o.embedding :] = 0  # type: ignore[index]
            if o.user_ids:
                self.embedding.users()[USER_ID].weight.zero_()
        self.expect_vectors()
        self.user_fields, self.item_fields = len(self.embedding.user_tables), len(self.embedding.item_tables)
        self.width = o.embedding * (self.user_fields + self.item_fields) + 2 * self.vectors
        """Of the features of user and item side by side, weights left out."""
        widths = [self.width, *o.hidden]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
        self.last = Linear(o.hidden[-1], 1)
        with torch.no_grad():
            self.last.bias.fill_(self.heads.users.start)

    # ---- the network

    @abstractmethod
    def network(self, w: Weights, sides: Sides) -> Tensor:
        """Outputs [b, R] of the rows."""

    def deep(self, w: Weights, sides: Sides) -> Tensor:
        """The last hidden layer's units [b, R, h] of an MLP with ReLU on all embeddings side by side."""
        first, *others = self.layers
        h = torch.relu(w.linear(first, self.features(sides)))
        for layer in others:
            h = torch.relu(w.linear(layer, Features(Dense(h))))
        return h

    def output(self, w: Weights, h: Tensor) -> Tensor:
        """[b, R]: the linear output of the deep part's units, with the network's bias."""
        return w.linear(self.last, Features(Dense(h))).squeeze(-1)

    def features(self, sides: Sides) -> Features:
        """Embeddings of user and item side by side, and their vectors."""
        if not self.linear:
            return Features(sides.user, sides.item)
        both = ((sides.user, self.user_fields), (sides.item, self.item_fields))
        return Features(*(sides.derived(part, "embeddings", lambda x, n=n: self._plain(x, n)) for part, n in both))

    def embeddings(self, x: Tensor, fields: int) -> Tensor:
        """[..., F, e] of one side's features x."""
        return self._rows(x, fields)[..., : self.options.embedding]

    def weights(self, sides: Sides) -> Tensor:
        """Σ of the weights of the rows' field values, user's and item's: [b, R]."""
        both = ((sides.user, self.user_fields), (sides.item, self.item_fields))
        user, item = (
            sides.derived(part, "weights", lambda x, n=n: self._rows(x, n)[..., -1].sum(-1, keepdim=True)).rows()
            for part, n in both
        )
        return (user + item).squeeze(-1)

    def _rows(self, x: Tensor, fields: int) -> Tensor:
        """[..., F, e] or, with weights, [..., F, e + 1] of one side's features x."""
        width = self.options.embedding + self.linear
        return x[..., : fields * width].unflatten(-1, (fields, width))

    def _plain(self, x: Tensor, fields: int) -> Tensor:
        """One side's features without weights: [..., F · e + v]."""
        vectors = x[..., fields * (self.options.embedding + 1) :]
        return torch.cat((self.embeddings(x, fields).flatten(-2), vectors), -1)

    # ---- the contract

    def loss(self, batch: TaskBatch) -> Tensor:
        batch = self._known(batch, self.options.hidden_ids)
        encoded, kept, losses = self.embedding.encode(batch), {}, []
        for block in batch:
            rows = block.rows()
            outputs = self.network(Weights(), self._sides(batch, block, rows, encoded, kept))
            losses.append(self.heads.of(block).error(outputs, rows))
        return torch.cat(losses) if losses else self.last.bias.new_zeros(0)

    @torch.no_grad()
    def adapt(self, batch: TaskBatch) -> list[Weights]:
        """The weights that are each task's own."""
        if not self.options.steps:
            return [Weights()] * len(batch.blocks)
        batch = self._known(batch)
        encoded, kept = self.embedding.encode(batch), {}
        return [self._fine_tuned(self._sides(batch, block, block.support, encoded, kept)) for block in batch]

    @torch.no_grad()
    def predict(self, state: list[Weights], batch: TaskBatch) -> list[Tensor]:
        batch = self._known(batch)
        encoded, kept, scores = self.embedding.encode(batch), {}, []
        for w, block in zip(state, batch, strict=True):
            outputs = self.network(w, self._sides(batch, block, block.query, encoded, kept, w.user))
            scores.append(self.heads.of(block).score(outputs))
        return scores

    def _sides(
        self,
        batch: TaskBatch,
        block: TaskBlock,
        rows: Rows,
        encoded: Encoded,
        kept: dict[tuple[int, str], tuple[Unique, Unique]],
        own: Tensor | None = None,
    ) -> Sides:
        user, item = encoded.place(block, rows)
        return Sides(user.base() if own is None else PerTask(own), item.base(), block, batch, kept)

    def _known(self, batch: TaskBatch, hidden: float = 0.0) -> TaskBatch:
        """The batch whose tasks' users have their id as a field, but for a share that is `hidden` this epoch."""
        if not self.options.user_ids or batch.users is not None:
            return batch
        blocks = []
        for block in batch:
            user = block.task // KINDS
            known = (user >= 0) & (user < self.dataset.users)
            if hidden:
                u = draws.uniform(batch.seed, batch.epoch, block.task.cpu().numpy(), purpose="joint/hidden id")
                known = known & torch.from_numpy(u >= hidden).to(known.device)
            bag = Bag((user * known)[:, None], known[:, None].to(self.last.weight.dtype))
            blocks.append(replace(block, user={**block.user, USER_ID: bag}))
        return replace(batch, blocks=tuple(blocks))

    # ---- fine-tuning

    def _fine_tuned(self, sides: Sides) -> Weights:
        """What each task of a block has of its own after fine-tuning on its support."""
        o, support = self.options, sides.block.support
        personal = isinstance(sides.user, PerTask)
        if o.tuned == "user" and not personal:
            raise UserError("--tuned user: the tasks are scenarios, which have no user of their own; choose layers")

        def outputs(w: Weights) -> Tensor:
            return self.network(w, sides if w.user is None else replace(sides, user=PerTask(w.user)))

        return fine_tuned(
            outputs,
            lambda y: self.heads.of(sides.block).delta(y, support),
            support.mask.sum(1),
            [] if o.tuned == "user" else self.tunable(),
            sides.user.rows() if personal and o.tuned != "layers" else None,
            o,
        )

    def tunable(self) -> list[Tensor]:
        """The parameters that a task may have of its own: the layers'."""
        return [p for layer in (*self.layers, self.last) for p in layer.parameters()]
