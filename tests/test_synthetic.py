"""The planted world: reproducible, its stated oracle error true, its structure there to be learned."""

import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from distmeta.data.schema import Dataset
from distmeta.data.sources.oracle import HIGH, LOW, oracle_error
from distmeta.data.sources.synthetic import generate
from distmeta.errors import UserError
from distmeta.storage import Location

Table = tuple[np.ndarray, np.ndarray, np.ndarray]


PINNED = {
    "c8df79861b376c5c": {},
    "ea6295485f0dea30": {
        "users": 70,
        "items": 40,
        "per_user": (5, 20),
        "seed": 3,
        "noise": 0.7,
        "clusters": 2,
        "factors": 6,
    },
}
"""First digits of `_digest`, as these worlds were before tastes, groups and clicks could be planted."""


def _digest(where: Path) -> str:
    """sha256 of the three tables, numbers in ten thousandths: what no processor's last bit changes."""
    digest = hashlib.sha256()
    for name in ("users", "items", "interactions"):
        table = pl.read_parquet(f"{where}/{name}/*.parquet")
        whole = (pl.col(pl.Float32).cast(pl.Float64) * 1e4).round().cast(pl.Int64)
        digest.update(json.dumps(table.with_columns(whole).to_dict(as_series=False)).encode())
    return digest.hexdigest()


def _content(where: Path) -> dict[str, bytes]:
    return {str(p.relative_to(where)): p.read_bytes() for p in sorted(where.rglob("*")) if p.is_file()}


def _ratings(where: Location) -> Table:
    rows = pl.read_parquet(f"{where}/interactions/*.parquet")
    return rows["user"].to_numpy(), rows["item"].to_numpy(), rows["label"].to_numpy().astype(np.float64)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate(Location.of(tmp_path / name), users=50, items=40, per_user=(5, 20), seed=seed)
    a, b, c = (_content(tmp_path / name) for name in "abc")
    assert a == b
    assert a["interactions/part-00000.parquet"] != c["interactions/part-00000.parquet"]


@pytest.mark.parametrize("digest", list(PINNED))
def test_a_world_without_planted_tastes_is_what_it_always_was(tmp_path: Path, digest: str) -> None:
    given = PINNED[digest]
    dataset = generate(Location.of(tmp_path / "d"), **given)
    assert _digest(tmp_path / "d").startswith(digest)
    known = ["users", "items", "per_user", "seed", "noise", "clusters", "factors"]
    assert list(dataset.extra["arguments"]) == known
    assert [f.name for f in dataset.user_fields] == dataset.extra["content_fields"]["user"] == ["segment", "region"]
    assert "bayes_groups" not in dataset.extra
    assert list(dataset.extra["bayes"]) == ["mae", "mse", "rmse"]


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_oracle_error_agrees_with_quadrature(noise: float) -> None:
    """Against the least error over all constants, by a fine sum over the noise: no formula in common."""
    scores = np.array([-1.0, 0.9, 1.0, 1.3, 3.0, 4.4, 5.0, 5.2, 8.0])
    noises = np.linspace(-9, 9, 18_001)
    weight = np.exp(-(noises**2) / 2)
    weight /= weight.sum()
    mae, mse = oracle_error(scores, noise)
    for k, score in enumerate(scores):
        y = np.clip(score + noise * noises, LOW, HIGH)
        constants = np.append(np.linspace(LOW, HIGH, 401), (weight @ y, np.clip(score, LOW, HIGH)))
        assert mae[k] == pytest.approx(min(weight @ np.abs(y - c) for c in constants), abs=1e-6)
        assert mse[k] == pytest.approx(min(weight @ (y - c) ** 2 for c in constants), abs=1e-6)


def test_stated_error_agrees_with_monte_carlo_over_worlds(tmp_path: Path) -> None:
    """Two worlds that differ in the noise alone reveal the noise-free scores: at σ → 0 the label is clip(s).

    |label − clip(s)| then averages to the stated mae, within four standard errors.
    """
    dataset = generate(Location.of(tmp_path / "noisy"), users=400, items=100, noise=0.4)
    generate(Location.of(tmp_path / "clean"), users=400, items=100, noise=1e-9)
    user, item, label = _ratings(Location.of(tmp_path / "noisy"))
    clean_user, clean_item, score = _ratings(Location.of(tmp_path / "clean"))
    assert np.array_equal(user, clean_user)
    assert np.array_equal(item, clean_item)
    error = np.abs(label - score)
    stated = dataset.extra["bayes"]["mae"]
    assert error.mean() == pytest.approx(stated, abs=4 * error.std() / np.sqrt(len(error)))
    assert stated < 0.4 * np.sqrt(2 / np.pi)  # clipping takes some of the noise away


def test_fields_and_ratings_tell_of_what_is_planted(tmp_path: Path) -> None:
    """A bias model beats a constant, and the affinity that it cannot see leaves it well above the oracle."""
    where = Location.of(tmp_path / "d")
    dataset = generate(where)
    user, item, label = _ratings(where)
    train = np.arange(len(label)) % 5 > 0
    mean = label[train].mean()

    def offset(index: np.ndarray, residual: np.ndarray) -> np.ndarray:
        n = np.bincount(index[train], minlength=index.max() + 1)
        return (np.bincount(index[train], residual[train], len(n)) / (n + 3))[index]

    residual = label - mean
    constant = np.abs(residual[~train]).mean()
    residual = residual - offset(item, residual)
    bias_residual = residual - offset(user, residual)
    bias = np.abs(bias_residual[~train]).mean()
    assert bias < 0.85 * constant
    assert bias > 1.3 * dataset.extra["bayes"]["mae"]

    # Ridge on products of user and item fields explains part of what bias leaves: fields are worth reading.
    users, items = (pl.read_parquet(f"{where}/{side}/*.parquet") for side in ("users", "items"))
    of_user = np.hstack([np.eye(10)[users[f]] for f in ("segment", "region")])
    of_item = np.eye(10)[items["category"]]
    tags = np.stack([np.bincount(t, minlength=13) / max(len(t), 1) for t in items["tags"].to_list()])
    of_item = np.hstack([of_item, tags])
    x = (of_user[user][:, :, None] * of_item[item][:, None, :]).reshape(len(user), -1)
    gram = x[train].T @ x[train] + 5 * np.eye(x.shape[1])
    predicted = x @ np.linalg.solve(gram, x[train].T @ bias_residual[train])
    with_fields = np.abs((bias_residual - predicted)[~train]).mean()
    assert with_fields < 0.95 * bias


def test_users_stay_within_the_asked_number_of_ratings_and_rate_an_item_once(tmp_path: Path) -> None:
    where = Location.of(tmp_path / "d")
    generate(where, users=300, items=30, per_user=(2, 30))
    user, item, label = _ratings(where)
    counts = np.bincount(user)
    assert (counts.min(), counts.max()) == (2, 30)
    assert len(np.unique(user * 30 + item)) == len(user)
    assert label.min() >= LOW
    assert label.max() <= HIGH
    assert Dataset.open(where).interactions == len(user)


@pytest.mark.parametrize(
    ("bad", "flag"),
    [
        ({"users": 0}, "--users"),
        ({"per_user": (20, 400)}, "--per-user"),
        ({"per_user": (9, 8)}, "--per-user"),
        ({"noise": 0.0}, "--noise"),
        ({"clusters": 0}, "--clusters"),
    ],
)
def test_a_world_that_cannot_be_is_refused(tmp_path: Path, bad: dict, flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        generate(Location.of(tmp_path / "d"), **bad)
    assert not (tmp_path / "d").exists()
