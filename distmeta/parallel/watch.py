"""Who posts to the board and who reads it: workers' signs of life, the controller's list of the dead, the driver."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import UserCallback

from distmeta.parallel.board import BEAT
from distmeta.parallel.collective import TorchExchange
from distmeta.parallel.state import StateError

_LAST = 5.0
"""Seconds to wait for the last of them to arrive."""
_LOOK = 0.5
"""Seconds between the driver's looks at the board."""
_TELL = 20.0
"""Seconds between two lines about workers that are still to start; on a machine at rest they take half of it."""


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
        while not self._over.wait(BEAT):
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
