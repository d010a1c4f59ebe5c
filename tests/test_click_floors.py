"""ItemPop and implicit ALS against plain and dense numpy in float64; what they make of a world that they can learn."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from floorworld import ITEMS, NEVER_RATED, Ratings, batch, fitted, made, predict, split
from scipy.optimize import minimize

from distmeta import draws
from distmeta.data.schema import Dataset, Label
from distmeta.errors import UserError
from distmeta.methods import entry, method_class
from distmeta.methods.ials import FOLDS, IALS, ONE_IN_USERS
from distmeta.methods.logistic import fit_logistic

CLICKS = Dataset("made", Label("click", 0, 1), (), (), users=40, items=ITEMS, interactions=0)
ALPHA, SHOWN, PENALTY, SHRINK = 7.0, 2.0, 3.0, 5.0
OPTIONS: dict[str, Any] = {"factors": 3, "alpha": ALPHA, "alpha_shown": SHOWN, "penalty": PENALTY, "passes": 4}


def logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(a, b) of the penalised logistic regression that `fit_logistic` promises, by a general optimiser."""
    mean, spread = x.mean(0), x.std(0)
    z = np.c_[np.ones(len(x)), (x - mean) / np.where(spread > 0, spread, 1)]
    rate = (y.sum() + 0.5) / (len(y) + 1)
    prior = np.r_[math.log(rate / (1 - rate)), np.ones(x.shape[1])]

    def loss(w: np.ndarray) -> float:
        return float((np.logaddexp(0, z @ w) - y * (z @ w)).sum() + ((w - prior) ** 2).sum() / 2)

    w = minimize(loss, prior, tol=1e-12).x
    b = w[1:] / np.where(spread > 0, spread, 1)
    return np.r_[w[0] - b @ mean, b]


def sigmoid(s: float) -> float:
    return 1 / (1 + math.exp(-s))


@pytest.mark.parametrize("parted", [False, True])
def test_logistic_regression_of_counts(parted: bool) -> None:
    """Counted observations are as many single ones; classes that x parts leave it finite."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(12, 2)) * [1.0, 20.0]
    count = rng.integers(0, 6, 12)
    clicks = count * (x[:, 0] > 0) if parted else rng.binomial(count, 0.3)
    rows = np.concatenate([np.repeat(x, clicks, 0), np.repeat(x, count - clicks, 0)])
    labels = np.r_[np.ones(clicks.sum()), np.zeros((count - clicks).sum())]
    found = fit_logistic(*(torch.from_numpy(v).double() for v in (x, clicks, count)))
    assert found.numpy() == pytest.approx(logistic(rows, labels), rel=1e-4, abs=1e-5)


def test_without_an_observation_more_is_likelier() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    assert fit_logistic(nothing.reshape(0, 3), nothing, nothing).tolist() == [0.0, 1.0, 1.0, 1.0]


def test_itempop_is_the_clicks_on_the_item_by_the_others() -> None:
    world = made(14, clicks=True)
    rows = [(i, y) for rated in world.values() for i, y in rated]
    clicks = {i: sum(y for j, y in rows if j == i) for i in range(ITEMS)}
    x = np.array([[math.log(1 + clicks[i] - y)] for i, y in rows])
    a, b = logistic(x, np.array([y for _, y in rows]))
    found = predict(fitted(CLICKS, "itempop", [batch(*split(world))]), batch({9: []}, {9: [(i, 0.0) for i in clicks]}))
    assert found[9] == pytest.approx([sigmoid(a + b * math.log(1 + c)) for c in clicks.values()], abs=1e-6)
    assert clicks[NEVER_RATED] == 0


class Dense:
    """Implicit ALS by the equations of the paper, with P and C written out for all pairs."""

    def __init__(self, world: dict[int, Ratings]) -> None:
        labels = [y for rated in world.values() for _, y in rated]
        self.mean = sum(labels) / len(labels)
        apart = {u for u in world if int(draws.hashed(0, u, purpose="ials/users")) % ONE_IN_USERS == 0}
        learned = {u: rated for u, rated in world.items() if u not in apart}
        assert len(apart) > 2
        rows = [(i, y) for rated in learned.values() for i, y in rated]
        self.rate = [self.log_odds([y for j, y in rows if j == i]) for i in range(ITEMS)]
        self.y = draws.normal(0, np.arange(ITEMS)[:, None], np.arange(3), purpose="ials/items") / math.sqrt(3)
        self.y[[i for i in range(ITEMS) if not any(y for j, y in rows if j == i)]] = 0
        sides = [self.pairs(rated) for rated in learned.values()]
        p, c = (np.stack(side) for side in zip(*sides, strict=True))
        for _ in range(4):
            x = np.array([self.solve(self.y, *side) for side in zip(p, c, strict=True)])
            self.y = np.array([self.solve(x, *side) for side in zip(p.T, c.T, strict=True)])
        z, labels = [], []
        for u in apart:
            fold = {i: int(draws.hashed(0, u, i, purpose="ials/rows")) % FOLDS for i, _ in world[u]}
            for item, label in world[u]:
                z.append(self.z([(i, y) for i, y in world[u] if fold[i] != fold[item]], item))
                labels.append(label)
        self.link = logistic(np.array(z), np.array(labels))

    def log_odds(self, labels: list[float]) -> float:
        rate = (sum(labels) + SHRINK * self.mean) / (len(labels) + SHRINK)
        return math.log(rate / (1 - rate))

    def pairs(self, rated: Ratings) -> tuple[np.ndarray, np.ndarray]:
        p, c = np.zeros(ITEMS), np.ones(ITEMS)
        for i, y in rated:
            p[i], c[i] = y, 1 + (ALPHA if y else SHOWN)
        return p, c

    def solve(self, other: np.ndarray, p: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.linalg.inv(other.T @ np.diag(c) @ other + PENALTY * np.eye(3)) @ other.T @ np.diag(c) @ p

    def user(self, support: Ratings) -> np.ndarray:
        return self.solve(self.y, *self.pairs(support))

    def z(self, support: Ratings, item: int) -> np.ndarray:
        return np.array([self.user(support) @ self.y[item], self.rate[item], self.log_odds([y for _, y in support])])


def test_ials_is_what_dense_matrices_give() -> None:
    world = made(60, clicks=True)
    method, dense = fitted(CLICKS, "ials", [batch(*split(world))], **OPTIONS), Dense(world)
    assert isinstance(method, IALS)
    assert method.vectors.numpy() == pytest.approx(dense.y, abs=1e-9)
    assert not method.vectors[NEVER_RATED].any()
    new: dict[int, Ratings] = {100: [(2, 1.0), (3, 0.0), (4, 1.0)], 101: [], 102: [(5, 0.0)]}
    asked: dict[int, Ratings] = {u: [(7, 0.0), (NEVER_RATED, 0.0), (8, 0.0)] for u in new}
    folded = batch(new, asked, blocks=1)
    ((users, _),) = method.adapt(folded)
    assert users.numpy() == pytest.approx(np.array([dense.user(s) for s in new.values()]), abs=1e-9)
    found = predict(method, folded)
    for user, rows in asked.items():
        z = [dense.z(new[user], item) for item, _ in rows]
        # a and b are fitted on means of bins instead of single rows
        assert found[user] == pytest.approx([sigmoid(dense.link[0] + dense.link[1:] @ v) for v in z], abs=2e-3)


def test_both_learn_and_are_calibrated() -> None:
    """On 1,500 users: below the constant's log loss, ials below itempop, and as many clicks as they predict."""
    world = made(1500, clicks=True)
    train = batch(*split({u: world[u] for u in range(1200)}))
    support, query = split({u: world[u] for u in range(1200, 1500) if len(world[u]) >= 10}, 8)
    loss = {}
    for name in ("constant", "itempop", "ials"):
        found = predict(fitted(CLICKS, name, [train]), batch(support, query))
        p = np.array([s for u in query for s in found[u]])
        y = np.array([label for u in query for _, label in query[u]])
        assert ((p > 0) & (p < 1)).all()
        assert p.mean() == pytest.approx(y.mean(), abs=0.04)
        loss[name] = float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())
    assert loss["itempop"] < 0.95 * loss["constant"]
    assert loss["ials"] < 0.9 * loss["itempop"]


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("name", ["itempop", "ials"])
def test_labels_that_are_all_alike_are_answered(name: str, label: float) -> None:
    world = {u: [(i, label) for i, _ in rated] for u, rated in made(30).items()}
    for scores in predict(fitted(CLICKS, name, [batch(*split(world))]), batch(*split(world))).values():
        assert np.abs(np.array(scores) - label).max() < 0.5


@pytest.mark.parametrize("name", ["itempop", "ials"])
def test_ratings_are_refused(name: str) -> None:
    ratings = Dataset("stars", Label("rating", 1, 5), (), (), users=2, items=ITEMS, interactions=0)
    with pytest.raises(UserError, match=f"stars: {name} counts clicks and the labels are ratings; take bias or als"):
        method_class(name)(entry(name).options(), ratings, {})
