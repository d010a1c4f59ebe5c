"""s²Meta (Du et al., KDD 2019; arXiv 1906.00391): how to begin, how far to step and when to stop are all learned.

The recommender is an MLP on [user, item] whose weights and biases are all that adapts. A task begins at learned ones
and goes on, at most --steps times, by what the gates of methods/gates.py make of the support's gradient; a stop
controller, an LSTM on the smoothed norms of the gradients and on the loss, says before every step how likely it is that
the task stops there. The features are outside of what adapts: vectors learned beforehand in scenarios (--pretrained),
embeddings that the query's loss teaches where tasks are users. First order: no derivative of a gradient is taken.

The loss is the query's after the last step: the hinge loss of scenarios, squared error of ratings, cross-entropy of
clicks. The stop controller learns by REINFORCE: −log(1 − p_t) times what going on from step t was worth; its value is
left out of the loss, only its gradient is in. What decides a stop stands in methods/stopping.py.

What its code does otherwise: a step there looks at pairs drawn from the support, most of it, with negatives of their
own; here at the support itself. Its optimizer has half the step size for the stop controller, and its plateau schedule
looks at the test set; here --plateau looks at the validation tasks.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmeta.adaptation.maps import Linear
from distmeta.data.schema import Dataset
from distmeta.methods.gates import Cell, Gates, Steps, magnitude, spans
from distmeta.methods.heads import Head, Heads
from distmeta.methods.pretrained import WithVectors
from distmeta.methods.stopping import Drawn, Median, Stop
from distmeta.networks import Embedding, Encoded
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

Parts = tuple[Tensor, ...]
"""Features of some rows side by side: of user and item, [b, R, d] each, or [b, 1, d] where all rows have the same."""


@dataclass(frozen=True)
class Adapted:
    """A block's tasks after the inner loop."""

    theta: Tensor
    """[b, P]: weights and biases."""
    steps: Tensor
    """int64 [b]."""
    rate: Tensor
    """[b]: mean input gate over coordinates and steps; 0 where there was none."""


class Backbone(nn.Module):
    """The MLP with ReLU whose parameters θ [P] are each task's own; those here are what all begin with.

    Args:
        widths: of the features, the hidden layers and the output, 1. offset: what the output is besides.
    """

    def __init__(self, widths: tuple[int, ...], offset: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
        for layer in self.layers:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.offset = offset
        self.shapes = [(a, b) for a, b in pairwise(widths)]
        self.sizes = tuple(n for a, b in self.shapes for n in (a * b, b))
        """Coordinates of each tensor: weight and bias by turns."""

    def start(self) -> Tensor:
        """θ [P]."""
        return torch.cat([p.flatten() for p in self.layers.parameters()])

    def _own(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weight [b, d, h] and bias [b, 1, h] of each layer."""
        parts = iter(theta[:, a:e] for a, e in spans(self.sizes))
        return [(next(parts).unflatten(1, shape), next(parts).unsqueeze(1)) for shape in self.shapes]

    def forward(self, theta: Tensor, x: Parts) -> Tensor:
        """Outputs [b, R] of the rows x for the parameters [b, P]."""
        return self._outputs(self._own(theta), x)[-1].squeeze(2) + self.offset

    def _outputs(self, own: list[tuple[Tensor, Tensor]], x: Parts) -> list[Tensor]:
        """What each layer gives: [b, R, h]."""
        (weight, bias), *others = own
        z, slices = bias, weight.split([part.shape[2] for part in x], 1)
        for part, w in sorted(zip(x, slices, strict=True), key=lambda e: e[0].shape[1]):  # those of one row first
            z = torch.baddbmm(z.expand(-1, part.shape[1], -1), part, w)
        outputs = [z]
        for weight, bias in others:
            z = torch.baddbmm(bias.expand(-1, z.shape[1], -1), torch.relu(z), weight)
            outputs.append(z)
        return outputs

    def gradient(self, theta: Tensor, x: Parts, rows: Rows, head: Head) -> tuple[Tensor, Tensor]:
        """The loss [b] of the rows and its gradient by θ, [b, P]; without graph."""
        own = self._own(theta)
        outputs = self._outputs(own, x)
        y = outputs[-1].squeeze(2) + self.offset
        delta, found = head.delta(y, rows).unsqueeze(2), []
        for (weight, _), z in zip(own[:0:-1], outputs[-2::-1], strict=True):
            active = torch.relu(z)
            found += [delta.sum(1), torch.bmm(active.transpose(1, 2), delta).flatten(1)]
            delta = torch.bmm(delta, weight.transpose(1, 2)).mul_(z > 0)
        total = delta.sum(1, keepdim=True)
        first = [torch.bmm(part.transpose(1, 2), delta if part.shape[1] > 1 else total) for part in x]
        found += [total.squeeze(1), torch.cat(first, 1).flatten(1)]
        return head.error(y, rows), torch.cat(found[::-1], 1)


class S2Meta(WithVectors):
    """Learned start, gates and stop."""

    name = "s2meta"

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        o = options
        self.heads = Heads(dataset, o.query_loss)
        vectors = self.vector_width(o)
        self.embedding = Embedding(
            dataset, items, o.embedding, o.item_ids, o.user_ids, o.embedding_std, vectors, o.id_buckets
        )
        self.expect_vectors()
        d = self.embedding.user_width + self.embedding.item_width
        self.backbone = Backbone((d, *o.hidden, 1), self.heads.users.start)
        sizes = self.backbone.sizes
        self.gates = nn.ModuleList(Gates(o.units, o.layer_norm, o.first_rate, o.forget) for _ in sizes)
        self.stop = Stop(len(sizes))

    def features(self, block: TaskBlock, encoded: Encoded, rows: Rows, detach: bool = False) -> Parts:
        """Of some rows of the block, those of user and item; without graph where `detach`."""
        return tuple(p.base().rows() for p in encoded.place(block, rows, detach=detach) if p.base().width)

    def loss(self, batch: TaskBatch) -> Tensor:
        encoded = self.embedding.encode(batch)
        start, cells = self.backbone.start(), [gates() for gates in self.gates]
        losses = [self._block_loss(batch, block, encoded, start, cells) for block in batch]
        return torch.cat(losses) if losses else start.new_zeros(0)

    def _block_loss(
        self, batch: TaskBatch, block: TaskBlock, encoded: Encoded, start: Tensor, cells: list[Cell]
    ) -> Tensor:
        """Query loss [b] with its graph, and that of what the stop controller is taught by, whose value is 0."""
        loop = _Loop(self, block, encoded, start, cells, Drawn(batch, block))
        head, x = self.heads.of(block), self.features(block, encoded, block.query)
        before: list[Tensor] = []

        def watch(tasks: Tensor, theta: Tensor) -> None:
            before.append(head.error(self.backbone(theta, _take(x, tasks)), block.query.take(tasks)))

        loop.run(watch)
        loss = head.error(self.backbone(loop.steps.result(start, cells), x), block.query)
        taught = torch.zeros_like(loss)
        left = loop.steps.counts()
        for t, (tasks, going, value) in enumerate(zip(loop.steps.tasks, loop.going, before, strict=True)):
            worth = value - loss.detach()[tasks] - self.options.penalty * (left[tasks] - t).to(loss.dtype)
            taught = taught.index_add(0, tasks, -going * worth)
        return loss + taught - taught.detach()

    @torch.no_grad()
    def adapt(self, batch: TaskBatch) -> list[Adapted]:
        encoded = self.embedding.encode(batch)
        start, cells = self.backbone.start(), [gates() for gates in self.gates]
        found = []
        for block in batch:
            loop = _Loop(self, block, encoded, start, cells, Median(block))
            loop.run()
            counts = loop.steps.counts()
            found.append(Adapted(loop.steps.final, counts, loop.rate / counts.clamp(min=1)))
        return found

    @torch.no_grad()
    def predict(self, state: list[Adapted], batch: TaskBatch) -> list[Tensor]:
        encoded = self.embedding.encode(batch)
        return [
            self.heads.of(block).score(self.backbone(own.theta, self.features(block, encoded, block.query)))
            for own, block in zip(state, batch, strict=True)
        ]

    def facts(self, state: list[Adapted], batch: TaskBatch) -> dict[str, list[Tensor]]:
        """Each task's number of inner steps and its mean step size, the input gate over coordinates and steps."""
        return {"inner_steps": [own.steps for own in state], "step_size": [own.rate for own in state]}


def _take(x: Parts, tasks: Tensor) -> Parts:
    return tuple(part[tasks] for part in x)


class _Loop:
    """The inner loop of a block's tasks at once; those that have stopped are left out of what follows."""

    def __init__(
        self,
        method: S2Meta,
        block: TaskBlock,
        encoded: Encoded,
        start: Tensor,
        cells: list[Cell],
        decision: Drawn | Median,
    ) -> None:
        self.method, self.block, self.cells, self.decision = method, block, cells, decision
        self.x = method.features(block, encoded, block.support, detach=True)
        self.head = method.heads.of(block)
        final = start.detach().expand(len(block.task), -1).clone()
        self.steps = Steps(method.options.layer_norm, method.backbone.sizes, final)
        self.going: list[Tensor] = []
        """Of each step, log(1 − p) [b_t] of the tasks that took it, with graph."""
        self.rate = final.new_zeros(len(final))
        """[b]: input gates summed over the steps."""

    def run(self, watch: Any = lambda tasks, theta: None) -> None:
        """Take all steps; `watch` is shown the tasks int64 [b_t] about to take one, and their θ [b_t, P]."""
        o, stop = self.method.options, self.method.stop
        tasks = self.block.support.mask.any(1).nonzero().squeeze(1)
        theta, before = self.steps.final[tasks], stop.begin(len(tasks))
        for t in range(o.steps if len(tasks) else 0):
            with torch.no_grad():
                rows, x = self.block.support.take(tasks), _take(self.x, tasks)
                loss, gradient = self.method.backbone.gradient(theta, x, rows, self.head)
                norms = [torch.linalg.vector_norm(gradient[:, a:e], dim=1) for a, e in spans(self.steps.widths)]
                seen = magnitude(torch.stack([*norms, loss], 1))
            logit, before = stop(seen, before)
            going = F.logsigmoid(-logit)
            if t >= min(o.least_steps, o.steps):
                stay = (~self.decision.stops(t, tasks, going.detach())).nonzero().squeeze(1)
                if len(stay) < len(tasks):
                    self.steps.keep(stay)
                    before, going = (before[0][stay], before[1][stay]), going[stay]
                    tasks, theta, loss, gradient = tasks[stay], theta[stay], loss[stay], gradient[stay]
                if not len(tasks):
                    break
            with torch.no_grad():
                watch(tasks, theta)
                theta, rate = self.steps.take(self.cells, tasks, gradient.clamp_(-1, 1), theta, loss)
                self.rate[tasks] += rate
                self.going.append(going)
