"""RUM (Chen et al., WSDM 2018; the baseline of paper 003, §3.3.1 and A.2.2): a memory of the user's own.

The score of an item is y = e_uᵀ e_i with e_u = e_u* + α e_uᴹ, where e_u* comes from the user's fields and e_uᴹ is
read from the user's memory for that very item. Item-level, the memory holds the vectors of the last K items of the
support and is read by softmax(e_i · m_k). Feature-level, K keys are everybody's and the values a user's own: the
support's items are written one after the other, v_k ← v_k ∘ (1 − w_k σ(E e_i + b)) + w_k tanh(A e_i + a) with
w = softmax(e_i · key), and the values are read by softmax(e_i · key_k). The query's loss trains everything; the support
only fills the memory. A user without support has e_u* alone.

The paper's memory is of what was clicked on and knows no labels, nor has its score biases, nor is a step taken:
--labels none --biases none --steps 0 --slots 20 (of clicks, the memory then holds those rows alone that are clicks).
Ratings ask for more, and so what is written is by default multiplied by what the biases leave of its label, and then
--steps of gradient on the support, of the values in the memory alone, make it what paper 003 calls locally updated.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmeta.adaptation.lookup import gather
from distmeta.adaptation.maps import Linear
from distmeta.adaptation.products import affine
from distmeta.data.schema import Dataset
from distmeta.methods.base import Method
from distmeta.methods.contexts import Label
from distmeta.methods.heads import chosen
from distmeta.methods.recurrence import Packing
from distmeta.methods.writes import written
from distmeta.networks import Embedding
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock


@dataclass(frozen=True)
class Mind:
    """What is known of the users of a block."""

    user: Tensor
    """e_u* [b, d]."""
    bias: Tensor
    """What is added to all their scores: [b, 1]."""
    keys: Tensor
    """What items are compared with: [K, d], or [b, K, d] where each user has their own."""
    values: Tensor
    """[b, K, d]."""
    mask: Tensor | None
    """bool [b, K]: which slots there are; None: all."""


@dataclass(frozen=True)
class Asked:
    """Rows to be scored, with all but what the memories hold."""

    e: Tensor
    """Their items' e_i [b, R, d]."""
    read: Tensor
    """How they read the slots [b, R, K]."""
    known: Tensor
    """Their outputs [b, R] from an empty memory."""


class RUM(Method):
    """What the two levels share: everything but the writing."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        o = options
        self.head = chosen(dataset, o.query_loss)
        self.embedding = Embedding(dataset, items, o.embedding, o.item_ids, id_buckets=o.id_buckets)
        self.biased = int(o.biases != "none")
        self.item = Linear(self.embedding.item_width, o.width + self.biased)
        """To e_i, and the item's bias where there are biases."""
        self.user = Linear(self.embedding.user_width, o.width) if self.embedding.user_width else None
        self.nobody = None if self.user else nn.Parameter(0.1 * torch.randn(o.width))
        """e_u* of all, where users have no fields."""
        self.base = nn.Parameter(torch.tensor(self.head.start))
        """The global bias, which stays where it is where there are to be none."""
        self.base.requires_grad_(bool(self.biased))
        self.gain = nn.Parameter(torch.ones(()), requires_grad=o.biases == "user")
        self.label = Label(dataset.label, "none", 0)

    @abstractmethod
    def memory(self, x: Tensor, sides: list[Rows], scale: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Keys, values and mask (as `Mind`'s) of each block.

        Args:
            x: e_i of the batch's items [U, d].
            sides: the rows to write, those of a task first.
            scale: by how much [b, S].
        """

    def minds(self, batch: TaskBatch) -> tuple[list[Mind], Tensor, Tensor]:
        """What is known of each block's users after their support; and of the batch's items e_i [U, d] and biases [U].

        Raises:
            UserError: the tasks are scenarios.
        """
        encoded = self.embedding.encode(batch)
        own = [self.own(encoded.users(block), block) for block in batch]
        z = affine(encoded.items(), self.item.weight, self.item.bias)
        x, bias = z[:, : self.options.width], z[:, self.options.width :].sum(1)
        sides, scales, biases = [], [], []
        for block in batch:
            side, scale, offset = self.told(block.support, bias)
            sides.append(side)
            scales.append(scale)
            biases.append(offset)
        minds = [
            Mind(user, offset, *filled)
            for user, offset, filled in zip(own, biases, self.memory(x, sides, scales), strict=True)
        ]
        if self.options.steps:
            minds = [self.moved(mind, block.support, x, bias) for mind, block in zip(minds, batch, strict=True)]
        return minds, x, bias

    def own(self, fields: Tensor, block: TaskBlock) -> Tensor:
        """e_u* [b, d] from the embedded fields [b, F · e]."""
        if self.nobody is not None:
            return self.nobody.expand(len(block.task), -1)
        assert self.user is not None
        return affine(fields, self.user.weight, self.user.bias)

    def told(self, support: Rows, bias: Tensor) -> tuple[Rows, Tensor, Tensor]:
        """The rows to be remembered, what each is multiplied by [b, S], and the users' biases [b, 1].

        Args:
            bias: of the batch's items [U].
        """
        mask = support.mask.to(bias.dtype)
        known = self.base + gather(bias.unsqueeze(1), support.item).squeeze(-1)
        left = (support.label - self.head.score(known).to(bias.dtype)) * mask
        offset = left.new_zeros(len(mask), 1)
        if self.options.biases == "user":
            offset = (
                self.gain * left.sum(1, keepdim=True) / (mask.sum(1, keepdim=True) + self.options.shrink).clamp(min=1)
            )
        if self.options.labels == "residual":
            scale = (support.label - self.head.score(known + offset).to(bias.dtype)) * mask
        elif self.options.labels == "product":
            scale = self.label.scaled(support).to(bias.dtype)
        else:
            if self.dataset.label.kind == "click":
                support = self.label.positive(support)
            scale = support.mask.to(bias.dtype)
        return support, scale, offset

    def asked(self, mind: Mind, rows: Rows, x: Tensor, bias: Tensor) -> Asked:
        """Some rows, as a block's users and the keys of their memories meet them."""
        e = gather(x, rows.item)
        read = F.softmax(compared(e, mind), -1)
        if mind.mask is not None:
            read = read * mind.mask.unsqueeze(1)
        known = self.base + mind.bias + torch.bmm(e, mind.user.unsqueeze(-1)).squeeze(-1)
        if self.biased:
            known = known + gather(bias.unsqueeze(1), rows.item).squeeze(-1)
        return Asked(e, read, known)

    def outputs(self, asked: Asked, values: Tensor) -> Tensor:
        """Outputs [b, R] where the memories hold the values [b, K, d]."""
        return asked.known + self.options.alpha * (torch.bmm(asked.read, values) * asked.e).sum(-1)

    def scored(self, mind: Mind, rows: Rows, x: Tensor, bias: Tensor) -> Tensor:
        """Outputs [b, R] of some rows."""
        return self.outputs(self.asked(mind, rows, x, bias), mind.values)

    def moved(self, mind: Mind, support: Rows, x: Tensor, bias: Tensor) -> Mind:
        """After gradient steps of the values on the support's loss; how they are read does not change."""
        asked, values = self.asked(mind, support, x, bias), mind.values
        back, size = asked.read.transpose(1, 2), self.options.alpha * self.options.local_lr
        for _ in range(self.options.steps):
            delta = self.head.delta(self.outputs(asked, values), support) * size
            values = torch.baddbmm(values, back, delta.unsqueeze(-1) * asked.e, alpha=-1)
        return replace(mind, values=values)

    def loss(self, batch: TaskBatch) -> Tensor:
        minds, x, bias = self.minds(batch)
        pairs = zip(minds, batch, strict=True)
        losses = [self.head.error(self.scored(mind, block.query, x, bias), block.query) for mind, block in pairs]
        return torch.cat(losses) if losses else self.base.new_zeros(0)

    @torch.no_grad()
    def adapt(self, batch: TaskBatch) -> list[Mind]:
        return self.minds(batch)[0]

    @torch.no_grad()
    def predict(self, state: list[Mind], batch: TaskBatch) -> list[Tensor]:
        z = affine(self.embedding.item_rows(batch.items)[0], self.item.weight, self.item.bias)
        x, bias = z[:, : self.options.width], z[:, self.options.width :].sum(1)
        pairs = zip(state, batch, strict=True)
        return [self.head.score(self.scored(mind, block.query, x, bias)) for mind, block in pairs]


def compared(e: Tensor, mind: Mind) -> Tensor:
    """What the softmax of reading gets [b, R, K] of items e [b, R, d]; no slot that is not there is read."""
    found = e @ mind.keys.t() if mind.keys.dim() == 2 else torch.bmm(e, mind.keys.transpose(1, 2))
    return found if mind.mask is None else found.masked_fill(~mind.mask.unsqueeze(1), torch.finfo(e.dtype).min)


class RUMItem(RUM):
    """Item-level."""

    name = "rum-item"

    def memory(self, x: Tensor, sides: list[Rows], scale: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        return [self._last(x, side, by) for side, by in zip(sides, scale, strict=True)]

    def _last(self, x: Tensor, side: Rows, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last K rows: their items, those multiplied, and which there are."""
        count = side.mask.sum(1, keepdim=True)
        k = min(self.options.slots, side.mask.shape[1])
        place = (count - k).clamp(min=0) + torch.arange(k, device=count.device)
        e = gather(x, side.item.gather(1, place))
        return e, e * scale.gather(1, place).unsqueeze(-1), place < count


class RUMFeature(RUM):
    """Feature-level."""

    name = "rum-feature"

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        d = options.width
        self.keys = nn.Parameter(torch.randn(options.slots, d) / d**0.5)
        self.gates = Linear(d, 2 * d)
        """To what an item erases and what it adds, before σ and tanh."""

    def memory(self, x: Tensor, sides: list[Rows], scale: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        if not sides:
            return []
        sizes, longest = [len(s.mask) for s in sides], max(s.mask.shape[1] for s in sides)
        item, mask, by = (
            torch.cat([F.pad(t, (0, longest - t.shape[1])) for t in each])
            for each in ([s.item for s in sides], [s.mask for s in sides], scale)
        )
        packing = Packing.of(mask)
        place = (packing.task, packing.row)
        erase, add = affine(x, self.gates.weight, self.gates.bias).chunk(2, 1)  # of an item once, whoever rated it
        each = torch.cat((F.softmax(x @ self.keys.t(), -1), erase.sigmoid(), add.tanh()), 1)
        d = self.options.width
        w, erase, add = gather(each, item[place]).split([self.options.slots, d, d], 1)
        slots = written(w, erase, add * by[place].unsqueeze(1), packing)
        values = slots.new_zeros(len(mask), *slots.shape[1:]).index_copy(0, packing.tasks, slots)
        return [(self.keys, v, None) for v in values.split(sizes)]
