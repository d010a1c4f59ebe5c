"""What workers tell the driver while they train: lines to show, signs of life, and why they gave up.

One small actor beside the driver. Workers post to it and never wait for it, but for a fatal sentence; the driver
reads it in a thread. Without it a driver sees only Ray's prefixed, delayed copies of the workers' output, cannot
tell a slow worker from a hung one, and a sentence written for the user drowns in tracebacks.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distmeta.parallel.collective import TorchExchange
from distmeta.parallel.state import StateError

_BEAT = 1.0
"""Seconds between a worker's signs of life."""
_LAST = 5.0
"""Seconds to wait for the last of them to arrive."""
_LOOK = 0.5
"""Seconds between the driver's looks at the board."""
_TELL = 20.0
"""Seconds between two lines about workers that are still to start; on a machine at rest they take half of it."""


class Board:
    """The actor's state; its methods are what workers and driver call.

    Args:
        patience: seconds after which a worker that others wait for is named.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.lines: list[str] = []
        self.failure: tuple[str, str] | None = None
        self.workers: dict[int, dict[str, Any]] = {}
        self.named: set[str] = set()

    def say(self, line: str) -> None:
        """A line for the user."""
        self.lines.append(line)

    def fail(self, kind: str, sentence: str) -> None:
        """A worker gave up for a reason that another try would meet again; the first one counts."""
        self.failure = self.failure or (kind, sentence)

    def failed(self) -> bool:
        """Whether the run is over."""
        return self.failure is not None

    def start(self) -> None:
        """A new group of workers begins; nothing is known of them yet."""
        self.workers = {}

    def beat(self, rank: int, place: str, calls: int, waited: float) -> None:
        """A worker's sign of life: how many exchanges it has come to, and for how long it has waited in the last.

        One that others have waited for too long is named: it has come to fewer exchanges, or gives no sign at all.
        """
        now = time.monotonic()
        self.workers[rank] = {"place": place, "calls": calls, "at": now}
        if waited < self.patience:
            return
        for other, w in sorted(self.workers.items()):
            silent = now - w["at"] > max(2 * _BEAT, self.patience / 2)
            if (w["calls"] < calls or silent) and w["place"] not in self.named:
                self.named.add(w["place"])
                self.say(
                    f"worker {other} ({w['place']}): no progress for {waited:.0f} s while the others wait for it;"
                    " the workers are restarted"
                )

    def lost(self, dead: list[int], left: list[int], state: str | None = None) -> None:
        """The group of workers is over: `dead` are gone, `left` could not go on without them.

        Args:
            state: what a worker says about the shared state, where that is why it could not go on.
        """
        if self.failure:  # they ended by themselves, and the user will read why
            return
        if state and not dead:
            self.say(f"{state}; the workers are restarted")
            left = []
        places = {r: f"worker {r} ({w['place']})" for r, w in self.workers.items()}
        for rank in dead or left:
            self.say(f"{places.get(rank, f'worker {rank}')} {'died' if dead else 'lost the others'}")
        self.workers = {}

    def take(self, since: int) -> tuple[int, list[str], tuple[str, str] | None, int]:
        """How many lines there are, those from number `since` on, the failure, and how many workers are at work.

        A board that was restarted has forgotten the older lines and counts from 0 again.
        """
        n = len(self.lines)
        return n, self.lines[since if since <= n else 0 :], self.failure, len(self.workers)


def create(patience: float) -> Any:
    """A handle of a new Board on this node; it ends with this driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(Board).options(**options).remote(patience)


class Pulse:
    """A worker's side: a thread that posts a sign of life a second, until closed."""

    def __init__(self, board: Any, exchange: TorchExchange) -> None:
        self.board, self.exchange = board, exchange
        node = ray.util.get_node_ip_address()
        self.place = f"process {os.getpid()} on {node}"
        self._over = threading.Event()
        threading.Thread(target=self._run, name="distmeta-pulse", daemon=True).start()

    def _run(self) -> None:
        self._beat()
        while not self._over.wait(_BEAT):
            self._beat()

    def _beat(self) -> Any:
        e = self.exchange
        return self.board.beat.remote(e.rank, self.place, e.calls, e.waited)

    def close(self) -> None:
        """End the thread; the last sign of life arrives before what this worker tells Ray."""
        self._over.set()
        with contextlib.suppress(RayError):
            ray.get(self._beat(), timeout=_LAST)


class Deaths(UserCallback):
    """Says on the board which workers died; runs in Ray's controller."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Name the workers that are gone; the others' broken exchanges only follow from that."""
        state = {r: str(e) for r, e in worker_exceptions.items() if isinstance(e, StateError)}
        broken = {r for r, e in worker_exceptions.items() if "ExchangeBroken" in f"{type(e).__name__} {e}"}
        left = broken | state.keys()
        sentence = state[min(state)] if state else None
        self.board.lost.remote(sorted(worker_exceptions.keys() - left), sorted(left), sentence)


class Watch:
    """The driver's side: a thread that shows the board's lines, and says why there are none while workers start.

    Args:
        log: takes one line. standing: says how far the start of workers has come.
    """

    def __init__(self, board: Any, log: Callable[[str], None], standing: Callable[[], str]) -> None:
        self.board, self.log, self.standing = board, log, standing
        self.failure: tuple[str, str] | None = None
        self._shown = 0
        self._broken: OSError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distmeta-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        since = told = time.monotonic()
        while not self._over.wait(_LOOK):
            try:
                workers, now = self._look(), time.monotonic()
                if workers or self.failure:
                    since = told = now
                elif now - told > _TELL:
                    told = now
                    self.log(f"waiting for workers ({now - since:.0f} s): {self.standing()}")
            except RayError:  # the board is being started again
                continue
            except OSError as e:  # whoever read the lines has left: told by close, as print tells it elsewhere
                self._broken = e
                return

    def _look(self) -> int:
        """Show the lines that are new; how many workers are at work."""
        self._shown, lines, self.failure, workers = ray.get(self.board.take.remote(self._shown))
        for line in lines:
            self.log(line)
        return workers

    def close(self) -> tuple[str, str] | None:
        """Show what is left, end the thread, and give the failure that a worker posted.

        Raises:
            OSError: a line could not be shown.
        """
        self._over.set()
        self._thread.join()
        if self._broken:
            raise self._broken
        with contextlib.suppress(RayError):
            self._look()
        return self.failure
