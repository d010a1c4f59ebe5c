"""The server of a shared state: one call a step, generations, staleness, shards, duplicates, who is missing."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tiny

from distmeta.exchange import Exchange
from distmeta.memory.base import Arrays, Shared
from distmeta.parallel.shared import Remote, Servers
from distmeta.parallel.state import Missing, Server, StateLost, Superseded

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

    def begin(self, method: str, each: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        if method in ("snapshot", "report"):
            return super().begin(method, each)
        with ThreadPoolExecutor(2) as pool:
            first, second = (pool.submit(super(Twice, self).begin, method, each) for _ in range(2))
        for a, b in zip(first.result()(), second.result()(), strict=True):
            assert a == b if not isinstance(a, dict) else same(a, b)
        return super().begin(method, each) if method == "call" else first.result()


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
