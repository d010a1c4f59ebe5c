"""Approximate search among vectors that come, go and move at every step: cells, each split in two when it is full.

A cell is a list of at most LIMIT vectors and a centre. A vector is put to the cell of the nearest centre; a query looks
through the cells of the PROBES nearest centres. Nothing is ever rebuilt as a whole: a full cell is halved by two-means
(where the tree of paper 001 cuts at a plane), one that is nearly empty is given up, and a vector that moved is put to
its nearest centre anew. What comes of it depends on the calls and their order alone.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]
Floats = NDArray[Any]
LIMIT = 256
"""Vectors a cell."""
LEAST = LIMIT // 16
"""A cell with fewer is given up; neither half of a split has fewer."""
PROBES = 10
"""Cells that a query looks through."""
AROUND = 64
"""Centres that the vectors of a cell are compared with when it was split."""
SWEEPS = 6
"""Of two-means, at most."""
BLOCK = 1 << 18
"""Numbers of an intermediate result that are held at a time: about what stays in a core's cache."""
ALONE = 1 << 18
"""Multiplications of a matrix product up to which OpenBLAS takes one thread."""
GRID = 1 << 22
"""Steps of the grid that centres and queries are rounded to: at least from 0 to the largest centre's norm."""


class Cells:
    """Which vectors lie near each other. A vector is known by its slot.

    Args:
        capacity: slots are below it.
        width: of a vector.
        dtype: of the vectors.
    """

    def __init__(self, capacity: int, width: int, dtype: Any) -> None:
        self.cell = np.empty(capacity, np.int32)
        self.place = np.empty(capacity, np.int16)
        """Of each slot: its cell, and where in the cell's list it stands."""
        self.members = np.empty((0, LIMIT), np.int32)
        """The slots of each cell: the first `count`."""
        self.count = np.empty(0, np.int32)
        self.centre = np.empty((0, width), dtype)
        self.splits = 0
        """Since the start."""

    def candidates(self, queries: Floats) -> Ints:
        """Slots [b, PROBES · LIMIT] at most that are worth a look for queries [b, d]; −1 where a list ends.

        A row depends on its query alone, not on what else is asked with it.
        """
        score = self._scores(queries, *self._rounded())
        probes = min(PROBES, score.shape[1])
        cells = np.argpartition(score, probes - 1, axis=1)[:, :probes]
        found = self.members[cells]
        found[np.arange(LIMIT) >= self.count[cells][:, :, None]] = -1
        return found.reshape(len(queries), probes * LIMIT)

    def add(self, slots: Ints, vectors: Floats) -> None:
        """Take in new slots; `vectors` [capacity, d] are those of all slots."""
        split = sorted(set(self._insert(slots, vectors)))
        if split:
            rounded = self._rounded()
            strayed = np.concatenate([self._strayed(cell, vectors, rounded) for cell in split])
            self.remove(strayed, vectors)
            self._insert(strayed, vectors)

    def move(self, slots: Ints, vectors: Floats) -> None:
        """The vectors of these slots, each once, have changed."""
        if len(slots):
            _, strayed = self._nearest(vectors[slots], self.cell[slots])
            self.remove(slots[strayed], vectors)
            self._insert(slots[strayed], vectors)

    def remove(self, slots: Ints, vectors: Floats) -> None:
        """Forget slots; the last in a cell's list take the places that become free."""
        if not len(slots):
            return
        cell, place = self.cell[slots], self.place[slots]
        self.members[cell, place] = -1
        cells, removed = np.unique(cell, return_counts=True)
        self.count[cells] -= removed.astype(np.int32)
        tail = np.repeat(cells, removed)
        last = self.members[tail, self.count[tail] + np.arange(len(tail)) - np.searchsorted(tail, tail)]
        last = last[last >= 0]
        free = np.flatnonzero(place < self.count[cell])
        free = free[np.argsort(cell[free], kind="stable")]
        self.members[cell[free], place[free]] = last
        self.place[last] = place[free]
        small = cells[(self.count[cells] < LEAST) & (self.count[cells] > 0)]
        if len(small) and self.count.sum() >= LIMIT:
            left = self._listed(small)
            self.count[small] = 0
            self._insert(left, vectors)

    def snapshot(self, size: int) -> dict[str, NDArray[Any]]:
        """All there is; the slots in use are the first `size`."""
        arrays = {"cell": self.cell[:size], "place": self.place[:size], "count": self.count, "centre": self.centre}
        return {name: values.copy() for name, values in arrays.items()} | {"splits": np.array([self.splits])}

    def restore(self, snapshot: dict[str, NDArray[Any]]) -> None:
        """Become what the snapshot was taken of."""
        size = len(snapshot["cell"])
        self.cell[:size], self.place[:size] = snapshot["cell"], snapshot["place"]
        self.count, self.centre = snapshot["count"].copy(), snapshot["centre"].copy()
        self.members = np.full((len(self.count), LIMIT), -1, np.int32)
        self.members[self.cell[:size], self.place[:size]] = np.arange(size)
        self.splits = int(snapshot["splits"][0])

    def _rounded(self) -> tuple[float, Floats, Floats]:
        """A grid's unit, the centres [cells, d] in it times −2, and their squared norms [cells]; inf where empty."""
        largest = float(np.abs(self.centre).max()) * self.centre.shape[1] ** 0.5
        unit = 2.0 ** np.ceil(np.log2(max(largest, 1e-30))) / GRID
        centre = np.rint(self.centre.astype(np.float64) / unit)
        return unit, -2 * centre, np.where(self.count > 0, np.einsum("cd,cd->c", centre, centre), np.inf)

    def _scores(self, vectors: Floats, unit: float, centre: Floats, square: Floats) -> Floats:
        """For each cell a number [m, cells] that orders them by the distance of their centres; inf where empty.

        Both sides are on a grid, so that the product's sums are whole numbers below 2⁵³: exact, the same in any
        order and company. Equal centres tie.
        """
        score = products(np.rint(np.clip(vectors.astype(np.float64) / unit, -2 * GRID, 2 * GRID)), centre)
        score += square
        return score

    def _nearest(self, vectors: Floats, own: Ints | None = None) -> tuple[Ints, NDArray[np.bool_]]:
        """The cell [m] of the nearest centre, and whether it is nearer than the `own` cell's."""
        cell, nearer = np.zeros(len(vectors), np.int64), np.ones(len(vectors), bool)
        rounded = self._rounded()
        for rows in blocks(len(vectors), len(self.count) // 4):
            score = self._scores(vectors[rows], *rounded)
            cell[rows] = score.argmin(1)
            if own is not None:
                nearer[rows] = score.min(1) < np.take_along_axis(score, own[rows, None], 1)[:, 0]
        return cell, nearer

    def _listed(self, cells: Ints) -> Ints:
        """The slots in these cells."""
        return self.members[cells][np.arange(LIMIT) < self.count[cells, None]]

    def _strayed(self, cell: int, vectors: Floats, rounded: tuple[float, Floats, Floats]) -> Ints:
        """Slots of a cell whose centre was moved by a split that are nearer to another of the centres around."""
        slots = self.members[cell, : self.count[cell]]
        score = self._scores(self.centre[cell : cell + 1], *rounded)[0]
        around = np.argpartition(score, min(AROUND, len(score)) - 1)[:AROUND]
        nearest = distances(vectors[slots], self.centre[around]).min(1)
        return slots[nearest < distances(vectors[slots], self.centre[cell : cell + 1])[:, 0]]

    def _insert(self, slots: Ints, vectors: Floats) -> list[int]:
        """Put slots to the nearest centres; the cells that this split, and their other halves."""
        split: list[int] = []
        if len(slots) and not len(self.count):
            self._new(vectors[slots[0]])
        while len(slots):
            cell, _ = self._nearest(vectors[slots])
            order = np.argsort(cell, kind="stable")
            slots, cell = slots[order], cell[order]
            place = self.count[cell] + np.arange(len(cell)) - np.searchsorted(cell, cell)
            fits = place < LIMIT
            self._put(slots[fits], cell[fits], place[fits])
            for full in np.unique(cell[~fits]):
                split += [int(full), self._split(int(full), vectors)]
            slots = slots[~fits]
        return split

    def _put(self, slots: Ints, cell: Ints, place: Ints) -> None:
        self.members[cell, place] = slots
        self.cell[slots], self.place[slots] = cell, place
        np.add.at(self.count, cell, 1)

    def _new(self, centre: Floats) -> int:
        """The number of a cell that has nothing in it."""
        free = np.flatnonzero(self.count == 0)
        if not len(free):
            more = len(self.count) // 16 + 1
            free = np.arange(len(self.count), len(self.count) + more)
            self.members = np.concatenate([self.members, np.full((more, LIMIT), -1, np.int32)])
            self.count = np.concatenate([self.count, np.zeros(more, np.int32)])
            self.centre = np.concatenate([self.centre, np.zeros((more, self.centre.shape[1]), self.centre.dtype)])
        self.centre[free[0]] = centre
        return int(free[0])

    def _split(self, cell: int, vectors: Floats) -> int:
        """Leave about half of a full cell to another, whose number this gives."""
        slots = self.members[cell].copy()
        second = halves(vectors[slots])
        other = self._new(vectors[slots[0]])
        for c, mine in ((cell, slots[~second]), (other, slots[second])):
            self.count[c] = 0
            self._put(mine, np.full(len(mine), c), np.arange(len(mine)))
            self.centre[c] = vectors[mine].mean(0)
        self.splits += 1
        return other


def halves(vectors: Floats) -> NDArray[np.bool_]:
    """Which of the vectors [m, d] make up the second of two groups of LEAST at least: two-means, from the median of
    the coordinate that varies most. Equal vectors are shared out by their order."""
    widest = vectors[:, vectors.var(0).argmax()]
    second = np.zeros(len(vectors), bool)
    second[np.argsort(widest, kind="stable")[len(vectors) // 2 :]] = True
    for _ in range(SWEEPS):
        a, b = vectors[~second].mean(0), vectors[second].mean(0)
        again = np.einsum("md,d->m", vectors, b - a) > ((a + b) * (b - a)).sum() / 2
        if not LEAST <= again.sum() <= len(vectors) - LEAST or (again == second).all():
            break
        second = again
    return second


def products(a: Floats, b: Floats) -> Floats:
    """Inner products [m, n] of a [m, d] and b [n, d], in pieces that BLAS leaves to one thread.

    Products as thin as these gain little from more, and lose much where other programs share the cores: threads then
    wait for each other at each (measured: ten times slower).
    """
    found = np.empty((len(a), len(b)))
    side = max(int((ALONE / max(a.shape[1], 1)) ** 0.5), 1)
    for i in range(0, len(a), side):
        for j in range(0, len(b), side):
            np.matmul(a[i : i + side], b[j : j + side].T, out=found[i : i + side, j : j + side])
    return found


def distances(queries: Floats, vectors: Floats, slots: Ints | None = None) -> Floats:
    """Squared distances [b, m] of queries [b, d] to all vectors [m, d], or to those of slots [b, m], −1: inf.

    By differences: nothing cancels, and an entry depends on its two vectors alone, to the bit.
    """
    count = len(vectors) if slots is None else slots.shape[1]
    found = np.empty((len(queries), count), vectors.dtype)
    for rows in blocks(len(queries), count * vectors.shape[1]):
        near = vectors if slots is None else np.take(vectors, slots[rows], axis=0, mode="clip")
        difference = near - queries[rows, None]
        np.einsum("bmd,bmd->bm", difference, difference, out=found[rows])
    if slots is not None:
        found[slots < 0] = np.inf
    return found


def smallest(distance: Floats, keys: Any, count: int) -> Ints:
    """Columns [b, count] of the smallest of distance [b, m], m ≥ count, in no order; of equal ones those of the
    smallest keys.

    Args:
        keys: gives the keys [r, m] of some of the rows; asked only where equal distances compete.
    """
    columns = np.argpartition(distance, count - 1, axis=1)[:, :count]
    limit = np.take_along_axis(distance, columns, 1).max(1, keepdims=True)
    tied = np.flatnonzero(((distance <= limit).sum(1) > count) & np.isfinite(limit[:, 0]))
    if len(tied):
        rows, limit = distance[tied], limit[tied]
        key = np.where(rows == limit, keys(tied), np.iinfo(np.int64).max)
        key[rows < limit] = np.iinfo(np.int64).min
        columns[tied] = np.argpartition(key, count - 1, axis=1)[:, :count]
    return columns


def blocks(rows: int, each: int) -> list[slice]:
    """`rows` cut up so that a block of them takes about BLOCK numbers, `each` a row."""
    step = max(BLOCK // max(each, 1), 1)
    return [slice(i, i + step) for i in range(0, rows, step)]
