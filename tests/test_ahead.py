"""A memory that answers all alike is fetched ahead: what a read sees, what waits for what, losses, bad input."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_remembering import tasks_of
from tiny import Later, Mean, digests, last, run_of

from distmeta.errors import RunError, UserError
from distmeta.exchange import Exchange
from distmeta.memory.base import Arrays, Memory, Shared
from distmeta.parallel import trainer
from distmeta.parallel.shared import Ahead, Servers
from distmeta.parallel.state import Server, StateError, StateLost
from distmeta.parallel.update import MetaUpdate

NAME = "mean"


class Listed(Shared):
    """What staleness means, said plainly: all states that there were, of which a step reads one."""

    def __init__(self, memory: Memory, staleness: int) -> None:
        super().__init__(memory)
        self.staleness, self.first, self.states = staleness, 0, [memory.snapshot()]

    def read(self, request: Arrays) -> Arrays:
        step = len(self.states) - 1
        seen = Mean()
        seen.restore(self.states[max(self.first, step - self.staleness)])
        return seen.read(request)

    def write(self, writes: Arrays) -> None:
        self.memory.merge([writes])
        self.states.append(self.memory.snapshot())

    def flush(self) -> None:
        self.first = len(self.states) - 1

    def restore(self, snapshot: Arrays) -> None:
        self.memory.restore(snapshot)
        self.first, self.states = 0, [self.memory.snapshot()]


def words(tasks: Sequence[int], value: float) -> Arrays:
    """Writes of these tasks."""
    task = np.array(tasks, np.int64)
    return {"task": task, "value": value + task / 7}


def ahead_of(servers: Servers, staleness: int = 0, exchange: Exchange | None = None) -> Ahead:
    """A Mean in the servers, open."""
    made = Ahead(NAME, Mean(), servers, exchange or Exchange(), staleness)
    made.restore(made.snapshot())
    return made


def number(answer: Arrays) -> tuple[float, int]:
    return answer["value"].item(), answer["count"].item()


# ---- what a read sees


def script(shared: Shared, exchange: Exchange) -> dict[str, tuple[float, int]]:
    """What this worker read, by when: 40 steps of up to 4 tasks, in which nobody waits for anybody."""
    rng, told = np.random.default_rng(0), {}
    for step in range(40):
        tasks = np.sort(rng.choice(60, rng.integers(0, 5), replace=False))
        mine = [int(t) for t in tasks if t % exchange.world == exchange.rank]
        if mine:
            told[f"{step}"] = number(shared.read({}))
            assert number(shared.read({})) == told[f"{step}"]
        shared.write(words(mine, step))
        if step % 9:  # where it is not called, the step's writes leave with what comes next
            shared.advance()
        if step in (6, 7, 15, 27):
            shared.flush()
            if exchange.rank == 0:
                told[f"kept {step}"] = number(shared.snapshot())
            told[f"after {step}"] = number(shared.read({}))
        if step == 27:
            shared.restore(shared.snapshot() if exchange.rank == 0 else {})
    shared.flush()
    return told | {"end": number(shared.read({}))}


class Again(Later):
    """Every call is sent twice, and one answer is lost: now the first, now the other."""

    odd = False

    def begin(self, method: str, each: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        both = super().begin(method, each), super().begin(method, each)
        self.odd = not self.odd
        return both[self.odd]


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
@pytest.mark.parametrize(("world", "kind"), [(1, Servers), (1, Later), (2, Later), (5, Later), (3, Again)])
def test_a_read_sees_the_steps_it_should(world, kind, lag):
    """Bit for bit, though no exchange keeps the workers together and many have no task in a step."""
    servers = kind([Server(20)])
    done = tiny.together(world, lambda e: script(ahead_of(servers, lag, e), e), servers)
    wanted = script(Listed(Mean(), lag), Exchange())
    found = [f.result() for f in done]
    assert set().union(*found) == wanted.keys()
    assert all(told == {when: wanted[when] for when in told} for told in found)
    assert wanted["39"] != wanted["end"]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_any_number_of_workers_trains_the_same(tmp_path, small, monkeypatch, lag):
    """Invariant 2, float64 1e-9, against one process that keeps a list of states; of 5 workers some have no task."""
    tiny.register(monkeypatch, tiny.Following)
    tiny.in_float64(monkeypatch)
    flags: dict[str, Any] = {"epochs": 2, "batch_size": 6, "checkpoint_steps": 10, "staleness": lag}
    build = trainer.build_method

    def listed(*given: Any) -> Any:
        method = build(*given)
        method.shared = {NAME: Listed(Mean(), lag)}
        return method

    with monkeypatch.context() as m:
        m.setattr(trainer, "build_method", listed)
        assert run_of(tmp_path / "list", small, 0, **flags).steps > 40
    wanted = last(tmp_path / "list")
    assert wanted["state"][f"{NAME}.count"].item() == 2 * len(tasks_of(small))
    for world in (0, 1, 2, 3, 5):
        run_of(tmp_path / str(world), small, world, Later([Server(20)]), **flags)
        torch.testing.assert_close(last(tmp_path / str(world)), wanted, rtol=1e-9, atol=1e-9)


def test_staleness_shows(tmp_path, small, monkeypatch):
    """What the test above stands on."""
    tiny.register(monkeypatch, tiny.Following)
    weights = []
    for lag in (0, 1, 2):
        run_of(tmp_path / str(lag), small, 0, epochs=1, batch_size=6, staleness=lag)
        weights.append(last(tmp_path / str(lag))["params"]["weight"])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(weights[a], weights[b], rtol=1e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 6, 9, 13])
def test_stopped_anywhere_and_gone_on_with_ends_the_same(tmp_path, small, monkeypatch, stop):
    """Invariant 3: the same bits, also where checkpoints came in between; with writes held back, where they agree."""
    tiny.register(monkeypatch, tiny.Following)
    apply = MetaUpdate.apply

    def stopping(self: MetaUpdate, batch: Any, step: int) -> tuple[float, float]:
        if step == stop:
            raise Stop
        return apply(self, batch, step)

    run_of(tmp_path / "whole", small, 2, Later([Server(20)]), epochs=2)
    for lag, whole in ((0, "whole"), (1, "late")):
        flags = {"epochs": 2, "checkpoint_steps": 4, "staleness": lag}
        if lag:
            run_of(tmp_path / whole, small, 2, Later([Server(20)]), **flags)
        servers = Later([Server(20)])
        with monkeypatch.context() as m:
            m.setattr(MetaUpdate, "apply", stopping)
            with pytest.raises(Stop):
                run_of(tmp_path / f"parts-{lag}", small, 2, servers, **flags)
        run_of(tmp_path / f"parts-{lag}", small, 2, servers, **flags)
        torch.testing.assert_close(last(tmp_path / f"parts-{lag}"), last(tmp_path / whole), rtol=0, atol=0)


# ---- what waits for what


def test_a_step_ends_without_waiting_for_the_server():
    servers = Later([Server(20)])
    shared = ahead_of(servers)
    assert number(shared.read({}))[1] == 0
    servers.gate.clear()
    servers.awaited.clear()
    shared.write(words([3], 1.0))
    shared.advance()  # would fail after 20 s
    assert not servers.awaited.is_set()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(shared.read, {})
        assert servers.awaited.wait(10)
        assert not reading.done()
        servers.gate.set()
        assert number(reading.result(10))[1] == 1


def test_a_stale_answer_has_a_whole_step_to_come():
    """The next step reads what is there; its end waits for the call before it, one being under way at a time."""
    servers = Later([Server(20)])
    shared = ahead_of(servers, 1)
    assert number(shared.read({}))[1] == 0
    servers.gate.clear()
    servers.awaited.clear()
    shared.write(words([3], 1.0))
    shared.advance()
    assert number(shared.read({}))[1] == 0
    assert not servers.awaited.is_set()
    shared.write(words([4, 5], 1.0))
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(shared.advance)
        assert servers.awaited.wait(10)
        assert not ending.done()
        servers.gate.set()
        ending.result(10)
    servers.gate.clear()
    assert number(shared.read({}))[1] == 1
    servers.gate.set()
    shared.flush()
    assert number(shared.read({}))[1] == 3


def test_one_answer_serves_all_workers():
    """The server keeps it once, whatever the number of workers; nobody can change it for the others."""
    servers = Servers([Server(20)])
    shared = ahead_of(servers)
    first, second = (servers.ask("call", [(NAME, shared.generation, 0, 0, None, {}, None)])[0] for _ in range(2))
    assert first is second
    with pytest.raises(ValueError, match="read-only"):
        first["value"][0] = 1


# ---- losses


@pytest.mark.parametrize("lag", [0, 1])
def test_a_server_lost_while_its_answer_is_under_way(lag):
    servers = Later([Server(20)])
    shared = ahead_of(servers, lag)
    shared.read({})
    servers.gate.clear()
    shared.write(words([3], 1.0))
    shared.advance()
    servers.servers = [Server(20)]
    servers.gate.set()
    if lag:
        shared.read({})
        shared.write(words([3], 1.0))
    for _ in range(2):  # it stays lost
        with pytest.raises(StateLost, match=r"the shared state mean was lost: its server \(.*\) was started anew"):
            shared.read({})
    shared.restore({"value": np.array([2.5]), "count": np.array([9])})
    assert number(shared.read({})) == (2.5, 9)


class Dying(Later):
    """The server is started anew, empty, while the call number `death` is under way."""

    def __init__(self, death: int) -> None:
        super().__init__([Server(20)])
        self.left, self.lock = death, threading.Lock()

    def begin(self, method: str, each: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        with self.lock:
            self.left -= method == "call"
            if self.left or method != "call":
                return super().begin(method, each)
            self.gate.clear()
            answers, dead = super().begin(method, each), self.servers
            self.servers = [Server(20)]
            for hosted in dead[0]._hosted.values():
                hosted.close()  # who waits there meets its death at once
            self.gate.set()
            return answers


@pytest.mark.parametrize(("death", "lag"), [(12, 0), (25, 0), (25, 2)])
def test_a_lost_server_is_refilled(tmp_path, small, monkeypatch, death, lag):
    """Invariant 4: the next group ends in the same bits."""
    tiny.register(monkeypatch, tiny.Following)
    flags: dict[str, Any] = {"epochs": 2, "checkpoint_steps": 4, "staleness": lag}
    run_of(tmp_path / "whole", small, 2, Later([Server(20)]), **flags)
    servers = Dying(death)
    with pytest.raises(StateError):
        run_of(tmp_path / "parts", small, 2, servers, **flags)
    run_of(tmp_path / "parts", small, 2, servers, **flags)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


# ---- what cannot be


@pytest.mark.parametrize("lag", [0, 1])
def test_what_a_failed_step_wrote_is_forgotten(lag):
    """Blame is found by reading what the step itself read; the server hears nothing of it."""
    servers = Servers([Server(20)])
    shared, plain = ahead_of(servers, lag), Listed(Mean(), lag)
    for step in range(4):
        for each in (shared, plain):
            each.write(words([step, step + 4], 1.0))
            each.advance()
    shared.write(words([7], 1e9))
    shared.discard()
    assert number(shared.read({})) == number(plain.read({}))
    for each in (shared, plain):
        each.write(words([8], 2.0))
        each.flush()
    assert number(shared.read({})) == number(plain.read({}))


@pytest.mark.parametrize(("world", "lag"), [(0, 0), (2, 0), (3, 1)])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_names_the_task(tmp_path, small, monkeypatch, world, lag, what):
    poisoned = tasks_of(small)[30]
    tiny.register(monkeypatch, tiny.Following).poison = (poisoned, what)
    with pytest.raises(RunError, match=f"the {what} of task {poisoned} is not finite"):
        run_of(tmp_path, small, world, Later([Server(5)]), batch_size=6, staleness=lag)


@pytest.mark.parametrize("world", [0, 2])
def test_staleness_of_a_memory_that_must_not_be_stale(tmp_path, small, monkeypatch, world):
    tiny.register(monkeypatch, tiny.Following)
    monkeypatch.setattr(Mean, "prompt", "--write sequential")
    run_of(tmp_path / "prompt", small, world, epochs=1)
    with pytest.raises(
        UserError, match=r"^--staleness 2: --write sequential needs what the step itself read; leave it at 0$"
    ):
        run_of(tmp_path / "stale", small, world, epochs=1, staleness=2)


def test_shards_of_a_memory_that_all_read_whole(tmp_path: Path, small, monkeypatch):
    tiny.register(monkeypatch, tiny.Following)
    with pytest.raises(UserError, match="--state-shards 2: Mean is not made for several shards; leave it at 1"):
        run_of(tmp_path, small, 0, state_shards=2)
