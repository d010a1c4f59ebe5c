"""The floors against plain loops over ratings, and their promises: additive, support only, nothing per user
kept."""

from typing import Any

import numpy as np
import pytest
import torch
from floorworld import ITEMS, NEVER_RATED, Ratings, batch, fitted, made, predict, split
from torch import Tensor

from distmeta.data.schema import Dataset, Label
from distmeta.errors import UserError
from distmeta.methods import FLOORS, entry, method_class
from distmeta.methods.base import Method, fit_closed_form
from distmeta.tasks import TaskBatch

DATASET = Dataset("made", Label("rating", 1, 5), (), (), users=40, items=ITEMS, interactions=0)
CLICKS = Dataset("made", Label("click", 0, 1), (), (), users=40, items=ITEMS, interactions=0)
EVERY = pytest.mark.parametrize(
    ("name", "dataset"),
    [pytest.param(n, d, id=f"{d.label.kind}-{n}") for d in (DATASET, CLICKS) for n in FLOORS[d.label.kind]],
)


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
        fit_sweep_0 = vectors.statistics(batch(self.world, {u: [] for u in self.world}), 0)
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
    world = made(14)
    train = batch(*split(world))
    method = fitted(DATASET, name, [train], **({"factors": 2} if name == "als" else {}))
    new = {100: [(2, 5.0), (3, 1.0), (4, 4.5)], 101: []}
    asked = {100: [(7, 0.0), (NEVER_RATED, 0.0)], 101: [(8, 0.0)]}
    found = predict(method, batch(new, asked))
    plain = getattr(Plain(world), name)
    for user, rows in asked.items():
        assert found[user] == pytest.approx([plain(new[user], item) for item, _ in rows], abs=1e-9)


@EVERY
def test_statistics_are_additive(name: str, dataset: Dataset) -> None:
    """Any cut into batches, blocks and support or query, and any number of workers, gives the same method."""
    clicks = dataset is CLICKS
    world = made(clicks=clicks)
    some, rest = ({u: r for u, r in world.items() if (u % 3 == 0) == side} for side in (True, False))
    whole = fitted(dataset, name, [batch(*split(world))])
    cut = fitted(dataset, name, [batch(*split(some, 0), blocks=3), batch(*split(rest, 7), blocks=1)])

    workers = [method_class(name)(entry(name).options(), dataset, {}) for _ in range(3)]
    shares = [[batch(*split(some))], [batch(*split(rest))], []]  # the third has no tasks
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

    test = batch(*split(made(9, seed=5, clicks=clicks)))
    for other in (cut, *workers):
        for user, scores in predict(whole, test).items():
            assert predict(other, test)[user] == pytest.approx(scores, abs=1e-9)


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


@EVERY
def test_adaptation_sees_support_only(name: str, dataset: Dataset) -> None:
    method = fitted(dataset, name, [batch(*split(made(clicks=dataset is CLICKS)))])
    least, most = dataset.label.minimum, dataset.label.maximum
    support = {1: [(3, most), (4, most)], 2: [(5, least)]}
    items = [(6, 0.0), (7, 0.0)]
    low = predict(method, batch(support, {1: items, 2: items}))
    high = predict(method, batch(support, {u: [(i, most) for i, _ in items] for u in support}))
    assert low == high
    assert (low[1] != low[2]) == (name in ("bias", "als", "ials"))


@EVERY
def test_no_training_rating_is_said(name: str, dataset: Dataset) -> None:
    with pytest.raises(UserError, match=f"{name}: the split train has no ratings"):
        fitted(dataset, name, [])


def test_als_without_penalty_is_finite() -> None:
    method = fitted(DATASET, "als", [batch(*split(made()))], penalty=0.0)
    for scores in predict(method, batch(*split(made(9, seed=5)))).values():
        assert np.isfinite(scores).all()


def test_als_finds_the_planted_factors() -> None:
    """On a world of two factors and little noise ALS must beat the biases by far."""
    world = made(440)
    train = batch(*split({u: world[u] for u in range(400)}))
    support, query = split({u: world[u] for u in range(400, 440) if len(world[u]) >= 12}, 10)
    errors = {}
    for name, options in {"bias": {}, "als": {"factors": 4, "penalty": 1.0}}.items():
        found = predict(fitted(DATASET, name, [train], **options), batch(support, query))
        errors[name] = np.mean([abs(s - y) for u in query for s, (_, y) in zip(found[u], query[u], strict=True)])
    assert errors["als"] < 0.6 * errors["bias"]
