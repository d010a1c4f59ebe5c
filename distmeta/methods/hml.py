"""HML (paper 000): K initialisations, of which each task takes the one that adapts to it best.

Hard task clusters (§2.2.3, Eq. 3; `--htc query --htc-steps 1`): every initialisation adapts to a task's support; the
lowest mean query loss wins, ties the lowest k. In training the query is the task's; the winner's loss is then taken
once more with the exact second-order graph, and initialisation k learns from its own tasks alone (Alg. 1, lines 11 to
14). For a new task (Table 1) the support is split into Sup_s and Sup_q, some times over, and the winner adapts to the
whole of it.

So a training task gets whichever initialisation suits its few query labels, noise included, which no new task can
know: the clusters drift to what a support cannot tell. By default the support decides in training too, as for a new
task. And the more steps are made before they are compared, the less the initialisations differ; by default none, so
that no row need be held out: the initialisation wins that predicts the whole support best, but for the user's level.

Shape letters: K initialisations, P numbers of one, b tasks, S support rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distmeta import draws
from distmeta.adaptation.fast import FastWeights
from distmeta.adaptation.maps import Map, Rate
from distmeta.data.schema import Dataset
from distmeta.methods.base import Method
from distmeta.methods.initialisations import Initialisations
from distmeta.methods.melu import MeLU
from distmeta.networks import Encoded
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

HELD_OUT = 0.2
"""Share of a new task's support rows that Sup_q takes."""


@dataclass(frozen=True)
class Assigned:
    """A block's tasks, each with its initialisation, adapted."""

    cluster: Tensor
    """int64 [b]."""
    parts: list[tuple[int, Tensor | None, FastWeights]]
    """Of each initialisation that has tasks: k, their rows in the block (None: all of it), their fast weights."""


@dataclass(frozen=True)
class Start:
    """One initialisation and what it makes of a batch's items."""

    model: MeLU
    encoded: Encoded
    rates: Mapping[Map, Rate]

    def adapt(self, block: TaskBlock, steps: int | None = None) -> FastWeights:
        return self.model.fast_weights(block, self.encoded, self.rates, steps=steps)

    def score(self, block: TaskBlock, fast: FastWeights) -> Tensor:
        return self.model.head.score(self.model.outputs(block, self.encoded, fast))

    def loss(self, block: TaskBlock, steps: int | None = None) -> Tensor:
        """Query loss [b] after so many inner steps; None: as many as the options say."""
        outputs = self.model.outputs(block, self.encoded, self.adapt(block, steps))
        return self.model.head.error(outputs, block.query)

    def fit(self, block: TaskBlock) -> Tensor:
        """Loss [b] on the support before any step; of ratings, about the user's own level, which every initialisation
        adapts to, so that clusters are of tastes."""
        rows = block.support
        outputs = self.model.outputs(replace(block, query=rows), self.encoded, self.adapt(block, 0))
        if self.model.dataset.label.kind == "rating":
            count = rows.mask.sum(1, keepdim=True).clamp(min=1)
            outputs = outputs - ((outputs - rows.label) * rows.mask).sum(1, keepdim=True) / count
        return self.model.head.error(outputs, rows)


class HML(Method):
    """Several MeLU initialisations, each with tasks of its own."""

    name = "hml"
    sizes: Tensor
    """[K]: tasks of each cluster at the last survey of the training tasks."""
    apart: Tensor
    """Whether there are K initialisations yet; before that the first one is all tasks'."""
    fixed_rate: Tensor | None
    """Logarithm of the step sizes, where they are not learned."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.groups, self.summed = options.clusters, options.sum_clusters
        models = [MeLU(options, dataset, items) for _ in range(self.groups)]
        self._models = models
        self.embedding = models[0].embedding
        for model in models[1:]:
            if options.own == "decision":
                model.embedding = self.embedding
            else:  # tables of its own; the items' fields are the first one's, which follow a move to a device
                model.embedding._buffers = self.embedding._buffers
        own = [list(m.modules()) if options.own == "all" else [m, *m.decision.modules()] for m in models]
        self._stack = Initialisations(own)
        self.initial = nn.Parameter(self._stack.start)
        fixed = None if options.learn_rates else models[0].log_rate.detach()
        self.register_buffer("fixed_rate", fixed, persistent=False)
        self.register_buffer("sizes", torch.zeros(self.groups, dtype=torch.int64))
        self.register_buffer("apart", torch.tensor(options.warm_epochs == 0))
        if fixed is not None:
            for model in models:
                del model.log_rate

    def grouped(self) -> frozenset[str]:
        return frozenset({"initial"})

    def grouped_loss(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        starts = self._bound(batch)
        groups = [self._of_training(block, starts) for block in batch]
        losses = [self._own_loss(block, starts, group) for block, group in zip(batch, groups, strict=True)]
        if not losses:
            return self.initial.new_zeros(0), self.sizes.new_zeros(0)
        return torch.cat(losses), torch.cat(groups)

    def loss(self, batch: TaskBatch) -> Tensor:
        return self.grouped_loss(batch)[0]

    @torch.no_grad()
    def adapt(self, batch: TaskBatch) -> list[Assigned]:
        starts = self._bound(batch)
        states = []
        for block in batch:
            cluster = self._of_support(block, starts)
            parts = []
            for k, rows in self._members(cluster):
                mine = block if rows is None else block.take(rows)
                parts.append((k, rows, starts[k].adapt(mine)))
            states.append(Assigned(cluster, parts))
        return states

    @torch.no_grad()
    def predict(self, state: list[Assigned], batch: TaskBatch) -> list[Tensor]:
        starts = self._bound(batch)
        scores = []
        for assigned, block in zip(state, batch, strict=True):
            parts = []
            for k, rows, fast in assigned.parts:
                parts.append(starts[k].score(block if rows is None else block.take(rows), fast))
            scores.append(self._in_order(parts, [rows for _, rows, _ in assigned.parts]))
        return scores

    def facts(self, state: list[Assigned], batch: TaskBatch) -> dict[str, list[Tensor]]:
        return {"cluster": [assigned.cluster for assigned in state]}

    # ---- clusters

    @torch.no_grad()
    def clusters(self, batch: TaskBatch) -> Tensor:
        """The cluster of each training task: int64 [B], in block order."""
        starts = self._bound(batch)
        return torch.cat([self.sizes.new_zeros(0), *(self._of_training(block, starts) for block in batch)])

    @torch.no_grad()
    def tastes(self, batch: TaskBatch, probes: Tensor, k: int) -> Tensor:
        """What tells tasks apart: the outputs [B, n] for the items `probes` (int64 [n]), about their mean, after
        initialisation k has adapted to all rows of a task."""
        batch = replace(batch, items=torch.cat([batch.items, probes]))
        start, n = self._bound(batch)[k], len(probes)
        tastes = [self.initial.new_zeros(0, n)]
        for block in batch:
            item = torch.arange(len(batch.items) - n, len(batch.items), device=probes.device).expand(len(block.task), n)
            label = self.initial.new_zeros(item.shape)
            query = Rows(item, label, torch.ones_like(label, dtype=torch.bool))
            asked = replace(block, support=block.rows(), query=query)
            outputs = start.model.outputs(asked, start.encoded, start.adapt(asked, max(1, self.options.steps)))
            tastes.append(outputs - outputs.mean(1, keepdim=True))
        return torch.cat(tastes)

    @torch.no_grad()
    def shift(self, batch: TaskBatch, k: int) -> Tensor:
        """[P]: how far initialisation k moves when it adapts to all rows of a task, summed over the tasks."""
        start, total = self._bound(batch)[k], torch.zeros_like(self.initial[k])
        for block in batch:
            fast = start.adapt(replace(block, support=block.rows()), max(1, self.options.steps))
            moved = {}
            for layer in start.model.decision:
                moved[layer, "weight"], moved[layer, "bias"] = fast.moved(layer)
            total += self._stack.flat(moved, k)
        return total

    def _bound(self, batch: TaskBatch) -> list[Start]:
        """The networks with the parameters of now, and what each makes of the batch's items."""
        self._stack.bind(self.initial)
        if self.fixed_rate is not None:
            for model in self._models:
                model.log_rate = self.fixed_rate  # type: ignore[assignment]
        if self.options.own == "all":
            encoded = [model.embedding.encode(batch) for model in self._models]
        else:
            encoded = [self.embedding.encode(batch)] * self.groups
        rates = [next(iter(m.rates(batch, e)), {}) for m, e in zip(self._models, encoded, strict=True)]
        return [Start(*parts) for parts in zip(self._models, encoded, rates, strict=True)]

    @torch.no_grad()
    def _query_losses(self, block: TaskBlock, starts: list[Start]) -> Tensor:
        """[b, K]."""
        return torch.stack([start.loss(block, self.options.htc_steps) for start in starts], 1)

    def _of_training(self, block: TaskBlock, starts: list[Start]) -> Tensor:
        """The cluster of each training task [b]; ties go to the lowest."""
        if self._several and self.options.htc == "query":
            return self._query_losses(block, starts).argmin(1)
        return self._of_support(block, starts)

    @property
    def _several(self) -> bool:
        return self.groups > 1 and bool(self.apart)

    @torch.no_grad()
    def _of_support(self, block: TaskBlock, starts: list[Start]) -> Tensor:
        """The cluster of each task [b] from its support alone; of fewer than two rows, the largest."""
        if not self._several:
            return torch.zeros_like(block.task)
        if self.options.htc_steps:
            losses = torch.stack([self._query_losses(split, starts) for split in self._splits(block)]).sum(0)
        else:
            losses = torch.stack([start.fit(block) for start in starts], 1)
        return torch.where(block.support.mask.sum(1) < 2, self.sizes.argmax(), losses.argmin(1))

    def _splits(self, block: TaskBlock) -> Iterator[TaskBlock]:
        """The block with Sup_s for its support and Sup_q for its query, once for each draw."""
        for held in self._held_out(block):
            support, query = (replace(block.support, mask=block.support.mask & side) for side in (~held, held))
            yield replace(block, support=support, query=query)

    def _held_out(self, block: TaskBlock) -> Tensor:
        """Which support rows are Sup_q's in each of the draws: bool [draws, b, S]; a hash of (task, row, draw)."""
        mask = block.support.mask.cpu().numpy()
        n = mask.sum(1)
        few = np.clip(np.rint(HELD_OUT * n).astype(np.int64), 1, np.maximum(n - 1, 1))
        draw = np.arange(self.options.draws)[:, None, None]
        keys = draws.hashed(block.task.cpu().numpy()[:, None], np.arange(mask.shape[1]), draw, purpose="sup_q")
        keys = np.where(mask, keys >> np.uint64(1), np.iinfo(np.uint64).max)
        rank = keys.argsort(-1, kind="stable").argsort(-1, kind="stable")
        return torch.from_numpy((rank < few[:, None]) & mask).to(block.task.device)

    def _members(self, cluster: Tensor) -> list[tuple[int, Tensor | None]]:
        """(k, rows of its tasks) of each cluster that has tasks; None for all rows."""
        counts = torch.bincount(cluster, minlength=self.groups).tolist()
        if max(counts) == len(cluster):
            return [(counts.index(len(cluster)), None)]
        rows = cluster.argsort(stable=True).split(counts)
        return [(k, r) for k, r in enumerate(rows) if len(r)]

    def _in_order(self, parts: list[Tensor], rows: list[Tensor | None]) -> Tensor:
        """What was computed cluster by cluster, in the block's order."""
        order = [r for r in rows if r is not None]
        return torch.cat(parts)[torch.cat(order).argsort()] if order else parts[0]

    def _own_loss(self, block: TaskBlock, starts: list[Start], cluster: Tensor) -> Tensor:
        """Query loss [b] with each task's own initialisation, with graph."""
        members = self._members(cluster)
        parts = [starts[k].loss(block if rows is None else block.take(rows)) for k, rows in members]
        return self._in_order(parts, [rows for _, rows in members])
