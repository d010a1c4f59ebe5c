"""Where the seconds go: phases and steps, a slow worker is seen; what all workers agree on; who may write."""

import contextlib
import dataclasses
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from distmeta.data.loader import Loader
from distmeta.errors import RunError
from distmeta.exchange import Exchange
from distmeta.parallel import checkpoint, timing, trainer
from distmeta.parallel.timing import OF_A_STEP, PHASES, Times, together
from distmeta.parallel.update import MetaUpdate
from distmeta.parallel.validation import read_metrics
from distmeta.storage import Location


def zeros() -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0)


@pytest.fixture
def clock(monkeypatch) -> Any:
    """A clock that goes on when told."""

    class Clock:
        now = 100.0

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    return made


def test_a_phase_within_another_counts_once(clock):
    times = Times(zeros())
    with times.phase("adapt"):
        clock.sleep(1)
        with times.phase("exchange"):
            clock.sleep(2)
        clock.sleep(4)
    clock.sleep(8)
    with contextlib.suppress(KeyError), times.phase("input"):
        clock.sleep(16)
        raise KeyError
    assert times.sums == {**zeros(), "adapt": 5, "exchange": 2, "input": 16}
    assert times.learning() == 23


@pytest.mark.parametrize("kept", [1 << 15, 4])
def test_steps_of_one_worker(clock, monkeypatch, kept):
    """Step i takes i + 1 ms of backward. Sums of an earlier launch are no step's; thinned, maxima stay exact."""
    monkeypatch.setattr(timing, "KEPT", kept)
    times = Times({**zeros(), "backward": 50.0})
    for i in range(9):
        with times.phase("backward"):
            clock.sleep((i + 1) / 1000)
        times.step()
    with times.phase("input"):
        clock.sleep(1)  # finding that there is no more batch is no step
    line = together([times.packed()])
    rows = np.arange(1, 10) if kept > 9 else np.array([1, 5, 9])
    assert line["step_ms"]["backward"] == pytest.approx([np.median(rows), np.quantile(rows, 0.95), 9])
    assert line["step_ms"]["input"] == [0, 0, 0]
    assert line["skew"] == pytest.approx([0.045])
    assert (line["world"], line["exchange_wait_s"]) == (1, 0.0)


def test_workers_together_are_what_plain_python_says(clock):
    seconds = np.random.default_rng(0).random((3, 7, len(OF_A_STEP)))
    packed = []
    for rank in seconds:
        times = Times(zeros())
        for row in rank:
            for phase, value in zip(OF_A_STEP, row, strict=True):
                with times.phase(phase):
                    clock.sleep(value)
            times.step()
        packed.append(times.packed())
    line = together(packed)
    wait = 0.0
    for i in range(7):
        spent = [seconds[r, i, OF_A_STEP.index("exchange")] for r in range(3)]
        wait += sum(s - min(spent) for s in spent) / 3
    assert line["exchange_wait_s"] == pytest.approx(wait)
    busy = [sum(row[OF_A_STEP.index(p)] for row in rank for p in ("input", "adapt", "backward", "optimizer"))
            for rank in seconds]  # fmt: skip
    assert line["skew"] == pytest.approx(busy)
    for j, phase in enumerate(OF_A_STEP):
        every = sorted(1000 * seconds[:, :, j].ravel())
        assert line["step_ms"][phase] == pytest.approx([every[10], every[19], every[20]])
    assert line["world"] == 3


# ---- in runs of several workers


def run_of(
    where: Path, small: Location, method: str, world: int = 2, fence: Any = None, **flags: Any
) -> list[Future[trainer.Outcome]]:
    """Train into `where`, or go on with what is there; what each worker came to, its seconds left out."""
    config, dataset, table = tiny.setting(small, method, **flags)
    run = Location.of(where).make_dir()

    def work(exchange: Exchange) -> trainer.Outcome:
        mine = None if fence is None else lambda: fence(exchange.rank)
        outcome = trainer.train(config, run, dataset, small, table, exchange, lambda _: None, fence=mine)
        return dataclasses.replace(outcome, seconds=0)

    return tiny.together(world, work)


def test_a_slow_worker_is_seen(tmp_path, small, monkeypatch):
    """Rank 1 takes 20 ms longer a step: it is busier by that, and rank 0 waits for it."""
    local, slower = MetaUpdate.local, 0.02

    def slow(self: MetaUpdate, batch: Any, timed: Any) -> None:
        with timed("adapt"):
            time.sleep(slower * self.exchange.rank)
        local(self, batch, timed)

    monkeypatch.setattr(MetaUpdate, "local", slow)
    tiny.register(monkeypatch)
    for f in run_of(tmp_path, small, "tiny", epochs=2):
        f.result()
    first, second = read_metrics(Location.of(tmp_path))
    steps = second["step"] - first["step"]
    for row in (first, second):
        assert row["world"] == 2
        assert row["skew"][1] - row["skew"][0] > slower * steps / 2
        assert row["exchange_wait_s"] > slower * steps / 4
        assert row["step_ms"]["adapt"][1] >= 1000 * slower


def test_closed_form_says_where_its_seconds_went(tmp_path, small):
    for f in run_of(tmp_path, small, "als"):
        f.result()
    (row,) = read_metrics(Location.of(tmp_path))
    assert min(row["adapt_s"], row["input_s"], row["exchange_s"], *row["skew"]) > 0
    assert row["backward_s"] == 0
    assert (len(row["skew"]), row["world"]) == (2, 2)


def test_all_workers_stop_early_together(tmp_path, small):
    """Patience counts what was exchanged: the same best, the same end; also when gone on with."""

    for patience in (1, 3):
        a, b = (f.result() for f in run_of(tmp_path, small, "melu", epochs=40, lr=0.05, patience=patience))
        assert a == b
        assert a.ended == "patience"
        assert a.epochs < 40
    assert len(read_metrics(Location.of(tmp_path))) == a.epochs


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_on_one_worker_ends_all_with_one_sentence(tmp_path, small, monkeypatch, what):
    fresh = tiny.register(monkeypatch)
    _, dataset, table = tiny.setting(small, "tiny")
    task = int(Loader(table, dataset, "train", 16, rank=1, world=2).tasks()["task"][3])
    fresh.poison = (task, what)
    first, second = (f.exception() for f in run_of(tmp_path, small, "tiny"))
    assert isinstance(first, RunError)
    assert isinstance(second, RunError)
    assert str(first) == str(second)
    assert f"the {what} of task {task} is not finite; there is no checkpoint yet" in str(first)


def test_rank_0_says_which_checkpoint_all_take_up(tmp_path, small, monkeypatch):
    """A worker that sees fewer checkpoints (a lagging file system) must not start elsewhere."""
    run_of(tmp_path, small, "melu", epochs=1)[0].result()
    complete = checkpoint.complete
    monkeypatch.setattr(
        checkpoint, "complete", lambda run: complete(run) if threading.current_thread().name == "rank-0" else []
    )
    a, b = (f.result() for f in run_of(tmp_path, small, "melu", epochs=2))
    assert a == b
    assert a.epochs == 2


class Replaced(RunError):
    pass


@pytest.mark.parametrize("kth", range(1, 6))
def test_behind_the_fence_nothing_is_written(tmp_path, small, kth):
    """9 steps an epoch, a checkpoint after 4: written are step 4, 8, line 1, step 9, 13 in this order."""
    calls: list[int] = []

    def fence(rank: int) -> None:
        calls.append(rank)
        if len(calls) == kth:
            raise Replaced

    done = run_of(tmp_path, small, "melu", fence=fence, epochs=2, checkpoint_steps=4)
    assert isinstance(done[0].exception(), Replaced)
    run = Location.of(tmp_path)
    steps = sorted(int(f.name[5:]) for f in (tmp_path / "checkpoints").glob("*")) if kth > 1 else []
    assert checkpoint.complete(run) == steps
    assert set(calls) == {0}
    made = [4, 8, None, 9, 13][: kth - 1]
    assert (steps[-1:] or [None])[0] == ([s for s in made if s] or [None])[-1]
    assert len(read_metrics(run)) == made.count(None)
