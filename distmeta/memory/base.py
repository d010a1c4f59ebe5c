"""What a shared state is, and how a method reaches it.

A `Memory` is a plain data structure that a method's tasks read and write. The method talks to a `Shared`: this one
holds the memory in this process; parallel/state.py has one for workers, whose memory lives in a server. Either way a
step's reads see all writes of the steps before it and none of its own, whatever the number of workers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
"""What travels: arrays by name; the first axis is that of the tasks, where there is one."""


class Memory(ABC):
    """A state that all workers share."""

    alike: bool = False
    """Whether every request is the same, {}, whatever the tasks, so that the next answer can be fetched while the
    workers compute."""
    prompt: str = ""
    """The option that makes a write hold only for the state that was read in the same step, so that none may be stale;
    "" where a stale read does no harm."""

    @abstractmethod
    def read(self, request: Arrays) -> Arrays:
        """The answer to each task of `request` (of any number, none too). Changes nothing, and does not change when the
        memory goes on; among workers it may be read-only."""

    @abstractmethod
    def merge(self, writes: Sequence[Arrays]) -> None:
        """Apply all that the tasks of one step wrote; an entry a worker, in any order.

        The outcome must not depend on how the step's tasks were spread over the entries: apply in task-id order.
        """

    @abstractmethod
    def snapshot(self) -> Arrays:
        """All there is, for a checkpoint; not views of what goes on changing."""

    @abstractmethod
    def restore(self, snapshot: Arrays) -> None:
        """Become what `snapshot` was taken of: every later answer is the same, bit for bit."""

    def report(self) -> dict[str, Any]:
        """Numbers worth a line an epoch, since the last call: plain numbers and lists."""
        return {}

    def part(self, number: int, shards: int) -> "Memory":
        """An empty memory for shard `number` of `shards`: this one's capacity is shared out among them."""
        raise NotImplementedError(f"{type(self).__name__} is not made for several shards")

    def route(self, writes: Arrays, shards: int) -> list[Arrays]:
        """What of `writes` belongs to each shard, by key."""
        raise NotImplementedError(f"{type(self).__name__} is not made for several shards")

    def combine(self, answers: Sequence[Arrays]) -> Arrays:
        """One answer of those that all shards gave to the same request."""
        raise NotImplementedError(f"{type(self).__name__} is not made for several shards")


class Shared:
    """A memory as the methods of one process use it.

    Args:
        memory: the structure itself.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.pending: Arrays | None = None

    def read(self, request: Arrays) -> Arrays:
        """The memory's answer, all writes of the steps before this one applied."""
        self.flush()
        return self.memory.read(request)

    def write(self, writes: Arrays) -> None:
        """What this step's tasks wrote, once a step and after its reads; applied before the next step's."""
        self.flush()
        self.pending = writes

    def advance(self) -> None:
        """The step is over and its writes hold: called once a step, after `write`, on every worker.

        A chance to fetch what the next step reads while this worker goes on; nothing to do in this process.
        """

    def discard(self) -> None:
        """Forget what this step wrote (it failed, and was not advanced from); reads answer as they did in it."""
        self.pending = None

    def flush(self) -> None:
        """Have everything written so far applied; among workers, all call it."""
        if self.pending is not None:
            self.memory.merge([self.pending])
            self.pending = None

    def snapshot(self) -> Arrays:
        """The memory's, everything written so far applied (flush first)."""
        return self.memory.snapshot()

    def restore(self, snapshot: Arrays) -> None:
        """Make the memory what the snapshot was taken of; writes that were not applied are dropped."""
        self.pending = None
        self.memory.restore(snapshot)

    def report(self) -> dict[str, Any]:
        """The memory's numbers since the last call."""
        return self.memory.report()

    @classmethod
    def of(cls, memories: dict[str, Memory]) -> dict[str, Self]:
        """Each memory in this process, by name."""
        return {name: cls(memory) for name, memory in memories.items()}
