"""MAMO (Dong et al., KDD 2020; paper 003): memories give each user initial weights and a preference matrix.

p_u, the embedded fields of a user, is compared with K slots of the profile memory M_P: a_u = softmax(t cos(p_u, M_P))
(Eq. 3; the paper has t = 1, under which the slots become one). The user network starts from φ_u − τ a_uᵀ M_U (Eq. 4,
9), the recommender's first layer is M_uI = a_uᵀ M_UI on [e_u, e_i] (Eq. 2, 7), and all of it, with the item network and
the layers after M_uI, takes the inner steps (Eq. 11). Afterwards the users write to the memories (Eq. 5, 6, 8;
memory/attentive.py), and φ follows the exact meta-gradient (Eq. 12), or with --first-order the paper's. The fields'
embeddings are global: they belong to no θ and learn by Eq. 12 alone.

Nothing is propagated back into the memories, and a_u is a constant of p_u. The paper steps item by item
(--per-item); here a step takes the whole support by default. Eq. 6 takes the gradient of the support's loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmeta.adaptation.fast import FastWeights
from distmeta.adaptation.features import Features
from distmeta.adaptation.inner import Turn
from distmeta.adaptation.maps import Blank, Layer, Linear, Map, Mix, Rate
from distmeta.adaptation.tape import Node, Records, Tape
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.memory.attentive import PROFILE, Attentive, Factors, written
from distmeta.memory.base import Memory
from distmeta.methods.gradient import LayerRates
from distmeta.methods.heads import classes
from distmeta.networks import Decision, Encoded, RowPlace, UserPlace, wide_path
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

SLOPE = 0.01
"""Of the leaky ReLU below 0 (A.3: the default)."""
GRADIENT, PREFERENCE = "gradient", ("preference_user", "preference_item")
"""Parts of the memory beside PROFILE: M_U, one a layer of the user network; M_UI, what of it meets e_u and e_i."""


class MAMO(LayerRates):
    """Feature-specific and task-specific memory."""

    name = "mamo"

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self._recalled: dict[str, Tensor] = {}
        self._visits: list[_Visit] = []
        self._start = {name: (torch.randn(shape) * scale).numpy() for name, (shape, scale) in self._parts().items()}

    def output_layers(self) -> Decision:
        o, fields = self.options, self.embedding
        if not fields.user_width:
            raise UserError(
                f"{self.dataset.name}: has no user fields to tell users apart by, which mamo's memory needs"
            )
        if not fields.item_width:
            raise UserError(f"{self.dataset.name}: has no item fields to tell items apart by; add --item-ids")
        if o.classes:
            self.head = classes(self.dataset.label, o.query_loss)
        self._users, self._items = (_network(d, o.width, o.layers) for d in (fields.user_width, fields.item_width))
        self.users, self.items = nn.ModuleList(self._users), nn.ModuleList(self._items)
        self.preference = Blank(2 * o.width, o.width) if o.recommender == "memory" else None
        self.wide = wide_path(fields.user_width + fields.item_width, self.head.outputs) if o.wide else None
        shape = {"memory": (o.width, o.hidden), "dnn": (2 * o.width, (o.width, *o.hidden)), "nmf": (1, ())}
        return Decision(*shape[o.recommender], outputs=self.head.outputs, slope=SLOPE)

    def adapted(self) -> list[Map]:
        more = [m for m in (self.preference, self.wide) if m is not None]
        return [*self._users, *self._items, *self.decision, *more]

    def forward(self, tape: Tape, users: UserPlace | RowPlace, items: RowPlace) -> Node:
        p_u = tape.lookup(self.embedding.users(), users)
        p_i = tape.lookup(self.embedding.items(), items)
        e_u, e_i = p_u, p_i
        for layer in self._users:
            e_u = tape.relu(tape.linear(layer, e_u), SLOPE)
        first, *others = self._items
        e_i = tape.relu(tape.chain(others, tape.linear(first, e_i), SLOPE), SLOPE)
        if self.preference is not None:
            out = self.decision(tape, tape.linear(self.preference, e_u, e_i))
        elif self.options.recommender == "dnn":
            out = self.decision(tape, e_u, e_i)
        else:
            out = self.decision(tape, tape.dot(e_u, e_i))
        return out if self.wide is None else tape.add(out, tape.linear(self.wide, p_u, p_i))

    def turns(self, block: TaskBlock, encoded: Encoded, steps: int) -> list[Turn]:
        if not self.options.per_item:
            return super().turns(block, encoded, steps)
        return [self._turn(block, encoded, column) for column in range(block.support.item.shape[1])] * steps

    def _turn(self, block: TaskBlock, encoded: Encoded, column: int) -> Turn:
        """The step that looks at one item of each support."""
        s, at = block.support, slice(column, column + 1)
        row = Rows(s.item[:, at], s.label[:, at], s.mask[:, at])
        users, items = encoded.place(block, row, detach=self.options.first_order)
        return Turn(lambda tape: self(tape, users, items), row)

    # ---- memory

    def _parts(self) -> dict[str, tuple[tuple[int, ...], float]]:
        """Shape and scale at the start of each part of the memory: [K, ...]."""
        k, width = self.options.slots, self.options.width
        parts: dict[str, tuple[tuple[int, ...], float]] = {PROFILE: ((k, self.embedding.user_width), 1.0)}
        if self.options.tau:
            for i, layer in enumerate(self._users):
                d, h = layer.shape
                parts[f"{GRADIENT}{i}"] = ((k, d + 1, h), 0.01)  # a gradient's size; the last row is the bias's
        if self.preference is not None:
            size = (k, width, width), (6 * width) ** -0.5  # as large as a dense layer's weights
            parts |= dict.fromkeys(PREFERENCE, size)
        return parts

    def memories(self) -> dict[str, Memory]:
        o = self.options
        rates = {PROFILE: o.alpha, **dict.fromkeys(PREFERENCE, o.gamma)}
        rates |= {f"{GRADIENT}{i}": o.beta for i in range(o.layers)}
        return {"memory": Attentive(self._start, rates, o.write == "sequential", o.erase == "attended")}

    def rates(self, batch: TaskBatch, encoded: Encoded) -> list[Mapping[Map, Rate]]:
        """As LayerRates; what the batch's tasks need of the memory is read here, once for all of them."""
        self._visits = []
        if batch.blocks:
            like = self.log_rate
            found = self.shared["memory"].read({})
            self._recalled = {n: torch.from_numpy(np.array(v)).to(like.device, like.dtype) for n, v in found.items()}
        return super().rates(batch, encoded)

    @torch.no_grad()
    def attention(self, block: TaskBlock, encoded: Encoded) -> Tensor:
        """a_u [b, K] (Eq. 3)."""
        cosine = F.normalize(encoded.users(block), dim=1) @ F.normalize(self._recalled[PROFILE], dim=1).t()
        return torch.softmax(self.options.temperature * cosine, 1)

    def mixes(self, block: TaskBlock, encoded: Encoded) -> dict[Layer, Mix]:
        """The user network's start (Eq. 4, 9) and the preference matrix (Eq. 7)."""
        attention, mixes = self.attention(block, encoded), dict[Layer, Mix]()
        if self.options.tau:
            for i, layer in enumerate(self._users):
                slots = self._recalled[f"{GRADIENT}{i}"]
                mixes[layer] = Mix(-self.options.tau * attention, slots[:, :-1], slots[:, -1])
        if self.preference is not None:
            mixes[self.preference] = Mix(attention, torch.cat([self._recalled[n] for n in PREFERENCE], 1), None)
        return mixes

    def block_loss(self, block: TaskBlock, encoded: Encoded, rates: Mapping[Map, Rate]) -> Tensor:
        """As GradientMethod's; what the tasks leave for the memories is kept until `write`. At test time, and wherever
        nothing is learned, they are read and never written (Algorithm 2)."""
        if not torch.is_grad_enabled():
            return super().block_loss(block, encoded, rates)
        self._visits.append(visit := _Visit(block.task, self.attention(block, encoded), encoded.users(block)))
        fast = self.fast_weights(block, encoded, rates, watch=visit.steps.append)
        return self.head.error(self.outputs(block, encoded, fast), block.query)

    @torch.no_grad()
    def write(self) -> None:
        visits, self._visits = self._visits, []
        k, like = self.options.slots, self.log_rate
        task = torch.cat([torch.zeros(0, dtype=torch.int64, device=like.device), *(v.task for v in visits)])
        attention = torch.cat([like.new_zeros(0, k), *(v.attention for v in visits)])
        factors = self._factors(visits, attention)
        read = self._recalled or {n: torch.from_numpy(v).to(like) for n, v in self._start.items()}
        self.shared["memory"].write(written(task, attention, factors, read, self.options.write == "sequential"))

    def _factors(self, visits: "list[_Visit]", attention: Tensor) -> dict[str, Factors]:
        """What the step's tasks write to each part: p_u, the gradients summed over the steps, and M_uI adapted."""
        like, b = self.log_rate, len(attention)
        everyone = torch.arange(b, device=like.device)
        p = torch.cat([like.new_zeros(0, self.embedding.user_width), *(v.profile for v in visits)])
        factors = {PROFILE: Factors(like.new_ones(b, 1), -p, everyone)}
        for i, layer in enumerate(self._users if self.options.tau else ()):
            x, delta, owner = _rows(visits, layer, 0, layer.shape[0], like)
            factors[f"{GRADIENT}{i}"] = Factors(F.pad(x, (0, 1), value=1.0), -delta, owner)
        if self.preference is not None:
            rate = self.log_rate[self.adapted().index(self.preference)].exp()
            for part, name in enumerate(PREFERENCE):
                x, delta, owner = _rows(visits, self.preference, part, self.options.width, like)
                factors[name] = Factors(x, rate * delta, owner, attention)
        return factors

    @torch.no_grad()
    def facts(self, state: list[FastWeights], batch: TaskBatch) -> dict[str, list[Tensor]]:
        encoded = self.embedding.encode(batch)
        self.rates(batch, encoded)
        attention, k = [self.attention(block, encoded) for block in batch], self.options.slots
        found = {f"slot_{i}": [a[:, i] for a in attention] for i in range(k)}
        if k > 1:
            found["entropy"] = [torch.special.entr(a).sum(1) / np.log(k) for a in attention]
        return found


@dataclass
class _Visit:
    """What a block's tasks leave for the memories."""

    task: Tensor
    """int64 [b]."""
    attention: Tensor
    """[b, K]."""
    profile: Tensor
    """p_u [b, d_u]."""
    steps: list[Records] = field(default_factory=list)


def _rows(visits: list[_Visit], layer: Layer, part: int, width: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A part [n, width] of a layer's inputs and the δ [n, h] of its inner gradients over all steps and tasks, and whose
    each row is."""
    xs, deltas = [like.new_zeros(0, width)], [like.new_zeros(0, layer.shape[1])]
    owners, first = [torch.zeros(0, dtype=torch.int64, device=like.device)], 0
    for visit in visits:
        b = len(visit.task)
        for records in visit.steps:
            for x, delta in records[layer]:
                assert isinstance(x, Features)
                rows = x.parts[part].rows()
                xs.append(rows.flatten(0, 1))
                same = rows.shape[1] == delta.shape[1]  # else it is per task: one row that feeds all
                deltas.append((delta if same else delta.sum(1, keepdim=True)).flatten(0, 1))
                owners.append(torch.arange(first, first + b, device=like.device).repeat_interleave(rows.shape[1]))
        first += b
    return torch.cat(xs), torch.cat(deltas), torch.cat(owners)


def _network(d: int, width: int, layers: int) -> list[Linear]:
    return [Linear(d if i == 0 else width, width) for i in range(layers)]
