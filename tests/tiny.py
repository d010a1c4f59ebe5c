"""For tests of the trainer: methods so simple that one can see what they must do, and workers that are threads."""

import hashlib
import sys
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scenarioworld
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
from distmeta.parallel import checkpoint, trainer
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

    def recall(self, task: Tensor) -> Any:
        """What is remembered for each task [b]."""
        return self.shared["traces"].read({"key": (task % 11).numpy()})["value"].copy()

    def predict(self, state: list[Tensor], batch: TaskBatch) -> list[Tensor]:
        scores = []
        for score, block in zip(super().predict(state, batch), batch, strict=True):
            recalled = torch.from_numpy(self.recall(block.task)).to(score.dtype)
            if torch.is_grad_enabled():
                self.noted.append((block.task, recalled.requires_grad_()))
            scores.append(score + recalled[:, None])
        return scores

    def write(self) -> None:
        task = torch.cat([torch.zeros(0, dtype=torch.int64), *(t for t, _ in self.noted)])
        grad = torch.cat([torch.zeros(0), *(r.grad for _, r in self.noted if r.grad is not None)])
        self.noted.clear()
        values = {"task": task, "key": task % 11, "value": 1.0 - grad.double()}
        (shared,) = self.shared.values()
        shared.write({k: v.numpy() for k, v in values.items()})


class Mean(Memory):
    """A decaying mean of all that was written, and how often: the same answer to all."""

    alike = True

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def read(self, request: Arrays) -> Arrays:
        """{} -> {"value" [1], "count" [1]}."""
        assert not request
        return {"value": np.array([self.value]), "count": np.array([self.count])}

    def merge(self, writes: Sequence[Arrays]) -> None:
        """Of {"task" [b], "value" [b]} each."""
        rows = [row for w in writes for row in zip(w["task"].tolist(), w["value"].tolist(), strict=True)]
        for _, value in sorted(rows):
            self.value, self.count = 0.7 * self.value + 0.3 * value, self.count + 1

    def snapshot(self) -> Arrays:
        return self.read({})

    def restore(self, snapshot: Arrays) -> None:
        self.value, self.count = snapshot["value"].item(), snapshot["count"].item()


class Following(Remembering):
    """Remembering whose tasks all read one mean of what all of them wrote."""

    def memories(self) -> dict[str, Memory]:
        return {"mean": Mean()}

    def recall(self, task: Tensor) -> Any:
        return np.repeat(self.shared["mean"].read({})["value"], len(task))


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


class Later(Servers):
    """Servers that are asked by threads of their own, as if they were elsewhere.

    While `gate` is not set, what is asked does not arrive; `awaited` is set when somebody waits for an answer.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        super().__init__(servers)
        self.pool, self.gate, self.awaited = ThreadPoolExecutor(32), threading.Event(), threading.Event()
        self.gate.set()

    def begin(self, method: str, each: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        arriving = super().begin

        def on_its_way() -> list[Any]:
            assert self.gate.wait(20)
            return arriving(method, each)()

        asked = self.pool.submit(on_its_way)

        def answers() -> list[Any]:
            self.awaited.set()
            return asked.result(20)

        return answers


SMALLER: dict[str, dict[str, Any]] = {"s2meta": {"embedding": 4, "hidden": (8,), "units": 4, "steps": 6}}
"""Sizes of methods whose own would take a test too long."""


def setting(place: Location, method: str, **flags: Any) -> tuple[Config, Dataset, TaskTable]:
    """What `trainer.train` wants, for the dataset at `place`."""
    small = {"data": str(place), "threads": 1, "batch_size": 16, "width": 16}
    if not METHODS[method].users:
        small |= {**scenarioworld.SMALL, "protocol": "cmml-scenario", "scenario_draws": 6}
    config = config_module.load(None, method, {**small, **SMALLER.get(method, {}), **flags})
    options = protocols.protocol_options(config.data)
    table = tasktable.make(place, config.data.protocol, config.data.split_seed, options)
    return config, table.seen(Dataset.open(place)), table


def run_of(
    where: Path, small: Location, world: int = 1, servers: Servers | None = None, **flags: Any
) -> trainer.Outcome:
    """Train the registered `tiny` into `where`, or go on with what is there: with world 0 without any server."""
    config, dataset, table = setting(small, "tiny", **flags)
    run = Location.of(where).make_dir()

    def work(exchange: Exchange) -> trainer.Outcome:
        return trainer.train(config, run, dataset, small, table, exchange, lambda _: None)

    if not world:
        return work(Exchange())
    done = together(world, work, servers)
    for f in done:
        if not isinstance(f.exception(), threading.BrokenBarrierError | None):
            return f.result()
    return done[0].result()


def last(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The parts of the newest checkpoint."""
    found = checkpoint.newest(Location.of(run))
    assert found
    return {p: checkpoint.load(Location.of(run), found, p) for p in ("params", "optimizer", "state")}


def digests(run: Path) -> dict[str, str]:
    """sha256 of all tensors of all checkpoints."""
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.rglob("*.safetensors")}


def in_float64(monkeypatch: Any) -> None:
    """Have `trainer.train` compute in float64 for the length of a test."""
    move, build = TaskBatch.to, trainer.build_method
    monkeypatch.setattr(TaskBatch, "to", lambda self, device, dtype=None: move(self, device, torch.float64))
    monkeypatch.setattr(trainer, "build_method", lambda *given: build(*given).double())


def batch(tasks: int, seed: int, first: int = 0) -> TaskBatch:
    """Tasks with random rows: 4 of support, 3 of query, the last one padding; none at all where `tasks` is 0."""
    g = torch.Generator().manual_seed(seed)

    def rows(n: int) -> Rows:
        mask = torch.ones(tasks, n, dtype=torch.bool)
        mask[:, -1] = False
        return Rows(torch.randint(20, (tasks, n), generator=g), torch.rand(tasks, n, generator=g) * 4 + 1, mask)

    block = TaskBlock(torch.arange(first, first + tasks), {}, rows(4), rows(3))
    return TaskBatch(torch.arange(20), (block,) if tasks else ())
