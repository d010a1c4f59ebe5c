"""For tests of the trainer: a method so simple that one can see what it must do."""

import sys
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distmeta import config as config_module
from distmeta.config import Config
from distmeta.data import protocols, tasktable
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.exchange import Exchange
from distmeta.memory.base import Arrays, Memory
from distmeta.methods import METHODS, Entry
from distmeta.methods.base import Method
from distmeta.parallel.shared import Servers
from distmeta.parallel.state import Server
from distmeta.storage import Location
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock


@dataclass(frozen=True)
class TinyOptions:
    """Options of Tiny."""


class Tiny(Method):
    """prediction = offset + weight[item mod 7] + mean support label; `poison` spoils the loss of one task."""

    name = "tiny"
    poison: tuple[int, str] | None = None
    """(task id, `loss` or `gradient`): what of it is to be not finite."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.offset = nn.Parameter(torch.randn(()))
        self.weight = nn.Parameter(torch.randn(7))
        self.unused = nn.Parameter(torch.ones(2))

    def adapt(self, batch: TaskBatch) -> list[Tensor]:
        return [(b.support.label * b.support.mask).sum(1) / b.support.mask.sum(1).clamp(min=1) for b in batch]

    def predict(self, state: list[Tensor], batch: TaskBatch) -> list[Tensor]:
        return [
            self.offset + self.weight[batch.items[b.query.item] % 7] + s[:, None]
            for s, b in zip(state, batch, strict=True)
        ]

    def loss(self, batch: TaskBatch) -> Tensor:
        losses = []
        for block, score in zip(batch, self.predict(self.adapt(batch), batch), strict=True):
            error = (score - block.query.label).square() * block.query.mask
            loss = error.sum(1) / block.query.mask.sum(1).clamp(min=1)
            if self.poison:
                bad = (block.task == self.poison[0]).nonzero().flatten()
                if self.poison[1] == "loss":
                    loss = loss.index_fill(0, bad, torch.inf)
                elif len(bad):  # sqrt has no derivative at 0: the loss stays finite, its gradient does not
                    loss = loss.index_add(0, bad, (self.offset * 0).sqrt().expand(1))
            losses.append(loss)
        return torch.cat(losses)


class Grouped(Tiny):
    """Tiny with its own weights and offset for each of 3 groups of tasks; group 2 has a few tasks only."""

    groups = 3

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.own = nn.Parameter(torch.randn(3, 7))
        self.shift = nn.Parameter(torch.randn(3))

    def grouped(self) -> frozenset[str]:
        return frozenset({"own", "shift"})

    @staticmethod
    def group(task: Tensor) -> Tensor:
        return torch.where(task % 31 == 7, 2, task % 3 % 2)

    def predict(self, state: list[Tensor], batch: TaskBatch) -> list[Tensor]:
        scores = super().predict(state, batch)
        for score, block in zip(scores, batch, strict=True):
            group = self.group(block.task)
            score += self.own[group[:, None], batch.items[block.query.item] % 7] + self.shift[group][:, None]
        return scores

    def grouped_loss(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        return self.loss(batch), torch.cat([self.group(block.task) for block in batch])


def register(monkeypatch: Any, base: type[Tiny] = Tiny) -> type[Tiny]:
    """Make `tiny` a METHOD for the length of a test; a fresh class, so that `poison` does not outlive it."""
    fresh = type("Tiny", (base,), {})
    module = types.ModuleType("distmeta.methods.tiny")
    module.Tiny = fresh  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distmeta.methods.tiny", module)
    monkeypatch.setitem(METHODS, "tiny", Entry("tiny", "Tiny", TinyOptions))
    return fresh


class Traces(Memory):
    """A decaying mean of what was written under each key, and how often: another order or number of writes shows."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[float, int]] = {}

    def read(self, request: Arrays) -> Arrays:
        """{"key" [b]} -> {"value" [b], "count" [b]}; 0 for a key that is not here."""
        found = [self.kept.get(key, (0.0, 0)) for key in request["key"].tolist()]
        value, count = (np.array([f[i] for f in found], t) for i, t in enumerate((np.float64, np.int64)))
        return {"value": value, "count": count}

    def merge(self, writes: Sequence[Arrays]) -> None:
        """Of {"task" [b], "key" [b], "value" [b]} each."""
        rows = [zip(*(w[k].tolist() for k in ("task", "key", "value")), strict=True) for w in writes]
        for _, key, value in sorted(row for each in rows for row in each):
            mean, count = self.kept.get(key, (0.0, 0))
            self.kept[key] = 0.7 * mean + 0.3 * value, count + 1

    def snapshot(self) -> Arrays:
        keys = np.array(sorted(self.kept), np.int64)
        return {"key": keys, **self.read({"key": keys})}

    def restore(self, snapshot: Arrays) -> None:
        rows = zip(*(snapshot[k].tolist() for k in ("key", "value", "count")), strict=True)
        self.kept = {key: (value, count) for key, value, count in rows}

    def report(self) -> dict[str, Any]:
        return {"keys": len(self.kept), "writes": sum(count for _, count in self.kept.values())}

    def part(self, number: int, shards: int) -> "Traces":
        return Traces()

    def route(self, writes: Arrays, shards: int) -> list[Arrays]:
        return [{k: v[writes["key"] % shards == s] for k, v in writes.items()} for s in range(shards)]

    def combine(self, answers: Sequence[Arrays]) -> Arrays:
        return {k: sum((a[k] for a in answers[1:]), answers[0][k]) for k in answers[0]}


class Remembering(Tiny):
    """Tiny whose predictions add what was remembered of a task's key; it remembers the loss' derivative by that."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.noted: list[tuple[Tensor, Tensor]] = []

    def memories(self) -> dict[str, Memory]:
        return {"traces": Traces()}

    def predict(self, state: list[Tensor], batch: TaskBatch) -> list[Tensor]:
        scores = []
        for score, block in zip(super().predict(state, batch), batch, strict=True):
            found = self.shared["traces"].read({"key": (block.task % 11).numpy()})
            recalled = torch.from_numpy(found["value"].copy()).to(score.dtype)
            if torch.is_grad_enabled():
                self.noted.append((block.task, recalled.requires_grad_()))
            scores.append(score + recalled[:, None])
        return scores

    def write(self) -> None:
        task = torch.cat([torch.zeros(0, dtype=torch.int64), *(t for t, _ in self.noted)])
        grad = torch.cat([torch.zeros(0), *(r.grad for _, r in self.noted if r.grad is not None)])
        self.noted.clear()
        values = {"task": task, "key": task % 11, "value": 1.0 - grad.double()}
        self.shared["traces"].write({k: v.numpy() for k, v in values.items()})


class Meeting:
    """Where workers that are threads hand each other what they have."""

    def __init__(self, world: int, servers: Servers) -> None:
        self.world, self.servers, self.failed = world, servers, False
        self.rounds: defaultdict[int, dict[int, Any]] = defaultdict(dict)
        self.changed = threading.Condition()

    def all(self, number: int, rank: int, mine: Any) -> list[Any]:
        """What all gave in round `number`, by rank; BrokenBarrierError where one of them failed before it."""
        with self.changed:
            found = self.rounds[number]
            found[rank] = mine
            self.rounds.pop(number - 2, None)  # all came to the round after it, so all took it
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(found) == self.world or self.failed, 60)
            if len(found) < self.world:
                raise threading.BrokenBarrierError
            return [found[r] for r in range(self.world)]

    def fail(self) -> None:
        with self.changed:
            self.failed = True
            self.changed.notify_all()


class Together(Exchange):
    """One of several workers that are threads of this process; the sum is taken in the order of ranks."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.world, self.meeting, self.number = rank, meeting.world, meeting, 0
        self.servers = meeting.servers

    def sum(self, flat: Tensor) -> Tensor:
        return flat.copy_(torch.stack(self._all(flat.clone())).sum(0))

    def gather(self, data: bytes) -> list[bytes]:
        return self._all(data)

    def _all(self, mine: Any) -> list[Any]:
        self.number += 1
        return self.meeting.all(self.number, self.rank, mine)


def together(world: int, work: Callable[[Exchange], Any], servers: Servers | None = None) -> list[Future[Any]]:
    """work(exchange) done by `world` workers at once, in threads rank-0, …; one that fails lets no other wait.

    Args:
        servers: of their shared state; one, where not given.
    """
    meeting = Meeting(world, servers or Servers([Server(60)]))

    def one(rank: int) -> Any:
        threading.current_thread().name = f"rank-{rank}"
        try:
            return work(Together(rank, meeting))
        except BaseException:
            meeting.fail()
            raise

    deterministic = torch.are_deterministic_algorithms_enabled()  # of the process: the workers set it crosswise
    with ThreadPoolExecutor(world) as pool:
        done = [pool.submit(one, rank) for rank in range(world)]
    torch.use_deterministic_algorithms(deterministic)
    return done


def setting(place: Location, method: str, **flags: Any) -> tuple[Config, Dataset, TaskTable]:
    """What `trainer.train` wants, for the dataset at `place`."""
    config = config_module.load(None, method, {"data": str(place), "threads": 1, "batch_size": 16, **flags})
    options = protocols.protocol_options(config.data)
    return config, Dataset.open(place), tasktable.make(place, config.data.protocol, config.data.split_seed, options)


def batch(tasks: int, seed: int, first: int = 0) -> TaskBatch:
    """Tasks with random rows: 4 of support, 3 of query, the last one padding; none at all where `tasks` is 0."""
    g = torch.Generator().manual_seed(seed)

    def rows(n: int) -> Rows:
        mask = torch.ones(tasks, n, dtype=torch.bool)
        mask[:, -1] = False
        return Rows(torch.randint(20, (tasks, n), generator=g), torch.rand(tasks, n, generator=g) * 4 + 1, mask)

    block = TaskBlock(torch.arange(first, first + tasks), {}, rows(4), rows(3))
    return TaskBatch(torch.arange(20), (block,) if tasks else ())
