"""Shared state as a worker reaches it: the memory is in servers, one a shard; every worker talks to all of them."""

import copy
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from distmeta.config import TrainOptions
from distmeta.errors import UserError
from distmeta.exchange import Exchange
from distmeta.memory.base import Arrays, Memory, Shared
from distmeta.methods.base import Method
from distmeta.parallel.state import Server


class Servers:
    """The servers of all shards; these are objects of this process, stateactor.py has those elsewhere."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = servers

    def __len__(self) -> int:
        return len(self.servers)

    def begin(self, method: str, each: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        """Ask every server `method`, given its own arguments, all at once; their answers when they are called for.

        Objects of this process answer before this returns.

        Raises:
            StateError: a server cannot go on with this group of workers; from here or from what is returned.
        """
        answers = [getattr(server, method)(*args) for server, args in zip(self.servers, each, strict=True)]
        return lambda: answers

    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What every server answers, waited for; see `begin`."""
        return self.begin(method, each)()


class Remote(Shared):
    """A memory in servers. All workers make the same writes, flushes and restores in the same order.

    Args:
        name: the memory's. memory: an empty one.
        staleness: steps whose writes a read need not see. With 0 it sees all of the steps before; with s, workers
            that exchange gradients every step see exactly those of the steps before the last s.
    """

    def __init__(self, name: str, memory: Memory, servers: Servers, exchange: Exchange, staleness: int = 0) -> None:
        super().__init__(memory)
        self.name, self.servers, self.exchange, self.staleness = name, servers, exchange, staleness
        self.step = self.generation = 0

    def read(self, request: Arrays) -> Arrays:
        """The memory's answer; the first read after a write hands that over with the request, in one call."""
        writes, self.pending = self.pending, None
        return self._begin(writes, request, None if writes is None else self.step - self.staleness)()

    def write(self, writes: Arrays) -> None:
        """What this step's tasks wrote, once a step and after its reads; handed over with the next step's read."""
        if self.pending is not None:  # no task here read anything
            self._begin(self.pending, None, None)()
        self.pending = writes
        self.step += 1

    def discard(self) -> None:
        """Forget what this step wrote; reads answer as they did in it."""
        if self.pending is not None:
            self.pending = None
            self.step -= 1

    def flush(self) -> None:
        """Have everything that any worker has written so far applied; all workers call it."""
        if self.pending is not None:
            writes, self.pending = self.pending, None
            self._begin(writes, None, self.step)()

    def snapshot(self) -> Arrays:
        """The memory's, everything applied (flush first); of several shards SHARD.KEY."""
        each = self._all("snapshot") if self.generation else [part.snapshot() for part in self._parts()]
        if len(each) == 1:
            return each[0]
        return {f"{shard}.{key}": value for shard, part in enumerate(each) for key, value in part.items()}

    def restore(self, snapshot: Arrays) -> None:
        """Open a new generation in the servers, of what the snapshot was taken of: rank 0's; all workers call it."""
        e, n = self.exchange, len(self.servers)
        e.gather(b"")  # nobody has a call under way in the generation before
        generation = 0
        if e.rank == 0:
            mine = [snapshot] if n == 1 else [_of_shard(snapshot, shard) for shard in range(n)]
            known = self.servers.ask("newest", [(self.name,)] * n)
            generation = max(time.time_ns(), *(g + 1 for g in known))  # also where this node's clock is behind
            opened = [(self.name, generation, e.world, *both) for both in zip(self._parts(), mine, strict=True)]
            self.servers.ask("open", opened)
        self.generation = int(e.gather(b"%d" % generation)[0])
        self.pending, self.step = None, 0

    def report(self) -> dict[str, Any]:
        """The memory's numbers since the last call; of several shards a list of theirs, `shards`."""
        each = self._all("report")
        return each[0] if len(each) == 1 else {"shards": each}

    def _parts(self) -> list[Memory]:
        n = len(self.servers)
        return [copy.deepcopy(self.memory)] if n == 1 else [self.memory.part(shard, n) for shard in range(n)]

    def _all(self, method: str) -> list[Any]:
        return self.servers.ask(method, [(self.name, self.generation)] * len(self.servers))

    def _begin(self, writes: Arrays | None, request: Arrays | None, until: int | None) -> Callable[[], Arrays]:
        """Call all servers (see Server.call); the answer when it is called for, {} without a request."""
        n = len(self.servers)
        routed = [writes] * n if n == 1 or writes is None else self.memory.route(writes, n)
        head = (self.name, self.generation, self.step, self.exchange.rank)
        answers = self.servers.begin("call", [(*head, mine, request, until) for mine in routed])
        combine = self.memory.combine if n > 1 and request is not None else _first
        return functools.cache(lambda: combine(answers()))


class Ahead(Remote):
    """A memory in servers that answers all requests alike: the next answer is fetched while the worker computes.

    At its end a step hands over its writes with the request for the memory after them. That answer is read in the
    next step, or `staleness` steps later, and then its way took place beside a whole step. Every read sees exactly
    the steps before the last `staleness`, whether or not the workers wait for each other: a worker's call leaves when
    its former one was answered, so nothing that a step must not see is in before each worker has that step's answer.
    """

    def __init__(self, name: str, memory: Memory, servers: Servers, exchange: Exchange, staleness: int = 0) -> None:
        super().__init__(name, memory, servers, exchange, staleness)
        self.ahead: deque[Callable[[], Arrays]] = deque(maxlen=staleness + 1)
        """Answers asked for: the first is this step's, each later one sees one more step, the last one all. After a
        flush or a restore there is one, which serves until as many as there may be were asked for."""

    def read(self, request: Arrays) -> Arrays:
        """The answer of this step, the same however often."""
        self.advance()
        return self._asked()[0]()

    def write(self, writes: Arrays) -> None:
        """What this step's tasks wrote, once a step and after its reads."""
        self.advance()
        super().write(writes)

    def advance(self) -> None:
        """Hand over what the step wrote, and ask for the memory with that in it; wait for neither."""
        if self.pending is not None:
            self._asked()[-1]()  # servers do not keep the order of calls: one at a time is under way
            writes, self.pending = self.pending, None
            self.ahead.append(self._begin(writes, {}, self.step))

    def flush(self) -> None:
        """Have everything that any worker has written so far applied; all workers call it."""
        self.advance()
        while len(self.ahead) > 1:
            self.ahead.popleft()
        for newest in self.ahead:
            newest()

    def restore(self, snapshot: Arrays) -> None:
        """See Remote.restore; an answer that is under way is of the generation before, and dropped."""
        self.ahead.clear()
        super().restore(snapshot)

    def _asked(self) -> deque[Callable[[], Arrays]]:
        """`ahead`, at least the memory as it stands: no step goes into it without this worker's writes."""
        if not self.ahead:
            self.ahead.append(self._begin(None, {}, None))
        return self.ahead


def _first(answers: Sequence[Arrays]) -> Arrays:
    return answers[0]


def _of_shard(snapshot: Arrays, shard: int) -> Arrays:
    head = f"{shard}."
    return {key.removeprefix(head): value for key, value in snapshot.items() if key.startswith(head)}


def share(method: Method, options: TrainOptions, exchange: Exchange) -> None:
    """Set `method.shared`: empty memories in the exchange's servers, or without any in this process.

    All workers call it. Without servers the outcome is the same: shards and staleness then are of this process.

    Raises:
        UserError: --state-shards of a memory that cannot be spread, --staleness with one that must not be stale.
        ValueError: several workers without servers, or other servers than --state-shards says.
    """
    memories, servers = method.memories(), exchange.servers
    for memory in memories.values():
        if options.staleness and memory.prompt:
            raise UserError(
                f"--staleness {options.staleness}: {memory.prompt} needs what the step itself read; leave it at 0"
            )
    if servers is None or not memories:
        if memories and exchange.world > 1:
            raise ValueError(f"{method.name}: {exchange.world} workers share a state; they need a server of it")
        if options.state_shards == 1 and not options.staleness:
            method.shared = Shared.of(memories)
            return
        servers = Servers([Server(options.exchange_timeout) for _ in range(options.state_shards)])
    if len(servers) != options.state_shards:
        raise ValueError(f"{len(servers)} servers for {options.state_shards} shards of the shared state")
    made = {
        name: (Ahead if memory.alike else Remote)(name, memory, servers, exchange, options.staleness)
        for name, memory in memories.items()
    }
    try:
        for remote in made.values():
            remote.restore(remote.snapshot())
    except NotImplementedError as e:
        raise UserError(f"--state-shards {options.state_shards}: {e}; leave it at 1") from None
    method.shared = dict(made)
