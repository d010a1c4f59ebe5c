"""The neighbour index of AT-PAML (paper 001, Algorithm 2): users' embeddings and step sizes, and who is near whom.

Nodes are keyed by user, and nobody finds themselves. A step searches what the steps before it left; then, in this
order, the nodes found take a plain gradient step, the step's users are stored or updated in place, and the least
recently used nodes leave ("recently" as in Algorithm 2; the paper's text says "frequently").
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distmeta import draws
from distmeta.errors import RunError, UserError
from distmeta.memory.base import Arrays, Memory
from distmeta.memory.search import LIMIT, PROBES, Cells, blocks, distances, smallest
from distmeta.memory.slots import Slots

Ints = NDArray[Any]
Floats = NDArray[Any]
LOOKS = 8
"""A gradient step moves a node a little: one in so many is checked for whether another cell is nearer by now."""
BINS = 32
"""Of the histogram of ages: 0, 1, 2–3, 4–7, …"""


class NotFinite(RunError, ValueError):
    """A number that came in, or that a gradient step led to, is not finite; nothing was changed."""


class Neighbours(Memory):
    """Nodes: a user's key, embedding and step size, and when it was last used.

    A read {"key": int64 [b], "vector": [b, d]} is answered with each one's K nearest nodes by (squared distance,
    key): {"key": int64 [b, K], "vector": [b, K, d], "rate": [b, K], "distance": [b, K], "age": int64 [b, K] merges
    since the node was used or stored, "nodes": int64 [1] how many there are}. Where there are fewer than K, key and
    age are −1 and distance is inf.

    A write is {"task": int64 [b], "key": int64 [b], "vector": [b, d], "rate": [b], "used": int64 [b, K] the keys
    read, −1: none, "vector_grad": [b, K, d], "rate_grad": [b, K]}: gradients of the sum of the tasks' losses, which
    are divided by the number of tasks of the step. Of two stores of a key in a step, that of the larger task id
    stays. A used key that has left is passed over. A node counts as used when it is in a write's `used`.

    Numbers stay in the dtype of the first write.

    Args:
        capacity: nodes at most.
        nearest: K.
        lr: β, of the gradient steps on nodes.
        exact: compare each query with every node; otherwise memory/search.py finds some that are near.

    Raises:
        UserError: the capacity is less than K.
    """

    def __init__(self, capacity: int, nearest: int, lr: float, exact: bool = False) -> None:
        if capacity < nearest:
            raise UserError(f"--capacity {capacity} is less than --nearest {nearest}: raise the one or lower the other")
        self.capacity, self.nearest, self.lr, self.exact = capacity, nearest, lr, exact
        self._empty(0, np.float32)

    def read(self, request: Arrays) -> Arrays:
        """The nearest nodes of each query.

        Raises:
            NotFinite: a query.
        """
        key, queries = request["key"], request["vector"]
        _check(queries, key, "the embedding that user {} asks with is not finite")
        slots = np.full((len(key), self.nearest), -1)
        distance = np.full(slots.shape, np.inf, self.vector.dtype if self.size else queries.dtype)
        vector = np.zeros((*slots.shape, queries.shape[1]), distance.dtype)
        if self.size:
            own = self.slots.find(key, self.key[: self.size])
            for rows in blocks(len(key), (self.size if self.exact else PROBES * LIMIT) // 16):
                slots[rows], distance[rows] = self._search(queries[rows].astype(vector.dtype), own[rows])
            vector[slots >= 0] = self.vector[slots[slots >= 0]]
        there = slots >= 0
        return {
            "key": np.where(there, self.key[slots], -1),
            "vector": vector,
            "rate": np.where(there, self.rate[slots], 0).astype(vector.dtype),
            "distance": distance,
            "age": np.where(there, self.clock - self.last[slots], -1),
            "nodes": np.array([self.size]),
        }

    def merge(self, writes: Sequence[Arrays]) -> None:
        """Gradient steps, then stores, then evictions.

        Raises:
            NotFinite: a number written, or where a gradient step leads.
        """
        flat = [_flat(w) for w in writes]
        step = {name: np.concatenate([w[name] for w in flat]) for name in flat[0]} if flat else {}
        if not flat or not len(step["key"]) + len(step["used"]):
            self.clock += 1
            return
        _check(step["vector"], step["task"], "the embedding that task {} stores is not finite")
        _check(step["rate"], step["task"], "the step size that task {} stores is not finite")
        _check(step["vector_grad"], step["used_task"], "task {}'s gradient at a stored embedding is not finite")
        _check(step["rate_grad"], step["used_task"], "task {}'s gradient at a stored step size is not finite")
        if not self.size:
            self._empty(step["vector"].shape[1], step["vector"].dtype, self.clock)
        descended = self._descend(step)
        self.clock += 1
        self.last[descended] = self.clock
        self._store(step, descended)

    def snapshot(self) -> Arrays:
        """All there is, nodes in the order of their slots."""
        nodes = {"key": self.key, "vector": self.vector, "rate": self.rate, "last": self.last}
        arrays = {name: values[: self.size].copy() for name, values in nodes.items()}
        counts = {"clock": np.array([self.clock]), "counts": self.counts.copy(), "ages": self.ages.copy()}
        cells = {} if self.exact else self.cells.snapshot(self.size)
        return arrays | counts | {f"cells_{name}": values for name, values in cells.items()}

    def restore(self, snapshot: Arrays) -> None:
        """Become what the snapshot was taken of.

        Raises:
            UserError: it has more nodes than the capacity.
        """
        size, width = snapshot["vector"].shape
        if size > self.capacity:
            raise UserError(f"the checkpoint holds {size} users; --capacity {self.capacity} must be at least that")
        self._empty(width, snapshot["vector"].dtype, int(snapshot["clock"][0]))
        self.size = size
        for name in ("key", "vector", "rate", "last"):
            getattr(self, name)[:size] = snapshot[name]
        self.counts, self.ages = snapshot["counts"].copy(), snapshot["ages"].copy()
        self.slots = Slots(self.key[:size])
        cells = {name.removeprefix("cells_"): a for name, a in snapshot.items() if name.startswith("cells_")}
        if cells and not self.exact:
            self.cells.restore(cells)
        elif not self.exact:
            self.cells.add(np.arange(size), self.vector)

    def report(self) -> dict[str, Any]:
        """Since the last call: stores, evictions, uses (hits) and how long those nodes had not been used, in merges:
        0, 1, 2–3, 4–7, …; rebuilds are cells that were split."""
        stored, evicted, splits = (int(n) for n in self.counts)
        ages = np.trim_zeros(self.ages, "b").tolist()
        found = {"nodes": self.size, "stored": stored, "evicted": evicted, "hits": sum(ages), "age": ages}
        self.counts, self.ages = np.array([0, 0, self.cells.splits]), np.zeros(BINS, np.int64)
        return found | {"rebuilds": self.cells.splits - splits}

    def part(self, number: int, shards: int) -> "Neighbours":
        """See Memory.part.

        Raises:
            UserError: the part's capacity is less than K.
        """
        capacity = self.capacity // shards + (number < self.capacity % shards)
        if capacity < self.nearest:
            raise UserError(
                f"--capacity {self.capacity} over {shards} shards leaves one {capacity} nodes, less than --nearest "
                f"{self.nearest}: raise the capacity or take fewer shards"
            )
        return Neighbours(capacity, self.nearest, self.lr, self.exact)

    def route(self, writes: Arrays, shards: int) -> list[Arrays]:
        """See Memory.route. What is found goes to its owner too; `tasks` tells each how many tasks there were."""
        flat = _flat(writes)
        stored, used = (draws.hashed(flat[n], purpose="shard") % np.uint64(shards) for n in ("key", "used"))
        routed = []
        for shard in range(shards):
            rows = {name: flat[name][stored == shard] for name in ("task", "key", "vector", "rate")}
            rows |= {n: flat[n][used == shard] for n in ("used", "used_task", "vector_grad", "rate_grad")}
            routed.append({**rows, "tasks": flat["tasks"]})
        return routed

    def combine(self, answers: Sequence[Arrays]) -> Arrays:
        """See Memory.combine: the nearest of all."""
        every = {n: np.concatenate([a[n] for a in answers], axis=1) for n in answers[0] if n != "nodes"}
        best = np.lexsort((every["key"], every["distance"]))[:, : self.nearest]
        vector = np.take_along_axis(every.pop("vector"), best[:, :, None], 1)
        found = {name: np.take_along_axis(values, best, 1) for name, values in every.items()}
        return {**found, "vector": vector, "nodes": np.sum([a["nodes"] for a in answers], axis=0)}

    def _empty(self, width: int, dtype: Any, clock: int = 0) -> None:
        """No nodes, of this width. Memory beyond the nodes in use is never touched, so it costs nothing."""
        self.size, self.clock = 0, clock
        try:
            self.key = np.empty(self.capacity, np.int64)
            self.vector = np.empty((self.capacity, width), dtype)
            self.rate = np.empty(self.capacity, dtype)
            self.last = np.empty(self.capacity, np.int32)
            self.cells = Cells(self.capacity, width, dtype)
        except (MemoryError, ValueError):
            raise UserError(f"--capacity {self.capacity}: no memory for so many users; lower it") from None
        self.slots = Slots(self.key[:0])
        self.counts, self.ages = np.zeros(3, np.int64), np.zeros(BINS, np.int64)

    def _search(self, queries: Floats, own: Ints) -> tuple[Ints, Floats]:
        """Slots and squared distances [b, K] of the nearest nodes, in order; −1 and inf where there is none."""
        nodes, k = self.vector[: self.size], self.nearest
        if self.exact:
            slots = np.broadcast_to(np.arange(self.size), (len(queries), self.size))
            distance = distances(queries, nodes)
        else:
            slots = self.cells.candidates(queries)
            distance = distances(queries, nodes, slots)
        distance[slots == own[:, None]] = np.inf
        if (short := k - distance.shape[1]) > 0:
            slots = np.pad(slots, ((0, 0), (0, short)), constant_values=-1)
            distance = np.pad(distance, ((0, 0), (0, short)), constant_values=np.inf)
        columns = smallest(distance, lambda rows: self.key[slots[rows]], k)
        slots, distance = (np.take_along_axis(a, columns, 1) for a in (slots, distance))
        order = np.lexsort((self.key[slots], distance))
        slots, distance = (np.take_along_axis(a, order, 1) for a in (slots, distance))
        return np.where(np.isfinite(distance), slots, -1), distance

    def _descend(self, step: Arrays) -> Ints:
        """The gradient step of the nodes used; their slots. Gradients are added up in task-id order."""
        order = np.lexsort((step["used_task"], step["used"]))
        slots = self.slots.find(step["used"][order], self.key[: self.size])
        order, slots = order[slots >= 0], slots[slots >= 0]
        if not len(slots):
            return slots
        first = np.flatnonzero(np.diff(slots, prepend=-1))
        each, tasks = slots[first], int(step["tasks"].sum())
        moved = {}
        for name in ("vector", "rate"):
            values, gradient = getattr(self, name), np.add.reduceat(step[f"{name}_grad"][order], first)
            with np.errstate(over="ignore", invalid="ignore"):
                moved[name] = values[each] - self.lr * (gradient / tasks).astype(values.dtype)
            _check(moved[name], self.key[each], "the node of user {} leaves the range of numbers; lower --node-lr")
        self.vector[each], self.rate[each] = moved["vector"], moved["rate"]
        self.ages += np.bincount(np.frexp(self.clock - self.last[slots])[1], minlength=BINS)
        return each

    def _store(self, step: Arrays, descended: Ints) -> None:
        """Update known keys, add new ones, and drop the least recently used beyond the capacity."""
        order = np.lexsort((step["task"], step["key"]))
        order = order[np.append(np.diff(step["key"][order]) != 0, True)] if len(order) else order
        key, vector, rate = (step[name][order] for name in ("key", "vector", "rate"))
        slots = self.slots.find(key, self.key[: self.size])
        known = slots >= 0
        self.last[slots[known]] = self.clock
        leaving, stays = self._leaving(key[~known])
        new = np.flatnonzero(~known)[stays]
        slots[new] = np.concatenate([leaving, np.arange(self.size, self.size + len(new) - len(leaving))])
        if not self.exact:
            self.cells.remove(leaving, self.vector)
        for rows in (np.flatnonzero(known), new):  # one that is known may leave at once, for one that is new
            self.vector[slots[rows]], self.rate[slots[rows]] = vector[rows], rate[rows]
        self.key[slots[new]], self.last[slots[new]] = key[new], self.clock
        self.size += len(new) - len(leaving)
        self.slots.put(key[new], slots[new], self.key[: self.size])
        self.counts[:2] += len(key), len(leaving) + (~stays).sum()
        if not self.exact:
            self.cells.add(slots[new], self.vector)
            looked = descended[(descended + self.clock) % LOOKS == 0]
            self.cells.move(np.union1d(slots[known], looked), self.vector)

    def _leaving(self, new: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Slots that must leave for the `new` keys, and which of these stay; by (last use, key)."""
        stays = np.ones(len(new), bool)
        excess = self.size + len(new) - self.capacity
        if excess <= 0:
            return np.empty(0, np.int64), stays
        last = np.append(self.last[: self.size], np.full(len(new), self.clock, np.int32))
        limit = np.partition(last, excess - 1)[excess - 1]
        tied = np.flatnonzero(last == limit)
        held = np.append(self.key[tied[tied < self.size]], new[tied[tied >= self.size] - self.size])
        leaving = np.flatnonzero(last < limit)
        leaving = np.append(leaving, tied[np.argsort(held)[: excess - len(leaving)]])
        stays[leaving[leaving >= self.size] - self.size] = False
        return np.sort(leaving[leaving < self.size]), stays


def _flat(write: Arrays) -> Arrays:
    """A write with a row for each key used instead of K for each task (as `route` leaves it), and its tasks counted."""
    if "tasks" in write:
        return write
    rows, columns = np.nonzero(write["used"] >= 0)
    used = {name: write[name][rows, columns] for name in ("used", "vector_grad", "rate_grad")}
    return {**write, **used, "used_task": write["task"][rows], "tasks": np.array([len(write["task"])])}


def _check(values: Floats, names: Ints, sentence: str) -> None:
    if not np.isfinite(values).all():
        bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
        raise NotFinite(sentence.format(names[bad].min()) + " (the neighbour index is as it was)")
