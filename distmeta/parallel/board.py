"""What workers tell the driver while they train: lines to show, signs of life, and why they gave up.

One small actor beside the driver. Workers post to it and never wait for it, but for a fatal sentence; the driver
reads it in a thread. Without it a driver sees only Ray's prefixed, delayed copies of the workers' output, cannot
tell a slow worker from a hung one, and a sentence written for the user drowns in tracebacks.

Its process imports what this module does: neither torch nor ray.train, which take it three seconds. Who posts and reads
is in watch.py.
"""

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

BEAT = 1.0
"""Seconds between a worker's signs of life."""


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
            silent = now - w["at"] > max(2 * BEAT, self.patience / 2)
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
