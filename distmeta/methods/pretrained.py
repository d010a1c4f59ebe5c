"""Vectors of users and items by collaborative filtering, which a network may start from: implicit ALS, or BPR.

Both factorise which (user, item) pairs are positives, before and apart from any task (paper 002, §4.1.1; s²Meta, Du et
al., KDD 2019, whose are 128 wide and stay as they are). ALS is that of ials.py, each side solved in turn. BPR (Rendle
et al., UAI 2009) maximises Σ ln σ(w_u · h_i − w_u · h_j) − λ/2 (|w_u|² + |h_i|² + |h_j|²) over positives (u, i) and
items j that u has not taken, by gradient ascent on batches that are hashed together, as the j are.

An item without a positive has the vector 0, which is what few positives come to under ALS as well. A user without any
has the mean of the others', so that items are to it what they are to everybody.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta import draws
from distmeta.data.absent import Taken
from distmeta.data.collate import block_bounds, spans
from distmeta.methods.base import Method
from distmeta.methods.ials import folded
from distmeta.methods.options import Vectors
from distmeta.networks import Embedding

Ints = NDArray[np.int64]

SEED = 0
"""Vectors belong to a data set and a split: they do not depend on a run's seed."""
SWEEPS, ALPHA, PENALTY = 5, 10.0, 100.0
"""Of ALS: times that both sides are solved, what a positive weighs beyond 1, and the ridge penalty."""
EPOCHS, RATE, DECAY, BATCH, START = 30, 0.05, 0.01, 1024, 0.1
"""Of BPR: passes over the positives, step size, λ, positives a step, standard deviation of the vectors at first."""


@dataclass(frozen=True)
class Pairs:
    """Who took what: each pair once, by (user, item); users and items without any are left out."""

    users: Ints
    """Which users these are: ascending."""
    items: Ints
    user: Ints
    """[n]: position in `users`."""
    item: Ints
    """[n]: position in `items`."""

    @classmethod
    def of(cls, user: Ints, item: Ints) -> "Pairs":
        """From users and items by their number, in order."""
        (users, u), (items, i) = np.unique(user, return_inverse=True), np.unique(item, return_inverse=True)
        return cls(users, items, u, i)


Factors = tuple[Tensor, Tensor]
"""Vectors of Pairs.users [m, f] and of Pairs.items [n, f], float64."""

Learning = Iterator[tuple[float, Factors]]
"""How much of the work is done, from 0 to 1, and the vectors so far; often, as somebody waits for a sign of life."""


def als(pairs: Pairs, width: int) -> Learning:
    """SWEEPS sweeps, users solved before items."""
    by_user, by_item = _Lists.of(pairs.user, pairs.item), _Lists.of(pairs.item, pairs.user)
    x, y = torch.zeros(0, width), _normal(len(pairs.items), width, "pretrained/als") / width**0.5
    for sweep in range(SWEEPS):
        for done, x in _solved(by_user, y):
            yield (sweep + done / 2) / SWEEPS, (x, y)
        for done, new in _solved(by_item, x):
            yield (sweep + 0.5 + done / 2) / SWEEPS, (x, new)
            y = new


@dataclass(frozen=True)
class _Lists:
    """The others of each of one side, flat, those with similarly many side by side."""

    order: Ints
    """Which each list is of, by length."""
    start: Ints
    count: Ints
    other: Ints

    @classmethod
    def of(cls, one: Ints, other: Ints) -> "_Lists":
        count = np.bincount(one)
        order = np.argsort(count, kind="stable")
        return cls(order, (np.cumsum(count) - count)[order], count[order], other[np.argsort(one, kind="stable")])

    def blocks(self) -> Iterator[tuple[Ints, Tensor, Tensor]]:
        """Of each block of lists: whose they are [b], the others int64 [b, R], 0 on padding, and the mask [b, R]."""
        for a, b in block_bounds(self.count):
            count = self.count[a:b]
            mask = np.arange(count.max()) < count[:, None]
            index = np.zeros(mask.shape, np.int64)
            index[mask] = self.other[spans(self.start[a:b], count)]
            yield self.order[a:b], torch.from_numpy(index), torch.from_numpy(mask)


def _solved(lists: _Lists, y: Tensor) -> Iterator[tuple[float, Tensor]]:
    """The vectors of one side [n, f] from those of the other [m, f]: how many are there, from 0 to 1, and all."""
    x, gram, done = y.new_zeros(len(lists.order), y.shape[1]), y.T @ y, 0
    for whose, index, mask in lists.blocks():
        weight = mask.to(y)
        x[torch.from_numpy(whose)] = folded(y[index], gram, ALPHA * weight, (1 + ALPHA) * weight, PENALTY)
        done += len(whose)
        yield done / len(x), x


def bpr(pairs: Pairs, width: int) -> Learning:
    """EPOCHS passes; users who took every item teach nothing."""
    w = START * _normal(len(pairs.users), width, "pretrained/bpr users")
    h = START * _normal(len(pairs.items), width, "pretrained/bpr items")
    n = len(pairs.items)
    taken = Taken.of(np.bincount(pairs.user), pairs.item, n + 1)
    usable = np.flatnonzero(taken.count[pairs.user] < n)
    for epoch in range(EPOCHS):
        row = usable[np.argsort(draws.hashed(SEED, epoch, usable, purpose="pretrained/bpr order"), kind="stable")]
        u = draws.uniform(SEED, epoch, row, purpose="pretrained/bpr negative")
        user = pairs.user[row]
        triples = torch.from_numpy(np.stack((user, pairs.item[row], taken.absent(user, np.full(len(row), n), u))))
        for user_, item, other in (t.unbind() for t in triples.split(BATCH, 1)):
            of_user, of_item, of_other = ascent(w[user_], h[item], h[other])
            w.index_add_(0, user_, of_user, alpha=RATE)
            h.index_add_(0, torch.cat((item, other)), torch.cat((of_item, of_other)), alpha=RATE)
        yield (epoch + 1) / EPOCHS, (w, h)


def ascent(w: Tensor, h: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of BPR's objective by w_u, h_i and h_j, [n, f] each, of n triples of these vectors."""
    g = torch.sigmoid(-(w * (h - other)).sum(1, keepdim=True))
    return g * (h - other) - DECAY * w, g * w - DECAY * h, -g * w - DECAY * other


LEARN: dict[str, Callable[[Pairs, int], Learning]] = {"als": als, "bpr": bpr}


def learn(kind: str, user: Ints, item: Ints, into: tuple[Tensor, Tensor]) -> Iterator[str]:
    """Fill tables `into` (users [U, f], items [I, f]) by LEARN[kind] from one positive or more, each once, by (user,
    item); yields what there is to say meanwhile.

    Each table's numbers are scaled to a mean square of 1 over the rows that were learned.
    """
    pairs = Pairs.of(user, item)
    about = f"{kind} vectors of {len(pairs.users):,} users and {len(pairs.items):,} items from {len(user):,} positives"
    found: Factors = into
    for done, vectors in LEARN[kind](pairs, into[0].shape[1]):
        found = vectors
        yield f"{about}: {done:.0%}"
    for table, rows, vectors in zip(into, (pairs.users, pairs.items), found, strict=True):
        scaled = vectors / vectors.square().mean().sqrt().clamp(min=1e-12)
        table.zero_()
        if table is into[0]:
            table += scaled.mean(0).to(table)
        table[torch.from_numpy(rows)] = scaled.to(table)


class WithVectors(Method):
    """A method whose `embedding` may have vectors of users and items that are learned before training, as its
    options say."""

    embedding: Embedding

    @staticmethod
    def vector_width(options: Vectors) -> int:
        """Width of the vectors; 0 where there are none."""
        return options.pretrained_width if options.pretrained != "none" else 0

    def expect_vectors(self) -> None:
        """Have `prepare` called where there are vectors; called once, after `embedding` is there."""
        self.prepares = bool(self._vectors())
        for table in self._vectors():
            table.requires_grad_(not self.options.pretrained_frozen)

    def _vectors(self) -> list[Tensor]:
        """The tables of users and of items."""
        e = self.embedding
        return [t.weight for t in (e.user_vectors, e.item_vectors) if t is not None]

    def prepare(self, user: Ints, item: Ints) -> Iterator[str]:
        users, items = self._vectors()
        return learn(self.options.pretrained, user, item, (users, items))


def _normal(n: int, width: int, purpose: str) -> Tensor:
    return torch.from_numpy(draws.normal(SEED, np.arange(n)[:, None], np.arange(width), purpose=purpose))
