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

_BEAT = 1.0
"""Seconds between a worker's signs of life."""
_LOOK = 0.5
"""Seconds between the driver's looks at the board."""


class Board:
    """The actor's state; its methods are what workers and driver call."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failure: tuple[str, str] | None = None
        self.workers: dict[int, dict[str, Any]] = {}

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

    def beat(self, rank: int, place: str, calls: int, inside: bool) -> None:
        """A worker's sign of life: how many exchanges it has come to, and whether it waits in one."""
        now = time.monotonic()
        before = self.workers.get(rank)
        moved = before is None or (calls, inside) != (before["calls"], before["inside"])
        since = now if moved or before is None else before["since"]
        self.workers[rank] = {"place": place, "calls": calls, "inside": inside, "since": since, "at": now}

    def lost(self, dead: list[int], left: list[int]) -> None:
        """The group of workers is over: `dead` are gone, `left` could not go on without them."""
        if self.failure:  # they ended by themselves, and the user will read why
            return
        places = {r: f"worker {r} ({w['place']})" for r, w in self.workers.items()}
        for rank in dead or left:
            self.say(f"{places.get(rank, f'worker {rank}')} {'died' if dead else 'lost the others'}")
        self.workers = {}

    def late(self, seconds: float) -> list[str]:
        """Workers that have not moved for `seconds` while others wait in a later exchange, named."""
        now = time.monotonic()
        if not any(w["inside"] and now - w["since"] >= seconds for w in self.workers.values()):
            return []
        furthest = max(w["calls"] for w in self.workers.values())
        return [
            f"worker {rank} ({w['place']}), for {now - w['since']:.0f} s"
            for rank, w in sorted(self.workers.items())
            if w["calls"] < furthest or now - w["at"] > seconds
        ]

    def take(self, since: int, seconds: float) -> tuple[int, list[str], list[str], tuple[str, str] | None]:
        """How many lines there are, those from number `since` on, who is `late(seconds)`, and the failure.

        A board that was restarted has forgotten the older lines and counts from 0 again.
        """
        n = len(self.lines)
        return n, self.lines[since if since <= n else 0 :], self.late(seconds), self.failure


def create() -> Any:
    """A handle of a new Board on this node; it ends with this driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(Board).options(**options).remote()


class Pulse:
    """A worker's side: a thread that posts a sign of life a second, until closed."""

    def __init__(self, board: Any, exchange: TorchExchange) -> None:
        self.board, self.exchange = board, exchange
        node = ray.util.get_node_ip_address()
        self.place = f"process {os.getpid()} on {node}"
        self._over = threading.Event()
        threading.Thread(target=self._run, name="distmeta-pulse", daemon=True).start()

    def _run(self) -> None:
        while True:
            e = self.exchange
            self.board.beat.remote(e.rank, self.place, e.calls, e.inside)
            if self._over.wait(_BEAT):
                return

    def close(self) -> None:
        """End the thread."""
        self._over.set()


class Deaths(UserCallback):
    """Says on the board which workers died; runs in Ray's controller."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Name the workers that are gone; the others' broken exchanges only follow from that."""
        left = [r for r, e in worker_exceptions.items() if "ExchangeBroken" in f"{type(e).__name__} {e}"]
        self.board.lost.remote(sorted(worker_exceptions.keys() - left), sorted(left))


class Watch:
    """The driver's side: a thread that shows the board's lines and names workers that hang.

    Args:
        log: takes one line.
        patience: seconds after which a worker that the others wait for is named.
    """

    def __init__(self, board: Any, log: Callable[[str], None], patience: float) -> None:
        self.board, self.log, self.patience = board, log, patience
        self.failure: tuple[str, str] | None = None
        self._shown = 0
        self._named: set[str] = set()
        self._broken: OSError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distmeta-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_LOOK):
            try:
                self._look()
            except RayError:  # the board is being started again
                continue
            except OSError as e:  # whoever read the lines has left: told by close, as print tells it elsewhere
                self._broken = e
                return

    def _look(self) -> None:
        self._shown, lines, late, self.failure = ray.get(self.board.take.remote(self._shown, self.patience))
        for line in lines:
            self.log(line)
        for text in late:
            name = text.split(",")[0]
            if name not in self._named:
                self._named.add(name)
                self.log(f"{text}: no progress while the other workers wait for it; the workers are restarted")

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
