"""A crowd: users and items of a big made world, who meets whom, and what comes of it (load.py writes it).

Everything is a pure function of (seed, user, place in the user's draws) or (seed, user, item), by counter hashes
(draws.py): a block of users can be made anywhere, at any time, alone.

A user's items are the first n different ones of a sequence of draws from the popularity curve, which is sampling
without replacement in proportion to the weights. That alone would make the popular items less popular than the curve
says (nobody rates one twice), so the weights are first corrected until the expected shares are the curve's.

Chance alone would also bend the curve where items have one interaction or two: sorted by what they got, the lucky ones
come first and many have none. So the log is dealt like a pack: its n-th interaction is one of R equally likely cards,
each dealt once, and only what takes the place of a card that the user already has is drawn freely. The users' activity
is dealt in the same way.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distmeta.data.sources import oracle
from distmeta.data.sources.planted import n_tastes, simplex
from distmeta.data.sources.profiles import PROFILES, Profile
from distmeta.draws import hashed, normal, permuted, uniform

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]

FACTORS = 6
_USER_BIAS, _ITEM_BIAS, _TASTE = 0.35, 0.45, 0.8
"""Standard deviations of b_u, b_i and ⟨p_u, q_i⟩."""
_PERSONAL, _ALIKE = 0.2, 0.25
"""Share of a major user's taste that is personal; how much minor users share, over what major ones do."""
_OF_CATEGORY = 0.7
"""Share of q_i's variance that the category has."""
_TELLS = 0.85
"""How often a field tells minor from major users: those have its rare values."""
_HOME = 0.8
"""How often an interaction takes place in the item's own scenario."""
_CELLS, _LEVELS, _ROUNDS = 400, 64, 40
"""Cells of the popularity curve and levels of activity that the correction knows; its rounds."""
_FREE = 0.5
"""Share of the items, the most popular, that what is drawn freely is among; the others have few interactions."""
_DENSE = 4
"""Who has more than 1/_DENSE of all items would need many draws for the last of them."""
_RACE = 1 << 22
"""Numbers that a race holds at a time."""
BINS, LOWEST, WIDTH = 8192, -5.0, 1 / 512
"""Histogram of noise-free scores, from which the Bayes-optimal error is: its bins, in stars."""


@dataclass(frozen=True)
class Crowd:
    """What determines a world, all of it."""

    profile: str
    users: int
    items: int
    interactions: int
    seed: int
    noise: float
    """Standard deviation of the noise, in stars."""
    clusters: int
    """Preference clusters; at least 1."""
    minor: float
    """Share of the minor users."""
    scenarios: int
    clicks: bool

    @property
    def marginals(self) -> Profile:
        return PROFILES[self.profile]

    @cached_property
    def counts(self) -> Ints:
        """[users]: interactions of each, that sum up to `interactions`; the profile's activity, scaled."""
        least = self.marginals.least
        dealt = permuted(np.arange(self.users), self.users, self.seed, purpose="load activity")
        drawn = self.marginals.counts((dealt + 0.5) / self.users)
        over = np.maximum(drawn - least, 1e-6)
        room = self.items - least
        low, high = 0.0, 1.0
        while np.minimum(over * high, room).sum() < self.interactions - least * self.users and high < 1e15:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            fits = np.floor(np.minimum(over * middle, room)).sum() <= self.interactions - least * self.users
            low, high = (middle, high) if fits else (low, middle)
        exact: Floats = np.minimum(over * low, room)
        counts = np.floor(exact).astype(np.int64)
        return least + _topped_up(counts, exact - counts, room, self.interactions - least * self.users)

    @cached_property
    def first(self) -> Ints:
        """[users]: the interaction of the log that is the first of each."""
        return np.cumsum(self.counts) - self.counts

    @property
    def weights(self) -> tuple[Floats, Floats]:
        """(items, share), both cumulative from 0 to 1: what a draw obeys, so that the outcome obeys the profile."""
        return self._corrected[:2]

    def dense(self, counts: Ints) -> NDArray[np.bool_]:
        """Whether who has so many items is to get them by a race of all items, which is less work than draws."""
        n, draws = self._corrected[2:]
        return (np.interp(counts, n, draws) > self.items) | (counts * _DENSE > self.items)

    @cached_property
    def _corrected(self) -> tuple[Floats, Floats, Floats, Floats]:
        """`weights`, and (n, draws): how many draws n items take."""
        cells = np.unique(np.round(np.geomspace(1, self.items, _CELLS)).astype(np.int64))
        edges = np.concatenate([[0], cells])
        size = np.diff(edges)
        wanted = np.diff(self.marginals.head(edges / self.items)) * self.interactions
        wanted = _spread(wanted, size, self.users)
        levels = np.array_split(np.sort(self.counts), min(_LEVELS, self.users))
        n, people = (np.array([of(part) for part in levels], np.float64) for of in (np.mean, len))
        popular = cells <= max(_FREE * self.items, 1)
        weight, more = wanted / size / self.interactions, np.zeros_like(n)
        for _ in range(_ROUNDS):
            free = np.where(popular, weight, 0) / (weight * size)[popular].sum()
            more, met = _free_draws(n, more, weight, free, size)
            weight = weight * np.clip(wanted / size / np.maximum(people @ met, 1e-300), 0.5, 2)
            weight /= (weight * size).sum()
        share = np.concatenate([[0.0], np.cumsum(weight * size)])
        return edges / self.items, share / share[-1], n, n + more

    @cached_property
    def place(self) -> NDArray[np.int32]:
        """[items]: the item that is k-th in popularity."""
        return np.argsort(hashed(self.seed, np.arange(self.items), purpose="load rank"), kind="stable").astype(np.int32)

    @cached_property
    def category(self) -> NDArray[np.int32]:
        """[items]: 0, 1, …; as many as the profile has, at most."""
        shares = np.cumsum(self.marginals.categories)
        u = uniform(self.seed, np.arange(self.items), purpose="load category")
        return np.minimum(np.searchsorted(shares, u, side="right"), len(shares) - 1).astype(np.int32)

    @cached_property
    def item_bias(self) -> Floats32:
        """[items]: b_i."""
        drawn = normal(self.seed, np.arange(self.items), purpose="load item bias")
        return (_ITEM_BIAS * drawn).astype(np.float32)

    @cached_property
    def item_factors(self) -> Floats32:
        """[items, FACTORS]: q_i, with variance 1: the category's and the item's own."""
        kinds = np.arange(len(self.marginals.categories))
        q = np.empty((self.items, FACTORS), np.float32)
        for f in range(FACTORS):
            of_kind = normal(self.seed, kinds, f, purpose="load category factors")[self.category]
            own = normal(self.seed, np.arange(self.items), f, purpose="load item factors")
            q[:, f] = np.sqrt(_OF_CATEGORY) * of_kind + np.sqrt(1 - _OF_CATEGORY) * own
        return q

    def cluster(self, user: Ints) -> Ints:
        """The preference cluster of each."""
        return (uniform(self.seed, user, purpose="load cluster") * self.clusters).astype(np.int64)

    def few(self, user: Ints) -> NDArray[np.bool_]:
        """Whether each is a minor user."""
        return uniform(self.seed, user, purpose="load minor") < self.minor

    def field(self, name: str, user: Ints) -> Ints:
        """Value 0, 1, … of a user field: the profile's shares, whoever is minor having rare ones more often."""
        few, m = self.few(user), self.minor
        u = uniform(self.seed, user, purpose=f"load field {name}")
        told = uniform(self.seed, user, purpose=f"load field {name} tells") < _TELLS
        u = np.where(told, np.where(few, 1 - m + m * u, (1 - m) * u), u)
        shares = np.cumsum(self.marginals.fields[name][1])
        return np.minimum(np.searchsorted(shares, u, side="right"), len(shares) - 1)

    def factors(self, user: Ints) -> Floats:
        """[n, FACTORS]: p_u, a taste of the cluster's and the group's, and something personal."""
        few = self.few(user)
        tastes = simplex(self.seed, n_tastes(self.clusters, self.minor), FACTORS)
        own = normal(self.seed, user[:, None], np.arange(FACTORS), purpose="load user factors") / np.sqrt(FACTORS)
        shared = np.where(few, _ALIKE, 1.0)[:, None] * (1 - _PERSONAL)
        return _TASTE * (np.sqrt(shared) * tastes[self.cluster(user) + few * self.clusters] + np.sqrt(1 - shared) * own)

    def score(self, users: Ints, row: Ints, item: Ints) -> Floats:
        """s of the pairs (users[row], item), in stars, before any noise."""
        p, q = self.factors(users), self.item_factors[item]
        bias = _USER_BIAS * normal(self.seed, users, purpose="load user bias")
        s = self.marginals.mean + bias[row] + self.item_bias[item]
        for f in range(FACTORS):
            s += p[row, f] * q[:, f]
        return s

    def labels(self, user: Ints, item: Ints, score: Floats) -> Floats32:
        """What was observed: clicks, or ratings on the profile's scale."""
        if self.clicks:
            p = oracle.probability(oracle.click_logit(score, self.noise))
            return (uniform(self.seed, user, item, purpose="load click") < p).astype(np.float32)
        stars = score + self.noise * normal(self.seed, user, item, purpose="load noise")
        low, stretch = self.marginals.scale[0], self.marginals.stretch
        return (low + stretch * (np.clip(stars, oracle.LOW, oracle.HIGH) - oracle.LOW)).astype(np.float32)

    def scenario(self, user: Ints, item: Ints) -> NDArray[np.int32]:
        """Where each took place: mostly the item's own scenario, which goes by its category, else any."""
        home = hashed(self.seed, self.category[item], purpose="load home") % np.uint64(self.scenarios)
        anywhere = (uniform(self.seed, user, item, purpose="load scenario") * self.scenarios).astype(np.int32)
        at_home = uniform(self.seed, user, item, purpose="load at home") < _HOME
        return np.where(at_home, home.astype(np.int32), anywhere)

    def chosen(self, users: Ints, counts: Ints) -> tuple[Ints, Ints]:
        """Who meets which items: (row of `users`, item), by row and in a random order within it."""
        dense = self.dense(counts)
        parts = [self._drawn(users, np.where(dense, 0, counts)), self._raced(users, np.where(dense, counts, 0))]
        row, item = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        shuffle = hashed(self.seed, users[row], item, purpose="load order") >> np.uint64(24)
        order = np.argsort((row.astype(np.uint64) << np.uint64(40)) | shuffle, kind="stable")
        return row[order], item[order]

    def times(self, users: Ints, row: Ints, counts: Ints) -> Ints:
        """Seconds, ascending within each row: spread over a sitting, somewhere in the log's span."""
        p = self.marginals
        start = uniform(self.seed, users, purpose="load start") * (p.span - p.sitting)
        nth = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
        at = (nth + uniform(self.seed, users[row], nth, purpose="load time")) / counts[row]
        return p.first + (start[row] + at * p.sitting).astype(np.int64)

    def _dealt(self, user: Ints, nth: Ints) -> Floats:
        """Where in the weights each user's nth draw is: a card of the pack while there are any, then a free one."""
        items, share = self.weights
        popular = share[np.searchsorted(items, max(_FREE, 1 / self.items), side="right") - 1]
        u = popular * uniform(self.seed, user, nth, purpose="load item")
        mine = nth < self.counts[user]
        card = permuted(self.first[user[mine]] + nth[mine], self.interactions, self.seed, purpose="load card")
        u[mine] = (card + 0.5) / self.interactions
        return u

    def _item(self, u: Floats) -> Ints:
        """The items at these quantiles of the weights."""
        items, share = self.weights
        rank = np.minimum((np.interp(u, share, items) * self.items).astype(np.int64), self.items - 1)
        return self.place[rank].astype(np.int64)

    def _drawn(self, users: Ints, counts: Ints) -> tuple[Ints, Ints]:
        """The first counts[i] different items of each row's draws, a round of draws after the other."""
        row, item, nth = (np.empty(0, np.int64) for _ in range(3))
        used, missing = np.zeros_like(counts), counts
        kept = []
        while True:
            open_rows = np.flatnonzero(missing)
            if not len(open_rows):
                break
            more = missing[open_rows] * 5 // 4 + 1
            r = np.repeat(open_rows, more)
            k = np.arange(len(r)) - np.repeat(np.cumsum(more) - more, more) + used[r]
            new = self._item(self._dealt(users[r], k))
            row, item, nth = (np.concatenate(pair) for pair in ((row, r), (item, new), (nth, k)))
            used[open_rows] += more
            first = np.sort(_firsts(row * self.items + item))
            row, item, nth = row[first], item[first], nth[first]
            found = np.bincount(row, minlength=len(counts))
            done = found >= counts
            kept.append(_firsts_of(row, item, nth, np.where(done, counts, 0)))
            still = ~done[row]
            row, item, nth = row[still], item[still], nth[still]
            missing = np.where(done, 0, counts - found)
            counts = np.where(done, 0, counts)
        return _joined(kept)

    def _raced(self, users: Ints, counts: Ints) -> tuple[Ints, Ints]:
        """The counts[i] items that are first in a race of all (Efraimidis & Spirakis, 2006): the same distribution."""
        rows = np.flatnonzero(counts)
        items, share = self.weights
        rate = np.diff(np.interp(np.arange(self.items + 1) / self.items, items, share))
        kept = []
        for some in np.array_split(rows, max(1, -(-len(rows) * self.items // _RACE))):
            u = uniform(self.seed, users[some][:, None], np.arange(self.items), purpose="load race")
            first = np.argsort(-np.log1p(-u) / np.maximum(rate, 1e-300), axis=1, kind="stable")
            mine = np.arange(self.items) < counts[some][:, None]
            kept.append((np.repeat(some, counts[some]), self.place[first[mine]].astype(np.int64)))
        return _joined(kept)


def _joined(kept: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    none = np.empty(0, np.int64)
    return np.concatenate([none, *(k[0] for k in kept)]), np.concatenate([none, *(k[1] for k in kept)])


def _firsts(key: Ints) -> Ints:
    """Where each different key stands first."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    return order[np.concatenate([[True], ordered[1:] != ordered[:-1]])]


def _firsts_of(row: Ints, item: Ints, nth: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """The counts[r] items of each row r that were drawn first."""
    mine = counts[row] > 0
    row, item, nth = row[mine], item[mine], nth[mine]
    order = np.argsort((row << 32) | nth, kind="stable")
    row, item = row[order], item[order]
    start = np.searchsorted(row, np.arange(len(counts)))
    take = np.arange(len(row)) - start[row] < counts[row]
    return row[take], item[take]


def _topped_up(counts: Ints, left: Floats, room: int, total: int) -> Ints:
    """`counts` with the largest remainders rounded up until the sum is `total`; none over `room`."""
    while (short := total - int(counts.sum())) > 0:
        order = np.argsort(np.where(counts < room, -left, np.inf), kind="stable")[:short]
        counts[order[counts[order] < room]] += 1
    return counts


def _free_draws(n: Floats, more: Floats, weight: Floats, free: Floats, size: Ints) -> tuple[Floats, Floats]:
    """How many free draws after n cards give n items on average, by Newton's method from `more`.

    Args:
        weight, free: [cells] chance of an item of each to be the next card, and the next free draw; `size`: its items.

    Returns:
        [levels] the draws; [levels, cells] chance of an item of each to be met.
    """
    met = np.zeros((len(n), len(size)))
    for _ in range(8):
        met = -np.expm1(-np.outer(n, weight) - np.outer(more, free))
        rate = ((1 - met) * free * size).sum(1)
        more = np.clip(more + (n - met @ size) / np.maximum(rate, 1e-300), 0, np.minimum(4 * more + n, 1e12))
    return more, met


def _spread(wanted: Floats, size: Ints, users: int) -> Floats:
    """`wanted` interactions of each cell, what is more than all users' going to the cells that have room."""
    room = 0.98 * size * users
    for _ in range(100):
        over = np.maximum(wanted - room, 0)
        if over.sum() <= 1e-6 * wanted.sum():
            break
        wanted = wanted - over
        free = wanted * (wanted < room)
        if not free.sum():
            break
        wanted = wanted + over.sum() * free / free.sum()
    return wanted
