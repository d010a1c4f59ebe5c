"""A small planted world: users and items of a few clusters, ratings whose best possible error is known.

s_ui = μ + b_u + b_i + ⟨p_u, q_i⟩ is a user's noise-free score; the rating is clip(s_ui + σ ε, 1, 5) with ε
standard normal. The factors p, q are partly the cluster's and the fields', so that features tell about an
unseen user, and partly personal, so that only ratings do. Every draw is a counter hash (draws.py): the same
seed gives the same dataset.
"""

import math
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta.data.schema import Dataset, FieldType, Label
from distmeta.data.write import clear_place, write_dataset
from distmeta.draws import normal, uniform
from distmeta.errors import UserError
from distmeta.storage import Location

LOW, HIGH = 1.0, 5.0
_MEAN = 3.2
_USER_BIAS, _ITEM_BIAS, _AFFINITY = 0.35, 0.45, 0.65
"""Standard deviations of b_u, b_i and ⟨p_u, q_i⟩."""
_OPEN = 0.7
"""Share of the factors' variance that cluster and fields explain."""
_HONEST = 0.85
"""How often a user's segment and an item's category tell the true cluster."""
_REGIONS, _TAGS = 8, 12
_EPOCH = 1_600_000_000
_USER_FIELDS: dict[str, FieldType] = {"segment": "categorical", "region": "categorical"}
_ITEM_FIELDS: dict[str, FieldType] = {
    "category": "categorical",
    "tags": "multi_categorical",
    "quality": "numeric",
}

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def generate(
    where: Location,
    *,
    users: int = 600,
    items: int = 300,
    per_user: tuple[int, int] = (20, 60),
    seed: int = 0,
    noise: float = 0.4,
    clusters: int = 4,
    factors: int = 4,
) -> Dataset:
    """Write a planted dataset at `where`; `extra["bayes"]` of its manifest is the oracle's mae, mse, rmse.

    Args:
        per_user: fewest and most ratings of a user, both included.
        noise: σ, the standard deviation of the noise before clipping, in stars.
        clusters: groups of users, and of items, that share a part of their factors.
        factors: length of p_u and q_i.

    Raises:
        UserError: an argument that makes no world, or `where` is taken.
    """
    low, high = per_user
    for flag, bad, need in (
        ("--users", users < 1, "at least 1"),
        ("--per-user", not 1 <= low <= high <= items, f"LOW HIGH, 1 <= LOW <= HIGH <= {items} items"),
        ("--noise", not (noise > 0 and math.isfinite(noise)), "a finite number above 0"),
        ("--clusters", clusters < 1, "at least 1"),
        ("--factors", factors < 1, "at least 1"),
    ):  # fmt: skip
        if bad:
            raise UserError(f"synthetic: {flag} must be {need}")
    clear_place(where)

    user_table, user_bias, p = _user_side(seed, users, clusters, factors)
    item_table, item_bias, q = _item_side(seed, items, clusters, factors)
    user, item, order = _pairs(seed, users, items, per_user)
    score = _MEAN + user_bias[user] + item_bias[item] + np.einsum("nf,nf->n", p[user], q[item])
    label = np.clip(score + noise * normal(seed, user, item, purpose="synthetic noise"), LOW, HIGH)
    start = (uniform(seed, np.arange(users), purpose="synthetic start") * 1e8).astype(np.int64)
    interactions = pl.DataFrame(
        {
            "user": user,
            "item": item,
            "label": label.astype(np.float32),
            "time": _EPOCH + start[user] + 60 * order,
        }
    )
    mae, mse = oracle_error(score, noise)
    extra: dict[str, Any] = {
        "source": "synthetic",
        "arguments": {"users": users, "items": items, "per_user": list(per_user), "seed": seed,
                      "noise": noise, "clusters": clusters, "factors": factors},
        "content_fields": {"user": list(_USER_FIELDS), "item": list(_ITEM_FIELDS)},
        "bayes": {"mae": float(mae.mean()), "mse": float(mse.mean()), "rmse": float(np.sqrt(mse.mean()))},
        "read": {},
        "notes": ["bayes is the error, averaged over all ratings, of one who knows every noise-free score"],
    }  # fmt: skip
    return write_dataset(
        where, name="synthetic", label=Label("rating", LOW, HIGH),
        user_fields=_USER_FIELDS, item_fields=_ITEM_FIELDS, users=user_table,
        items=item_table, interactions=interactions, extra=extra,
    )  # fmt: skip


def oracle_error(score: Floats, noise: float) -> tuple[Floats, Floats]:
    """Least expected absolute and squared error of a constant for Y = clip(score + noise·ε, LOW, HIGH).

    The best constant is Y's median, clip(score), for the first and its mean for the second.
    E|Y − c| = ∫_LOW^c P(Y ≤ t) dt + ∫_c^HIGH P(Y > t) dt, and xΦ(x) + φ(x) is an antiderivative of Φ.
    The second is Var Y by the moments of a doubly censored normal (Greene, Econometric Analysis, ch. 19).
    """
    a, b = (LOW - score) / noise, (HIGH - score) / noise
    c = (np.clip(score, LOW, HIGH) - score) / noise
    mae = noise * (_antiderivative(c) - _antiderivative(a) + _antiderivative(-c) - _antiderivative(-b))
    # Moments of Z = clip(ε, a, b); Y = score + noise·Z.
    inside = _cdf(b) - _cdf(a)
    first = a * _cdf(a) + b * _cdf(-b) + _pdf(a) - _pdf(b)
    second = a**2 * _cdf(a) + b**2 * _cdf(-b) + inside + a * _pdf(a) - b * _pdf(b)
    return mae, noise**2 * np.maximum(second - first**2, 0.0)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _pdf(x: Floats) -> Floats:
    return np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)


def _cdf(x: Floats) -> Floats:
    return 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))


def _antiderivative(x: Floats) -> Floats:
    return x * _cdf(x) + _pdf(x)


def _choice(n: int, *counters: Any, purpose: str) -> Ints:
    return (uniform(*counters, purpose=purpose) * n).astype(np.int64)


def _factors(seed: int, rows: Ints, factors: int, purpose: str) -> Floats:
    return normal(seed, rows[:, None], np.arange(factors)[None, :], purpose=f"synthetic {purpose} factors")


def _blend(factors: int, *shared: Floats, personal: Floats) -> Floats:
    """Factors [n, factors]: the shared parts explain _OPEN of the variance; ⟨p, q⟩ has sd _AFFINITY."""
    known = sum(shared) / math.sqrt(len(shared))
    scale = math.sqrt(_AFFINITY) / factors**0.25
    return scale * (math.sqrt(_OPEN) * known + math.sqrt(1 - _OPEN) * personal)


def _told(seed: int, cluster: Ints, clusters: int, purpose: str) -> Ints:
    """The cluster as a field tells it: right with probability _HONEST, else any."""
    rows = np.arange(len(cluster))
    honest = uniform(seed, rows, purpose=f"synthetic {purpose} honest") < _HONEST
    return np.where(honest, cluster, _choice(clusters, seed, rows, purpose=f"synthetic {purpose} told"))


def _user_side(seed: int, n: int, clusters: int, factors: int) -> tuple[pl.DataFrame, Floats, Floats]:
    """The users' table, b_u [n] and p_u [n, factors]."""
    rows = np.arange(n)
    cluster = _choice(clusters, seed, rows, purpose="synthetic user cluster")
    region = _choice(_REGIONS, seed, rows, purpose="synthetic region")
    p = _blend(
        factors,
        _factors(seed, cluster, factors, "user cluster"),
        _factors(seed, region, factors, "region"),
        personal=_factors(seed, rows, factors, "user"),
    )
    table = pl.DataFrame({"user": rows, "segment": _told(seed, cluster, clusters, "segment"), "region": region})
    return table, _USER_BIAS * normal(seed, rows, purpose="synthetic user bias"), p


def _item_side(seed: int, n: int, clusters: int, factors: int) -> tuple[pl.DataFrame, Floats, Floats]:
    """The items' table, b_i [n] and q_i [n, factors]; a tenth of the qualities is missing."""
    rows = np.arange(n)
    cluster = _choice(clusters, seed, rows, purpose="synthetic item cluster")
    draws = uniform(seed, rows[:, None], np.arange(_TAGS)[None, :], purpose="synthetic tags")
    tags = np.argsort(draws, axis=1)[:, :3]
    counts = 1 + _choice(3, seed, rows, purpose="synthetic number of tags")
    chosen = np.arange(3)[None, :] < counts[:, None]
    of_tags = _factors(seed, np.arange(_TAGS), factors, "tag")[tags] * chosen[..., None]
    q = _blend(
        factors,
        _factors(seed, cluster, factors, "item cluster"),
        of_tags.sum(1) / np.sqrt(counts)[:, None],
        personal=_factors(seed, rows, factors, "item"),
    )
    bias = normal(seed, rows, purpose="synthetic item bias")
    quality = 10 + 2 * (0.8 * bias + 0.6 * normal(seed, rows, purpose="synthetic quality"))
    missing = uniform(seed, rows, purpose="synthetic quality missing") < 0.1
    listed = pl.DataFrame({"item": np.repeat(rows, counts), "tags": tags[chosen]})
    table = pl.DataFrame(
        {
            "item": rows,
            "category": _told(seed, cluster, clusters, "category"),
            "quality": np.where(missing, np.nan, quality),
        }
    ).join(listed.group_by("item", maintain_order=True).agg("tags"), on="item", how="left", maintain_order="left")
    return table, _ITEM_BIAS * bias, q


def _pairs(seed: int, users: int, items: int, per_user: tuple[int, int]) -> tuple[Ints, Ints, Ints]:
    """Who rated what: user, item and the rating's place in the user's time order, each [n].

    A user's items are drawn without replacement, popular ones more often (the exponential race of
    Efraimidis & Spirakis, 2006); a block of users at a time bounds the memory.
    """
    rate = np.exp(0.7 * normal(seed, np.arange(items), purpose="synthetic popularity"))
    counts = per_user[0] + _choice(per_user[1] - per_user[0] + 1, seed, np.arange(users), purpose="synthetic ratings")
    block = max(1, (1 << 22) // items)
    chosen = []
    for start in range(0, users, block):
        rows = np.arange(start, min(start + block, users))
        race = -np.log1p(-uniform(seed, rows[:, None], np.arange(items)[None, :], purpose="synthetic race")) / rate
        first = np.argsort(race, axis=1, kind="stable")[:, : per_user[1]]
        chosen.append(first[np.arange(per_user[1])[None, :] < counts[rows, None]])
    user = np.repeat(np.arange(users), counts)
    order = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    return user, np.concatenate(chosen), order
