"""The server of states that all workers share: one shard of each memory, behind one call a step.

Each worker's call of a step hands over what its tasks wrote in the step before, waits until all workers' writes of
that step are there and merged, and brings the answer to its request. Workers come and go in groups; each group opens
a generation of its own, filled from the checkpoint that it goes on from, so a server itself keeps nothing. Knows
nothing of Ray: stateactor.py has the process, shared.py what workers use.
"""

import threading
import time
from collections import defaultdict
from typing import Any

import numpy as np

from distmeta.memory.base import Arrays, Memory


class StateError(RuntimeError):
    """This group of workers cannot go on with its shared state; a new group, which refills it, can."""


class StateLost(StateError):
    """The server does not know the state: it was started anew."""


class Superseded(StateError):
    """A newer group of workers has opened the state."""


class Missing(StateError):
    """A worker did not hand over its writes in time."""


class Server:
    """One shard of each memory. Its methods may be called from many threads; they take turns.

    Args:
        timeout: seconds that a call waits for other workers.
        place: where it runs, for sentences about it.
    """

    def __init__(self, timeout: float, place: str = "in this process") -> None:
        self.timeout, self.place = timeout, place
        self._hosted: dict[str, _Hosted] = {}
        self._lock = threading.Lock()

    def newest(self, name: str) -> int:
        """Generation of the memory `name`; 0: it is not known here."""
        found = self._hosted.get(name)
        return found.generation if found else 0

    def open(self, name: str, generation: int, world: int, memory: Memory, snapshot: Arrays) -> None:
        """Host `memory`, restored from `snapshot`, for a new group of `world` workers; older calls end with an error.

        Raises:
            Superseded: a newer generation is there.
        """
        with self._lock:
            older = self._hosted.get(name)
            if older and older.generation == generation:
                return  # a retried call
            if older and older.generation > generation:
                raise Superseded(f"the shared state {name} is in the hands of a newer group of workers")
            # what came over the network is read-only, and a memory may keep what it is given
            memory.restore({key: np.require(value, requirements="W") for key, value in snapshot.items()})
            self._hosted[name] = _Hosted(name, generation, world, memory, self.timeout)
            if older:
                older.close()

    def call(
        self,
        name: str,
        generation: int,
        step: int,
        rank: int,
        writes: Arrays | None,
        request: Arrays | None,
        until: int | None,
    ) -> Arrays:
        """What a worker has to say and to ask in a step: the answer, empty without a request.

        Args:
            step: counted from 0 in each generation.
            writes: the worker's of step − 1; None: they were handed over before.
            until: wait until the writes of all steps before this one are merged; None: do not wait.

        Raises:
            StateLost, Superseded, Missing.
        """
        return self._of(name, generation).call(step, rank, writes, request, until)

    def snapshot(self, name: str, generation: int) -> Arrays:
        """All there is in a memory. Raises StateLost, Superseded."""
        return self._of(name, generation).snapshot()

    def report(self, name: str, generation: int) -> dict[str, Any]:
        """A memory's numbers since the last call. Raises StateLost, Superseded."""
        return self._of(name, generation).report()

    def _of(self, name: str, generation: int) -> "_Hosted":
        found = self._hosted.get(name)
        if not found or found.generation < generation:
            raise StateLost(f"the shared state {name} was lost: its server ({self.place}) was started anew")
        if found.generation > generation:
            raise found.superseded()
        return found


class _Hosted:
    """A memory in the hands of one group of workers."""

    def __init__(self, name: str, generation: int, world: int, memory: Memory, timeout: float) -> None:
        self.name, self.generation, self.world = name, generation, world
        self.memory, self.timeout = memory, timeout
        self.merged = 0
        """The writes of all steps before this one are in."""
        self.writes: defaultdict[int, dict[int, Arrays]] = defaultdict(dict)
        """step -> rank -> what is not merged yet."""
        self.answers: defaultdict[int, dict[int, Arrays]] = defaultdict(dict)
        """rank -> step -> what its last two calls with writes were answered."""
        self.alike: tuple[int, Arrays] | None = None
        """Where the memory answers all alike: `merged` and the answer then, one for all workers and their logs."""
        self.over = False
        self.changed = threading.Condition()

    def call(self, step: int, rank: int, writes: Arrays | None, request: Arrays | None, until: int | None) -> Arrays:
        """See Server.call."""
        with self.changed:
            self._check()
            log = self.answers[rank] if writes is not None else {}
            if step in log:
                return log[step]
            if log and step < max(log):
                raise Superseded(f"the shared state {self.name}: worker {rank} is past step {step}")
            if writes is not None and step > self.merged:
                self.writes[step - 1].setdefault(rank, writes)
                self.changed.notify_all()
            if until is not None:
                self._merge(until)
            if step in log:  # the same call, sent again, was quicker
                return log[step]
            answer = {} if request is None else self._read(request)
            log[step] = answer
            log.pop(step - 2, None)
            return answer

    def _read(self, request: Arrays) -> Arrays:
        if not self.memory.alike:
            return self.memory.read(request)
        if self.alike is None or self.alike[0] != self.merged:
            self.alike = self.merged, {key: value.view() for key, value in self.memory.read(request).items()}
            for value in self.alike[1].values():
                value.flags.writeable = False
        return self.alike[1]

    def _merge(self, until: int) -> None:
        """Merge the writes of all steps before `until`, in the order of steps, waiting for those that lack."""
        deadline = time.monotonic() + self.timeout
        while self.merged < until:
            self._check()
            here = self.writes[self.merged]
            if len(here) == self.world:
                self.memory.merge([here[rank] for rank in range(self.world)])
                del self.writes[self.merged]
                self.merged += 1
                continue
            if not self.changed.wait(deadline - time.monotonic()):
                lacking = [str(rank) for rank in range(self.world) if rank not in here]
                raise Missing(
                    f"the shared state {self.name}: worker{'s' * (len(lacking) > 1)} {', '.join(lacking)} did not come"
                    f" for {self.timeout:.0f} s"
                )

    def snapshot(self) -> Arrays:
        """See Server.snapshot."""
        with self.changed:
            self._check()
            return self.memory.snapshot()

    def report(self) -> dict[str, Any]:
        """See Server.report."""
        with self.changed:
            self._check()
            return self.memory.report()

    def close(self) -> None:
        """End all calls that wait, and those to come, with Superseded."""
        with self.changed:
            self.over = True
            self.changed.notify_all()

    def superseded(self) -> Superseded:
        """The error of an older generation's calls."""
        return Superseded(f"the shared state {self.name} is in the hands of a newer group of workers")

    def _check(self) -> None:
        if self.over:
            raise self.superseded()
