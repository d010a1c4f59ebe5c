"""The floors against plain loops over ratings, and their promises: additive, support only, nothing per user
kept."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distmeta.data.schema import Dataset, Label
from distmeta.errors import UserError
from distmeta.methods import FLOORS, entry, method_class
from distmeta.methods.base import Method, fit_closed_form
from distmeta.tasks import Rows, TaskBatch, TaskBlock

ITEMS = 30
NEVER_RATED = 29
DATASET = Dataset("made", Label("rating", 1, 5), (), (), users=40, items=ITEMS, interactions=0)
Ratings = list[tuple[int, float]]
"""(item, label) of one user."""


def _world(users: int = 40, seed: int = 0) -> dict[int, Ratings]:
    rng = np.random.default_rng(seed)
    taste, kind = rng.normal(size=(users, 2)), rng.normal(size=(ITEMS, 2))
    offset = rng.normal(size=ITEMS)
    ratings = {}
    for u in range(users):
        items = rng.permutation(ITEMS - 1)[: rng.integers(4, 20)]
        score = 3 + offset[items] + taste[u] @ kind[items].T + 0.3 * rng.normal(size=len(items))
        ratings[u] = [(int(i), float(np.float32(s))) for i, s in zip(items, score, strict=True)]
    return ratings


def _rows(ratings: list[Ratings], where: dict[int, int]) -> Rows:
    width = max((len(r) for r in ratings), default=0) + 2
    side = Rows(
        torch.zeros(len(ratings), width, dtype=torch.int64),
        torch.full((len(ratings), width), 77.0),  # must not be looked at
        torch.zeros(len(ratings), width, dtype=torch.bool),
    )
    for t, rated in enumerate(ratings):
        for r, (item, label) in enumerate(rated):
            side.item[t, r], side.label[t, r], side.mask[t, r] = where[item], label, True
    return side


def _batch(support: dict[int, Ratings], query: dict[int, Ratings], blocks: int = 2) -> TaskBatch:
    items = sorted({i for side in (support, query) for rated in side.values() for i, _ in rated} | {0})[::-1]
    where = {item: place for place, item in enumerate(items)}
    tasks = sorted(support)
    made = []
    for part in (tasks[b::blocks] for b in range(blocks)):
        sides = [_rows([side[t] for t in part], where) for side in (support, query)]
        made.append(TaskBlock(torch.tensor(part, dtype=torch.int64), {}, *sides))
    return TaskBatch(torch.tensor(items), tuple(made))


def _split(world: dict[int, Ratings], at: int = 3) -> tuple[dict[int, Ratings], dict[int, Ratings]]:
    return {u: r[:at] for u, r in world.items()}, {u: r[at:] for u, r in world.items()}


def _fitted(name: str, batches: list[TaskBatch], **options: Any) -> Method:
    method = method_class(name)(entry(name).options(**options), DATASET, {})
    fit_closed_form(method, lambda sweep: batches)
    return method


def _predict(method: Method, batch: TaskBatch) -> dict[int, list[float]]:
    scores: dict[int, list[float]] = {}
    for block, score in zip(batch, method.predict(method.adapt(batch), batch), strict=True):
        for t, row, mask in zip(block.task.tolist(), score, block.query.mask, strict=True):
            scores[t] = row[mask].tolist()
    return scores


class Plain:
    """The floors again, by loops over ratings and users' parameters that are kept."""

    def __init__(self, world: dict[int, Ratings]) -> None:
        self.world = world
        self.triples = [(u, i, y) for u, rated in world.items() for i, y in rated]
        self.mean = sum(y for *_, y in self.triples) / len(self.triples)

    def constant(self, support: Ratings, item: int) -> float:
        return self.mean

    def itemmean(self, support: Ratings, item: int) -> float:
        labels = [y for _, i, y in self.triples if i == item]
        return (sum(labels) + 5 * self.mean) / (len(labels) + 5)

    def bias(self, support: Ratings, item: int) -> float:
        b_u, b_i = dict.fromkeys(self.world, 0.0), dict.fromkeys(range(ITEMS), 0.0)
        for _ in range(6):
            for i in b_i:
                left = [y - self.mean - b_u[u] for u, j, y in self.triples if j == i]
                b_i[i] = sum(left) / (len(left) + 5)
            for u, rated in self.world.items():
                b_u[u] = sum(y - self.mean - b_i[i] for i, y in rated) / (len(rated) + 5)
        mine = sum(y - self.mean - b_i[i] for i, y in support) / (len(support) + 4)
        return self.mean + b_i[item] + mine

    def als(self, support: Ratings, item: int) -> float:
        vectors = method_class("als")(entry("als").options(factors=2), DATASET, {})
        fit_sweep_0 = vectors.statistics(_batch(self.world, {u: [] for u in self.world}), 0)
        vectors.solve({k: v.to_dense() for k, v in fit_sweep_0.items()}, 0)  # the same start
        z: np.ndarray = vectors.get_buffer("vectors").numpy().copy()

        def ridge(pairs: list[tuple[np.ndarray, float]]) -> np.ndarray:
            """Least squares with the penalty as extra rows, for (other side's vector, label) pairs."""
            a = np.array([[1.0, *v[1:]] for v, _ in pairs]).reshape(-1, 3)
            t = np.array([y - self.mean - v[0] for v, y in pairs])
            return np.linalg.lstsq(np.vstack([a, np.sqrt(8) * np.eye(3)]), np.r_[t, np.zeros(3)], rcond=None)[0]

        for _ in range(12):
            users = {u: ridge([(z[i], y) for i, y in rated]) for u, rated in self.world.items()}
            z = np.array([ridge([(users[u], y) for u, j, y in self.triples if j == i]) for i in range(ITEMS)])
        mine = ridge([(z[i], y) for i, y in support])
        return self.mean + mine[0] + z[item, 0] + mine[1:] @ z[item, 1:]


@pytest.mark.parametrize("name", FLOORS["rating"])
def test_floor_is_what_plain_loops_give(name: str) -> None:
    world = _world(14)
    train = _batch(*_split(world))
    method = _fitted(name, [train], **({"factors": 2} if name == "als" else {}))
    new = {100: [(2, 5.0), (3, 1.0), (4, 4.5)], 101: []}
    asked = {100: [(7, 0.0), (NEVER_RATED, 0.0)], 101: [(8, 0.0)]}
    found = _predict(method, _batch(new, asked))
    plain = getattr(Plain(world), name)
    for user, rows in asked.items():
        assert found[user] == pytest.approx([plain(new[user], item) for item, _ in rows], abs=1e-9)


@pytest.mark.parametrize("name", FLOORS["rating"])
def test_statistics_are_additive(name: str) -> None:
    """Any cut into batches, blocks and support or query, and any number of workers, gives the same method."""
    world = _world()
    some, rest = ({u: r for u, r in world.items() if (u % 3 == 0) == side} for side in (True, False))
    whole = _fitted(name, [_batch(*_split(world))])
    cut = _fitted(name, [_batch(*_split(some, 0), blocks=3), _batch(*_split(rest, 7), blocks=1)])

    workers = [method_class(name)(entry(name).options(), DATASET, {}) for _ in range(3)]
    shares = [[_batch(*_split(some))], [_batch(*_split(rest))], []]  # the third has no tasks
    sums: dict[int, dict[str, Tensor]] = {}
    for sweep in range(workers[0].sweeps):  # in lock step, as workers that all-reduce are
        parts = []
        for worker, share in zip(workers, shares, strict=True):
            worker_sweep = _OneSweep(worker, sweep)
            fit_closed_form(worker_sweep, lambda _, share=share: share)  # type: ignore[arg-type]
            parts.append(worker_sweep.total)
        sums[sweep] = {k: torch.stack([p[k] for p in parts]).sum(0) for k in parts[0]}
        for worker in workers:
            worker.solve(sums[sweep], sweep)

    test = _batch(*_split(_world(9, seed=5)))
    for other in (cut, *workers):
        for user, scores in _predict(whole, test).items():
            assert _predict(other, test)[user] == pytest.approx(scores, abs=1e-9)


class _OneSweep:
    """A method that only sums, for one sweep, and remembers the sums instead of solving."""

    sweeps = 1

    def __init__(self, method: Method, sweep: int) -> None:
        self.method, self.sweep, self.total = method, sweep, {}

    def buffers(self) -> Any:
        return self.method.buffers()

    def statistics(self, batch: TaskBatch, sweep: int) -> dict[str, Tensor]:
        return self.method.statistics(batch, self.sweep)

    def solve(self, statistics: dict[str, Tensor], sweep: int) -> None:
        self.total = statistics


@pytest.mark.parametrize("name", FLOORS["rating"])
def test_adaptation_sees_support_only(name: str) -> None:
    method = _fitted(name, [_batch(*_split(_world()))])
    support = {1: [(3, 5.0), (4, 5.0)], 2: [(5, 1.0)]}
    items = [(6, 0.0), (7, 0.0)]
    low = _predict(method, _batch(support, {1: items, 2: items}))
    high = _predict(method, _batch(support, {u: [(i, 5.0) for i, _ in items] for u in support}))
    assert low == high
    assert (low[1] != low[2]) == (name in ("bias", "als"))


@pytest.mark.parametrize("name", FLOORS["rating"])
def test_no_training_rating_is_said(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: the split train has no ratings"):
        _fitted(name, [])


def test_als_without_penalty_is_finite() -> None:
    method = _fitted("als", [_batch(*_split(_world()))], penalty=0.0)
    for scores in _predict(method, _batch(*_split(_world(9, seed=5)))).values():
        assert np.isfinite(scores).all()


def test_als_finds_the_planted_factors() -> None:
    """On a world of two factors and little noise ALS must beat the biases by far."""
    world = _world(440)
    train = _batch(*_split({u: world[u] for u in range(400)}))
    support, query = _split({u: world[u] for u in range(400, 440) if len(world[u]) >= 12}, 10)
    errors = {}
    for name, options in {"bias": {}, "als": {"factors": 4, "penalty": 1.0}}.items():
        found = _predict(_fitted(name, [train], **options), _batch(support, query))
        errors[name] = np.mean([abs(s - y) for u in query for s, (_, y) in zip(found[u], query[u], strict=True)])
    assert errors["als"] < 0.6 * errors["bias"]
