"""The shared state's server: what N workers read and write is what one does; retries, groups that come and go, loss."""

import dataclasses
import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from distmeta.data.loader import Loader, read_items
from distmeta.errors import RunError, UserError
from distmeta.evaluation import evaluate as evaluation
from distmeta.exchange import Exchange
from distmeta.memory.base import Arrays, Shared
from distmeta.parallel import checkpoint, trainer
from distmeta.parallel.assessment import assess
from distmeta.parallel.shared import Remote, Servers
from distmeta.parallel.state import Missing, Server, StateError, StateLost, Superseded
from distmeta.parallel.update import MetaUpdate, build_method
from distmeta.parallel.validation import read_metrics
from distmeta.storage import Location
from distmeta.tasks import TaskBatch

NAME = "traces"


def words(tasks: Sequence[int], value: float) -> Arrays:
    """Writes of these tasks."""
    task = np.array(tasks, np.int64)
    return {"task": task, "key": task % 5, "value": value + task / 7}


def key(*keys: int) -> Arrays:
    return {"key": np.array(keys, np.int64)}


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ---- reads and writes of workers are those of one


def script(shared: Shared, exchange: Exchange, lag: int) -> list[Arrays]:
    """12 steps of up to 6 tasks, of which this worker has its own; what all of them read, by task.

    Some workers have no task in some steps, and then read nothing. Where `lag` is not 0, a plain memory's writes
    are held back by that many steps.
    """
    rng, told, late = np.random.default_rng(0), [], []
    for step in range(12):
        tasks = np.sort(rng.choice(60, rng.integers(0, 7), replace=False))
        mine = [int(t) for t in tasks if t % exchange.world == exchange.rank]
        if mine:
            told.append({"step": np.array([step]), **shared.read({"key": np.array(mine) % 5}), "task": np.array(mine)})
        if mine and step % 3 == 0:
            assert same(shared.read(key(0, 1, 2, 3, 4)), shared.read(key(0, 1, 2, 3, 4)))
        late.append(words(mine, step))
        if not isinstance(shared, Remote):
            if len(late) > lag:
                shared.write(late.pop(0))
        else:
            shared.write(late.pop(0))
        exchange.gather(b"")  # as the gradients are exchanged
        if step in (4, 5, 9):
            for held in late:
                shared.write(held)
            late.clear()
            shared.flush()
            exchange.gather(b"")
            told.append({"step": np.array([step]), **shared.read(key(0, 1, 2, 3, 4)), "task": np.arange(5)})
        if step == 7 and not lag:
            shared.flush()
            snapshot = shared.snapshot() if exchange.rank == 0 else {}
            shared.restore(snapshot)
    for held in late:
        shared.write(held)
    shared.flush()
    return told


def by_task(told: Sequence[Arrays]) -> list[tuple[Any, ...]]:
    """(step, task, value, count) in order."""
    rows = {(int(t["step"][0]), *row) for t in told for row in zip(*(t[k].tolist() for k in ("task", "value", "count")),
                                                                  strict=True)}  # fmt: skip
    return sorted(rows)


class Twice(Servers):
    """Every call is sent twice, at once: one of them is the retry."""

    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        if method in ("snapshot", "report"):
            return super().ask(method, each)
        with ThreadPoolExecutor(2) as pool:
            first, second = (pool.submit(super(Twice, self).ask, method, each) for _ in range(2))
        for a, b in zip(first.result(), second.result(), strict=True):
            assert a == b if not isinstance(a, dict) else same(a, b)
        return [*super().ask(method, each)] if method == "call" else first.result()


def remotely(world: int, shards: int = 1, lag: int = 0, kind: type[Servers] = Servers) -> tuple[Any, Arrays]:
    """What the workers' scripts were told, and how the memory ended."""
    servers = kind([Server(20) for _ in range(shards)])

    def work(exchange: Exchange) -> Any:
        remote = Remote(NAME, tiny.Traces(), servers, exchange, lag)
        remote.restore(remote.snapshot())
        told = script(remote, exchange, lag)
        return told, remote.snapshot() if exchange.rank == 0 else None

    done = [f.result() for f in tiny.together(world, work, servers)]
    return by_task([t for told, _ in done for t in told]), done[0][1]


def plainly(lag: int = 0) -> tuple[Any, Arrays]:
    shared = Shared(tiny.Traces())
    told = script(shared, Exchange(), lag)
    return by_task(told), shared.snapshot()


@pytest.mark.parametrize(("world", "shards", "lag", "kind"), [
    (1, 1, 0, Servers), (2, 1, 0, Servers), (3, 1, 0, Servers), (7, 1, 0, Servers), (2, 2, 0, Servers),
    (3, 3, 0, Servers), (3, 1, 1, Servers), (3, 1, 3, Servers), (2, 2, 2, Servers), (3, 1, 0, Twice),
    (2, 2, 1, Twice),
])  # fmt: skip
def test_workers_read_what_one_reads(world, shards, lag, kind):
    """Bit for bit: all answers and the end; with shards, with writes held back, with every call sent twice."""
    told, end = remotely(world, shards, lag, kind)
    plain, plain_end = plainly(lag)
    assert told == plain
    if shards == 1:
        assert same(end, plain_end)
        return
    memory = Remote(NAME, tiny.Traces(), Servers([Server(1) for _ in range(shards)]), Exchange())
    memory.restore(end)
    assert same(memory.read(key(0, 1, 2, 3, 4)), {k: plain_end[k] for k in ("value", "count")})


def test_the_order_of_writes_shows():
    """What the tests above stand on: the tiny memory tells a wrong order, a double and a missing write."""
    end = plainly()[1]
    a, b = words([0, 5], 1.0), words([10], 3.0)
    made = []
    for writes in ([[a], [b]], [[b], [a]], [[a, b]], [[a], [b], [b]], [[a]]):
        memory = tiny.Traces()
        for each in writes:
            memory.merge(each)
        made.append(memory.snapshot())
    assert len(end["key"]) == 5
    assert [same(made[0], m) for m in made] == [True, False, True, False, False]


# ---- one server


def opened(world: int, generation: int = 5, timeout: float = 20) -> Server:
    server = Server(timeout)
    server.open(NAME, generation, world, tiny.Traces(), tiny.Traces().snapshot())
    return server


def test_staleness_bounds_what_a_read_waits_for():
    """A read of step 3 that may be one step behind needs no writes of step 2, but those of step 1."""
    server = opened(2, timeout=0.2)
    for rank in (0, 1):
        server.call(NAME, 5, 1, rank, words([rank], 0.0), None, None)
    server.call(NAME, 5, 2, 0, words([2], 0.0), None, None)
    with pytest.raises(Missing, match="worker 1 did not come"):
        server.call(NAME, 5, 3, 0, words([4], 0.0), key(0, 1, 2), 3 - 1)
    assert server.call(NAME, 5, 2, 1, words([3], 0.0), key(0, 1, 2, 3), 2 - 1)["count"].tolist() == [1, 1, 0, 0]
    assert server.call(NAME, 5, 3, 0, words([4], 0.0), key(0, 1, 2, 3, 4), 3 - 1)["count"].tolist() == [1, 1, 1, 1, 0]


def test_who_did_not_come_is_named():
    server = opened(4, timeout=0.1)
    server.call(NAME, 5, 1, 2, words([2], 0.0), None, None)
    with pytest.raises(Missing, match=r"the shared state traces: workers 1, 3 did not come for 0 s"):
        server.call(NAME, 5, 1, 0, words([0], 0.0), key(0), 1)


def test_a_newer_group_ends_the_calls_of_an_older_one():
    server = opened(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.call, NAME, 5, 1, 0, words([0], 0.0), key(0), 1)
        time.sleep(0.1)
        assert not waiting.done()
        server.open(NAME, 6, 1, tiny.Traces(), {**key(3), "value": np.array([2.5]), "count": np.array([9])})
        with pytest.raises(Superseded, match="the shared state traces is in the hands of a newer group"):
            waiting.result(5)
    with pytest.raises(Superseded):
        server.call(NAME, 5, 1, 1, words([0], 0.0), key(0), 1)
    with pytest.raises(Superseded):
        server.open(NAME, 4, 2, tiny.Traces(), tiny.Traces().snapshot())
    answer = server.call(NAME, 6, 1, 0, words([8], 1.0), key(3), 1)
    assert answer["count"].tolist() == [10]
    server.open(NAME, 6, 1, tiny.Traces(), tiny.Traces().snapshot())  # sent again: it is open already
    assert server.call(NAME, 6, 1, 0, None, key(3), None)["count"].tolist() == [10]


def test_a_server_that_was_started_anew_says_so():
    for server in (Server(1, "shard 0, process 17"), opened(1, generation=3)):
        with pytest.raises(StateLost, match=r"the shared state traces was lost: its server \(.*\) was started anew"):
            server.call(NAME, 4, 1, 0, words([0], 0.0), key(0), 1)


def test_a_clock_that_is_behind_does_not_hinder_a_new_group(monkeypatch):
    servers = Servers([Server(1)])
    for now in (1000, 10, 10):
        monkeypatch.setattr(time, "time_ns", lambda now=now: now)
        remote = Remote(NAME, tiny.Traces(), servers, Exchange())
        remote.restore(remote.snapshot())
    assert servers.ask("newest", [(NAME,)]) == [1002]


def test_a_memory_restored_from_read_only_arrays_can_be_written(monkeypatch):
    monkeypatch.setattr(tiny.Traces, "restore", lambda self, snapshot: setattr(self, "seen", snapshot))
    array, memory = np.arange(3), tiny.Traces()
    array.flags.writeable = False
    Server(1).open(NAME, 1, 1, memory, {"key": array})
    memory.seen["key"][0] = 7  # type: ignore[attr-defined]


# ---- whole runs


def digests(run: Path) -> dict[str, str]:
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.rglob("*.safetensors")}


def run_of(
    where: Path, small: Location, world: int = 1, servers: Servers | None = None, **flags: Any
) -> trainer.Outcome:
    """Train Remembering into `where`, or go on with what is there: with world 0 without any server."""
    config, dataset, table = tiny.setting(small, "tiny", **flags)
    run = Location.of(where).make_dir()

    def work(exchange: Exchange) -> trainer.Outcome:
        return trainer.train(config, run, dataset, small, table, exchange, lambda _: None)

    if not world:
        return work(Exchange())
    done = tiny.together(world, work, servers)
    for f in done:
        if not isinstance(f.exception(), threading.BrokenBarrierError | None):
            return f.result()
    return done[0].result()


def last(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = checkpoint.newest(Location.of(run))
    assert found
    return {p: checkpoint.load(Location.of(run), found, p) for p in ("params", "optimizer", "state")}


def by_key(state: dict[str, torch.Tensor]) -> dict[int, tuple[float, int]]:
    """What a part `state` of any number of shards remembers."""
    heads = sorted({name.rpartition(".")[0] for name in state})
    rows = (zip(*(state[f"{head}.{k}"].tolist() for k in ("key", "value", "count")), strict=True) for head in heads)
    return {k: (value, count) for each in rows for k, value, count in each}


@pytest.fixture
def remembering(monkeypatch) -> type[tiny.Tiny]:
    return tiny.register(monkeypatch, tiny.Remembering)


@pytest.fixture
def in_float64(monkeypatch) -> None:
    move = TaskBatch.to
    monkeypatch.setattr(TaskBatch, "to", lambda self, device, dtype=None: move(self, device, torch.float64))
    monkeypatch.setattr(trainer, "build_method", lambda *given: build_method(*given).double())


@pytest.mark.usefixtures("remembering", "in_float64")
@pytest.mark.parametrize("more", [{}, {"staleness": 2}, {"state_shards": 2, "staleness": 1}], ids=str)
def test_any_number_of_workers_trains_the_same(tmp_path, small, more):
    """Invariant 2, float64 1e-9: without a server, by 1, 2, 3 and 5 workers, of whom some have no task at times."""
    flags: dict[str, Any] = {"epochs": 2, "batch_size": 6, **more}
    alone = run_of(tmp_path / "0", small, 0, **flags)
    assert alone.steps > 20
    wanted = last(tmp_path / "0")
    keys = by_key(wanted["state"])
    assert len(keys) == 11
    assert sum(count for _, count in keys.values()) == 2 * len(tasks_of(small))
    for world in (1, 2, 3, 5):
        shards = flags.get("state_shards", 1)
        run_of(tmp_path / str(world), small, world, Servers([Server(20) for _ in range(shards)]), **flags)
        found = last(tmp_path / str(world))
        for part in ("params", "optimizer"):
            torch.testing.assert_close(found[part], wanted[part], rtol=1e-9, atol=1e-9)
        assert by_key(found["state"]).keys() == keys.keys()
        for k, (value, count) in by_key(found["state"]).items():
            assert (value, count) == (pytest.approx(keys[k][0], rel=1e-9), keys[k][1])
        reports = [read_metrics(Location.of(tmp_path / n))[-1][NAME] for n in ("0", str(world))]
        assert reports[0] == reports[1]
    loaders = [Loader(*loaded(small), "train", 6, rank=r, world=5) for r in range(5)]
    assert not all(len(batch) for loader in loaders for batch in loader.epoch(0)), "every worker had tasks always"


def loaded(small: Location) -> tuple[Any, Any]:
    _, dataset, table = tiny.setting(small, "melu")
    return table, dataset


def tasks_of(small: Location) -> list[int]:
    return Loader(*loaded(small), "train", 6).tasks()["task"].to_list()


@pytest.mark.usefixtures("remembering", "in_float64")
def test_elastic(tmp_path, small):
    """Begun by two workers, gone on with by none but this process, then by three: float64 1e-9."""
    run_of(tmp_path / "whole", small, 1, epochs=4)
    for world, epochs in ((2, 1), (0, 2), (3, 4)):
        run_of(tmp_path / "parts", small, world, epochs=epochs)
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("remembering")
def test_what_is_remembered_counts(tmp_path, small, monkeypatch):
    """What the tests of whole runs stand on: without the memory's answers training ends elsewhere."""
    run_of(tmp_path / "with", small, 0, epochs=1)
    monkeypatch.setattr(tiny.Traces, "merge", lambda self, writes: None)
    run_of(tmp_path / "without", small, 0, epochs=1)
    a, b = (last(tmp_path / n)["params"]["weight"] for n in ("with", "without"))
    assert not torch.allclose(a, b, rtol=1e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 3, 6, 9, 13])
@pytest.mark.parametrize(("world", "flags"), [(0, {}), (2, {}), (2, {"staleness": 1, "state_shards": 2})], ids=str)
@pytest.mark.usefixtures("remembering")
def test_stopped_anywhere_and_gone_on_with_ends_the_same(tmp_path, small, monkeypatch, world, flags, stop):
    """9 updates an epoch, checkpoints every 4: the same bits, the part `state` included."""
    flags = {"epochs": 2, "checkpoint_steps": 4, **flags}
    shards = flags.get("state_shards", 1)
    run_of(tmp_path / "whole", small, world, Servers([Server(20) for _ in range(shards)]), **flags)
    apply = MetaUpdate.apply

    def stopping(self: MetaUpdate, batch: Any, step: int) -> tuple[float, float]:
        if step == stop:
            raise Stop
        return apply(self, batch, step)

    servers = Servers([Server(20) for _ in range(shards)])  # which the stopped group leaves behind
    with monkeypatch.context() as m:
        m.setattr(MetaUpdate, "apply", stopping)
        with pytest.raises(Stop):
            run_of(tmp_path / "parts", small, world, servers, **flags)
    run_of(tmp_path / "parts", small, world, servers, **flags)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert any("state-" in name for name in digests(tmp_path / "whole"))
    reports = [[row[NAME] for row in read_metrics(Location.of(tmp_path / n))] for n in ("parts", "whole")]
    assert reports[0] == reports[1]


class Mortal(Servers):
    """The server is started anew, empty, before the call number `death`."""

    def __init__(self, death: int) -> None:
        super().__init__([Server(20)])
        self.left, self.lock = death, threading.Lock()
        self.said: list[str] = []

    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        with self.lock:
            self.left -= 1
            if not self.left:
                dead, self.servers = self.servers, [Server(20)]
                for hosted in dead[0]._hosted.values():
                    hosted.close()  # who waits there meets its death at once
        try:
            return super().ask(method, each)
        except StateLost as e:
            self.said.append(str(e))
            raise


@pytest.mark.usefixtures("remembering")
@pytest.mark.parametrize("death", [11, 30, 45])
def test_a_lost_server_is_refilled(tmp_path, small, death):
    """The workers that meet it say which state was lost; the next group ends in the same bits."""
    flags: dict[str, Any] = {"epochs": 2, "checkpoint_steps": 4}
    run_of(tmp_path / "whole", small, 2, **flags)
    servers = Mortal(death)
    with pytest.raises(StateError):
        run_of(tmp_path / "parts", small, 2, servers, **flags)
    assert servers.said[0].startswith("the shared state traces was lost: its server")
    run_of(tmp_path / "parts", small, 2, servers, **flags)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


@pytest.mark.parametrize("world", [0, 2])
def test_not_finite_with_a_memory_ends_all_with_one_sentence(tmp_path, small, remembering, world):
    """One task a step: the other worker has none, reads nothing and must not be waited for."""
    poisoned = tasks_of(small)[3]
    remembering.poison = (poisoned, "gradient")
    with pytest.raises(RunError, match=f"the gradient of task {poisoned} is not finite"):
        run_of(tmp_path, small, world, Servers([Server(5)]), batch_size=1)


@pytest.mark.usefixtures("remembering")
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("shards", [1, 2])
def test_assessment_remembers_what_the_best_checkpoint_does(tmp_path, small, world, shards):
    config, dataset, table = tiny.setting(small, "tiny", epochs=1, state_shards=shards)
    run = Location.of(tmp_path)
    trainer.train(config, run, dataset, small, table, log=lambda _: None)
    done = tiny.together(world, lambda e: assess(config, run, dataset, small, table, e))
    method = build_method(config, dataset, read_items(small, dataset), torch.device("cpu"))
    found = checkpoint.newest(run)
    assert found
    checkpoint.restore_params(run, found, method, "tiny")
    forgetful = evaluation.evaluate(method, table, dataset).tasks["abs_sum"].to_numpy()
    method.shared[NAME].restore(
        {k.partition(".")[2]: v.numpy() for k, v in checkpoint.load(run, found, "state").items()}
    )
    wanted = evaluation.evaluate(method, table, dataset).tasks["abs_sum"].to_numpy()
    assert not np.allclose(forgetful, wanted, rtol=1e-3)
    for f in done:
        np.testing.assert_allclose(np.sort(f.result().method.tasks["abs_sum"].to_numpy()), np.sort(wanted), rtol=1e-6)


# ---- what cannot be


def test_a_checkpoint_of_a_method_without_memories_has_no_state(tmp_path, small, monkeypatch):
    tiny.register(monkeypatch)
    run_of(tmp_path, small, 0, epochs=1)
    assert {f.name for f in tmp_path.rglob("*.safetensors")} == {
        "params-00000.safetensors",
        "optimizer-00000.safetensors",
    }
    assert NAME not in read_metrics(Location.of(tmp_path))[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("traces.count"), "traces is not this method's \\(KeyError: 'count'\\)"),
        (lambda s: s.update({"traces.count": s["traces.count"][1:]}), "traces is not this method's \\(ValueError: "),
        (lambda s: s.update({"index.count": torch.zeros(2)}), "index is not this method's \\(KeyError: "),
        (lambda s: s.clear(), "traces is not this method's \\(KeyError: "),
    ],
    ids=["key", "length", "unknown", "none"],
)
@pytest.mark.usefixtures("remembering")
def test_a_state_that_is_not_this_methods_is_refused(tmp_path, small, change, said):
    run_of(tmp_path, small, 0, epochs=1)
    run = Location.of(tmp_path)
    found, parts = checkpoint.newest(run), last(tmp_path)
    assert found
    change(parts["state"])
    given = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name not in ("location", "files")}
    checkpoint.save(run, parts, **given)
    with pytest.raises(UserError, match=rf"step-\d+: its shared state {said}.*start a new run"):
        run_of(tmp_path, small, 0, epochs=2)


@pytest.mark.usefixtures("remembering")
def test_a_run_keeps_its_shards_and_its_staleness(tmp_path, small):
    run_of(tmp_path, small, 0, epochs=1)
    changes: list[dict[str, Any]] = [{"staleness": 1}, {"state_shards": 2}]
    for flag in changes:
        with pytest.raises(UserError, match=f"train.{next(iter(flag))} is .*undo the change, or start a new run"):
            run_of(tmp_path, small, 0, epochs=2, **flag)


@pytest.mark.usefixtures("remembering")
def test_a_memory_that_cannot_be_spread(tmp_path, small, monkeypatch):
    monkeypatch.setattr(tiny.Traces, "part", tiny.Memory.part)
    with pytest.raises(UserError, match="--state-shards 2: Traces is not made for several shards; leave it at 1"):
        run_of(tmp_path, small, 0, state_shards=2)


@pytest.mark.usefixtures("remembering")
def test_workers_without_a_server_are_refused(tmp_path, small):
    class Alone(Exchange):
        world = 2

    config, dataset, table = tiny.setting(small, "tiny")
    with pytest.raises(ValueError, match="2 workers share a state; they need a server of it"):
        trainer.train(config, Location.of(tmp_path), dataset, small, table, Alone())
