"""CoNet (Hu, Zhang & Yang, CIKM 2018; the baseline of paper 002, §4.1.3): a network on the scenarios and one on a
source domain, side by side, which see each other's layers.

One is given the user and an item of the scenario, the other the same user and an item of the source domain that the
user likes. At every layer x_t ← relu(W_t x_t + H x_s + b_t) and x_s ← relu(W_s x_s + H x_t + b_s), H the same for both;
each has an output of its own. Both are trained: the scenarios' rows, support and query alike, and beside each row its
source item against one that was drawn. Nothing is adapted: of a new scenario the support is not looked at.

The source domain is of positives on items of no scenario, as paper 002 takes movies without a genre, or with --source
others of those in other scenarios; pairs that validation or test ask about are in neither. `source_items` of a user are
kept, chosen by hash. Which of them stands beside a user's rows is drawn by task and user, anew each epoch; when
predicting always the same. A user without any has a vector that is learned.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from distmeta import draws
from distmeta.adaptation.lookup import gather
from distmeta.adaptation.maps import Linear
from distmeta.adaptation.products import affine
from distmeta.data.domains import Surroundings
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.methods.heads import RANKING, head
from distmeta.methods.pretrained import WithVectors
from distmeta.networks import Embedding
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

WORDS, BITS = 4, 63
"""Of the scenarios of an item a table holds WORDS · BITS bits: a scenario's is a hash of its task id. An item that
shares one with the scenario at hand without being in it is passed over too."""
TRIES = 4
"""Draws of a negative; the first that is not among the user's own is taken."""


class CoNet(WithVectors):
    """The cross-stitched pair of networks, and the users' source items."""

    name = "conet"
    surveys = True
    source: Tensor
    """int32 [users, W]: items; −1: none."""
    pool: Tensor
    """int32 [items]: the source domain's items; then −1."""
    member: Tensor
    """int64 [items, WORDS]: bits of the scenarios that each is in, with --source others."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        o = options
        # scenarios' rows are clicks whatever the dataset's labels
        self.head = head(dataset, "squared") if o.query_loss == "cross-entropy" else RANKING
        vectors = self.vector_width(o)
        self.embedding = Embedding(
            dataset, items, o.embedding, o.item_ids, o.user_ids, vectors=vectors, id_buckets=o.id_buckets
        )
        self.expect_vectors()
        self.prepares = True
        widths = [self.embedding.user_width + self.embedding.item_width, *o.hidden]
        pairs = list(pairwise(widths))
        self.target = nn.ModuleList(Linear(a, b) for a, b in pairs)
        self.other = nn.ModuleList(Linear(a, b) for a, b in pairs)
        self.cross = nn.ParameterList(Linear(a, b).weight for a, b in pairs)
        self.out = nn.ModuleList(Linear(widths[-1], 1) for _ in range(2))
        self.nothing = nn.Parameter(0.1 * torch.randn(self.embedding.item_width))
        """Stands for the source item of a user without any."""
        self.register_buffer("source", torch.full((dataset.users, o.source_items), -1, dtype=torch.int32))
        self.register_buffer("pool", torch.full((dataset.items,), -1, dtype=torch.int32))
        others = dataset.items if o.source == "others" else 0
        self.register_buffer("member", torch.zeros(others, WORDS, dtype=torch.int64))
        self.around: Surroundings | None = None

    # ---- beforehand

    def survey(self, around: Surroundings) -> None:
        self.around = around

    def prepare(self, user: NDArray[np.int64], item: NDArray[np.int64]) -> Iterator[str]:
        """The source domain, and the vectors that are learned before.

        Raises:
            UserError: no user likes an item of no scenario.
        """
        assert self.around is not None
        around, self.around = self.around, None
        of, what = (around.user, around.item) if self.options.source == "outside" else (user, item)
        if not len(of):
            raise UserError(
                "conet: nobody likes an item that is in no scenario, so there is no source domain; give --source others"
            )
        if self.options.source == "others":
            word, bit = scenario_bit(around.task)
            bits = np.zeros(self.member.shape, np.int64)
            np.bitwise_or.at(bits, (around.candidate, word), bit)
            self.member.copy_(torch.from_numpy(bits))
        kept = chosen(of, what, self.options.source_items)
        self.source[kept[0], kept[1]] = torch.from_numpy(kept[2].astype(np.int32)).to(self.source.device)
        pool = np.unique(what)
        self.pool[: len(pool)] = torch.from_numpy(pool.astype(np.int32)).to(self.pool.device)
        told = f"source domain: {len(of):,} positives of {len(np.unique(of)):,} users on {len(pool):,} items"
        yield told
        if self._vectors():
            for said in super().prepare(user, item):
                yield f"{told}; {said}"

    # ---- the networks

    def beside(self, task: Tensor, user: Tensor, *counters: int) -> Tensor:
        """The source item (int64, −1: none) of each task and user (int64 [n] each)."""
        own = self.source[user]
        there = own >= 0
        if self.options.source == "others":
            word, bit = (torch.from_numpy(a).to(task.device) for a in scenario_bit(task.cpu().numpy()))
            bits = self.member[own.clamp(min=0).long(), word.unsqueeze(1)]
            there = there & (bits & bit.unsqueeze(1) == 0)
        u = draws.uniform(*counters, task.cpu().numpy(), user.cpu().numpy(), purpose="conet/source")
        nth = (torch.from_numpy(u).to(task.device) * there.sum(1)).long()
        place = (there & (there.cumsum(1) == nth.unsqueeze(1) + 1)).int().argmax(1, keepdim=True)
        return torch.where(there.any(1), own.gather(1, place).squeeze(1).long(), -1)

    def negatives(self, task: Tensor, user: Tensor, *counters: int) -> Tensor:
        """An item of the source domain (int64 [n]) for each task and user that is none of those kept of the user."""
        many = max(1, int((self.pool >= 0).sum()))
        ids = [a.cpu().numpy()[:, None] for a in (task, user)]
        u = draws.uniform(*counters, *ids, np.arange(TRIES), purpose="conet/negative")
        drawn = self.pool[torch.from_numpy((u * many).astype(np.int64)).to(task.device)]
        new = (drawn.unsqueeze(2) != self.source[user].unsqueeze(1)).all(2)
        return drawn.gather(1, new.int().argmax(1, keepdim=True)).squeeze(1).long()

    def embedded(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct of some items (int64 [n], −1: none) embedded, [m, d_i], and where each is among them."""
        each, which = torch.unique(items, return_inverse=True)
        x = self.embedding.item_rows(each.clamp(min=0))[0]
        return torch.where((each < 0).unsqueeze(1), self.nothing, x), which

    def outputs(self, people: Tensor, items: Tensor, rows: Rows, source: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [b, R] of both networks, the scenario's first.

        Args:
            people: embedded users of the batch [V, d_u]. items: embedded items [U, d_i].
            source: item of each row, int64 [b, R].
        """
        x, which = self.embedded(source.flatten())
        user, item = (w.split([people.shape[1], items.shape[1]]) for w in self._first())
        assert rows.user is not None
        # a layer is linear in its parts: each user, item and source item is multiplied once
        z = (
            gather(affine(people, user[0]), rows.user)
            + gather(affine(items, user[1]), rows.item)
            + gather(affine(x, item[1]), which.view_as(rows.item))
        )
        z = torch.relu(z + self._bias(0))
        for i in range(1, len(self.target)):
            z = torch.relu(affine(z, self._weight(i), self._bias(i)))
        of_target, of_source = z.chunk(2, -1)
        return _out(self.out[0], of_target), _out(self.out[1], of_source)

    def _first(self) -> tuple[Tensor, Tensor]:
        """What multiplies [user, item] and [user, source item] in the first layer [d, 2 h]; the user, who is in both,
        has the sum in the first of them."""
        w = self._weight(0)
        of_target, of_source = w.chunk(2)
        d = self.embedding.user_width
        return torch.cat((of_target[:d] + of_source[:d], of_target[d:])), of_source

    def _weight(self, i: int) -> Tensor:
        """[x_t, x_s] → both networks' layer i: [2 d, 2 h]."""
        t, s, h = self.target[i].weight, self.other[i].weight, self.cross[i]
        return torch.cat((torch.cat((t, h), 1), torch.cat((h, s), 1)))  # type: ignore[arg-type]

    def _bias(self, i: int) -> Tensor:
        return torch.cat((self.target[i].bias, self.other[i].bias))  # type: ignore[arg-type]

    # ---- learning and predicting

    def loss(self, batch: TaskBatch) -> Tensor:
        people, items = self._features(batch)
        losses = [self._block_loss(batch, block, people, items) for block in batch]
        return torch.cat(losses) if losses else self.nothing.new_zeros(0)

    def _block_loss(self, batch: TaskBatch, block: TaskBlock, people: Tensor, items: Tensor) -> Tensor:
        rows, (task, user) = block.rows(), self._ids(batch, block, block.rows())
        source = self.beside(task, user, batch.seed, batch.epoch)
        known = (source >= 0).view_as(rows.item) & rows.mask
        negative = torch.where(source >= 0, self.negatives(task, user, batch.seed, batch.epoch), -1)
        t, liked = self.outputs(people, items, rows, source.view_as(rows.item))
        _, drawn = self.outputs(people, items, rows, negative.view_as(rows.item))
        if self.head is RANKING:
            errors = torch.relu(1 - liked + drawn)
        else:
            errors = (F.softplus(-liked) + F.softplus(drawn)) / 2
        source_loss = (errors * known).sum(1) / known.sum(1).clamp(min=1)
        return self.head.error(t, rows) + self.options.source_weight * source_loss

    def adapt(self, batch: TaskBatch) -> list[None]:
        return [None for _ in batch]

    @torch.no_grad()
    def predict(self, state: list[None], batch: TaskBatch) -> list[Tensor]:
        people, items = self._features(batch)
        scores = []
        for block in batch:
            source = self.beside(*self._ids(batch, block, block.query)).view_as(block.query.item)
            scores.append(self.head.score(self.outputs(people, items, block.query, source)[0]))
        return scores

    def _features(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """The batch's users [V, d_u] and items [U, d_i] embedded.

        Raises:
            UserError: the tasks are users.
        """
        encoded = self.embedding.encode(batch)
        if batch.users is None and batch.blocks:
            raise UserError("conet learns scenarios and the tasks are users; give --protocol cmml-scenario")
        return encoded.people(), encoded.items()

    def _ids(self, batch: TaskBatch, block: TaskBlock, rows: Rows) -> tuple[Tensor, Tensor]:
        """Task and user (of the dataset) of each row, int64 [b · R] each."""
        assert batch.users is not None
        assert rows.user is not None
        return block.task.repeat_interleave(rows.user.shape[1]), batch.users[rows.user.flatten()]


def _out(layer: Any, x: Tensor) -> Tensor:
    return affine(x, layer.weight, layer.bias).squeeze(-1)


def scenario_bit(task: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The word and, in it, the bit of each scenario."""
    place = draws.hashed(task, purpose="conet/scenario") % np.uint64(WORDS * BITS)
    return (place // np.uint64(BITS)).astype(np.int64), np.int64(1) << (place % np.uint64(BITS)).astype(np.int64)


def chosen(
    user: NDArray[np.int64], item: NDArray[np.int64], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """`most` items a user at most, by hash: users, places from 0, items."""
    order = np.lexsort((draws.hashed(user, item, purpose="conet/kept"), user))
    user, item = user[order], item[order]
    first = np.flatnonzero(np.r_[True, user[1:] != user[:-1]])
    place = np.arange(len(user)) - np.repeat(first, np.diff(np.r_[first, len(user)]))
    kept = place < most
    return user[kept], place[kept], item[kept]
