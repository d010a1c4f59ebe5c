"""Who lives in a made world: users and items, what their fields tell, and their factors p_u and q_i.

Two kinds of users. In an *open* world a part of p_u is the cluster's and the region's, which fields tell. In a
*planted* world p_u is one of a few tastes plus something personal. The tastes are as far from each other as can be
(the corners of a regular simplex), and they belong to

  - preference clusters, which no field tells unless asked to: only the support's ratings reveal them;
  - major and minor users. The minor ones are few, and have rare values in every field; the major ones have
    frequent values, but for one field now and then. The taste that the minor ones share is the farthest from the
    others', and they share less of it: fields say that such a user is different, and only ratings say how. What
    fits the many overlooks them (PAML's Lemma 1), and they have farther to go from any common start (Lemma 2).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta.data.schema import FieldType
from distmeta.draws import normal, uniform

_USER_BIAS, _ITEM_BIAS, _AFFINITY = 0.35, 0.45, 0.65
"""Standard deviations of b_u, b_i and, in an open world, ⟨p_u, q_i⟩."""
_TASTE = 0.8
"""Standard deviation of ⟨p_u, q_i⟩ in a planted world."""
_OPEN = 0.7
"""Share of the factors' variance that cluster and fields explain, in an open world."""
_HONEST = 0.85
"""How often a user's segment and an item's category tell the true cluster, in an open world."""
_REGIONS, _TAGS = 8, 12
MOST_FACTORS = _TAGS
"""Of a planted world: more would not differ from each other over the items."""
_PROFILE = ("region", "job", "channel", "device")
"""User fields of a planted world, of _VALUES values each, of which PAML's rule calls _FREQUENT (30 %) major."""
_VALUES, _FREQUENT = 10, 3
_ALIKE = 0.25
"""How much of their variance minor users' tastes share, over how much those of major users do."""
_ODD = 0.3
"""Share of the major users who have a rare value in one field."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ITEM_FIELDS: dict[str, FieldType] = {
    "category": "categorical",
    "tags": "multi_categorical",
    "quality": "numeric",
}


@dataclass(frozen=True)
class Users:
    """The users of a world."""

    table: pl.DataFrame
    """user, and a column a field."""
    fields: dict[str, FieldType]
    """Fields that methods may use."""
    hidden: dict[str, FieldType]
    """Columns beside them that say what is planted: for evaluation, not for methods."""
    bias: Floats
    """[n]: b_u."""
    factors: Floats
    """[n, factors]: p_u."""


def choice(n: int, *counters: Any, purpose: str) -> Ints:
    """Uniform numbers 0 … n − 1, by `draws.uniform`."""
    return (uniform(*counters, purpose=purpose) * n).astype(np.int64)


def open_users(seed: int, n: int, clusters: int, factors: int) -> Users:
    """Users whose segment and region tell of their factors."""
    rows = np.arange(n)
    cluster = choice(clusters, seed, rows, purpose="synthetic user cluster")
    region = choice(_REGIONS, seed, rows, purpose="synthetic region")
    p = _blend(
        factors,
        _factors(seed, cluster, factors, "user cluster"),
        _factors(seed, region, factors, "region"),
        personal=_factors(seed, rows, factors, "user"),
    )
    told = _told(seed, cluster, clusters, _HONEST, "segment")
    table = pl.DataFrame({"user": rows, "segment": told, "region": region})
    return Users(table, {"segment": "categorical", "region": "categorical"}, {}, _user_bias(seed, rows), p)


def planted_users(
    seed: int, n: int, factors: int, clusters: int = 0, told: float = 0.0, personal: float = 0.2, minor: float = 0.0
) -> Users:
    """Users of a few tastes.

    Args:
        clusters: preference clusters; 0 for one taste, without the hidden column planted_cluster.
        told: how often the field segment tells the cluster; otherwise it says any.
        personal: share of p_u's variance that is the user's own, of major users; what minor ones share is _ALIKE
            of what major ones do.
        minor: share of minor users, whose tastes are others; 0 without the hidden column planted_group.
    """
    rows = np.arange(n)
    cluster = choice(max(1, clusters), seed, rows, purpose="synthetic preference cluster")
    few = uniform(seed, rows, purpose="synthetic minor") < minor
    tastes = simplex(seed, n_tastes(clusters, minor), factors)
    own = _factors(seed, rows, factors, "user") / math.sqrt(factors)
    taste = tastes[cluster + few * max(1, clusters)]
    shared = np.where(few, _ALIKE, 1.0)[:, None] * (1 - personal)
    p = _TASTE * (np.sqrt(shared) * taste + np.sqrt(1 - shared) * own)
    columns, hidden = {"user": rows}, {}
    if clusters:
        columns["segment"] = _told(seed, cluster, clusters, told, "preference")
        hidden["planted_cluster"] = cluster
    columns |= _profile(seed, few)
    if minor:
        hidden["planted_group"] = np.where(few, "minor", "major")
    kinds: list[dict[str, FieldType]] = [dict.fromkeys(side, "categorical") for side in (columns, hidden)]
    kinds[0].pop("user")
    return Users(pl.DataFrame(columns | hidden), kinds[0], kinds[1], _user_bias(seed, rows), p)


def n_tastes(clusters: int, minor: float) -> int:
    """Tastes of a planted world: one a cluster, and as many again for the minor users."""
    return max(1, clusters) * (2 if minor else 1)


def item_side(seed: int, n: int, clusters: int, factors: int, planted: bool) -> tuple[pl.DataFrame, Floats, Floats]:
    """The items' table, b_i [n] and q_i [n, factors].

    In an open world fields tell a part, and a tenth of the qualities is missing. In a planted world they tell all,
    so that what is left to find out is the user: b_i by the quality, q_i by the category's vector plus the mean of
    the tags', with mean 0 and covariance 1 over the items, so that a taste matters equally in all directions.
    """
    rows = np.arange(n)
    cluster = choice(clusters, seed, rows, purpose="synthetic item cluster")
    draws = uniform(seed, rows[:, None], np.arange(_TAGS)[None, :], purpose="synthetic tags")
    tags = np.argsort(draws, axis=1)[:, :3]
    counts = 1 + choice(3, seed, rows, purpose="synthetic number of tags")
    chosen = np.arange(3)[None, :] < counts[:, None]
    listed = pl.DataFrame({"item": np.repeat(rows, counts), "tags": tags[chosen]})
    of_cluster = _factors(seed, cluster, factors, "item cluster")
    of_tags = (_factors(seed, np.arange(_TAGS), factors, "tag")[tags] * chosen[..., None]).sum(1)
    bias = normal(seed, rows, purpose="synthetic item bias")
    if planted:
        q = _standardised(of_cluster + of_tags / counts[:, None])
        category, quality = cluster, 10 + 2 * bias
    else:
        personal = _factors(seed, rows, factors, "item")
        q = _blend(factors, of_cluster, of_tags / np.sqrt(counts)[:, None], personal=personal)
        category = _told(seed, cluster, clusters, _HONEST, "category")
        quality = 10 + 2 * (0.8 * bias + 0.6 * normal(seed, rows, purpose="synthetic quality"))
        quality[uniform(seed, rows, purpose="synthetic quality missing") < 0.1] = np.nan
    table = pl.DataFrame({"item": rows, "category": category, "quality": quality}).join(
        listed.group_by("item", maintain_order=True).agg("tags"), on="item", how="left", maintain_order="left"
    )
    return table, _ITEM_BIAS * bias, q


def _user_bias(seed: int, rows: Ints) -> Floats:
    return _USER_BIAS * normal(seed, rows, purpose="synthetic user bias")


def _factors(seed: int, rows: Ints, factors: int, purpose: str) -> Floats:
    return normal(seed, rows[:, None], np.arange(factors)[None, :], purpose=f"synthetic {purpose} factors")


def _blend(factors: int, *shared: Floats, personal: Floats) -> Floats:
    """Factors [n, factors]: the shared parts explain _OPEN of the variance; ⟨p, q⟩ has sd _AFFINITY."""
    known = sum(shared) / math.sqrt(len(shared))
    scale = math.sqrt(_AFFINITY) / factors**0.25
    return scale * (math.sqrt(_OPEN) * known + math.sqrt(1 - _OPEN) * personal)


def _told(seed: int, cluster: Ints, clusters: int, honest: float, purpose: str) -> Ints:
    """The cluster as a field tells it: right with probability `honest`, else any."""
    rows = np.arange(len(cluster))
    right = uniform(seed, rows, purpose=f"synthetic {purpose} honest") < honest
    return np.where(right, cluster, choice(clusters, seed, rows, purpose=f"synthetic {purpose} told"))


def simplex(seed: int, n: int, factors: int) -> Floats:
    """n <= factors unit vectors [n, factors]: any one, or the corners of a regular simplex around 0."""
    drawn = _factors(seed, np.arange(factors), factors, "taste")
    q, r = np.linalg.qr(drawn)
    corners = (q * np.sign(np.diag(r))).T[:n]  # without the sign it would depend on the library
    if n > 1:
        corners = corners - corners.mean(0)
    return corners / np.linalg.norm(corners, axis=1, keepdims=True)


def _standardised(q: Floats) -> Floats:
    """q [n, factors] with mean 0 and covariance 1 over the n, by the symmetric root, which is unique."""
    centred = q - q.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(q))
    return centred @ (vectors / np.sqrt(values)) @ vectors.T


def _profile(seed: int, few: Bools) -> dict[str, Ints]:
    """The fields of _PROFILE: rare values for the `few`, frequent ones for the others but for one field of some."""
    rows, fields = np.arange(len(few)), np.arange(len(_PROFILE))
    odd = uniform(seed, rows, purpose="synthetic odd") < _ODD
    which = choice(len(fields), seed, rows, purpose="synthetic odd field")
    rare = few[:, None] | (odd[:, None] & (which[:, None] == fields))
    usual, strange = (
        choice(n, seed, rows[:, None], fields, purpose=f"synthetic {kind} value")
        for kind, n in (("frequent", _FREQUENT), ("rare", _VALUES - _FREQUENT))
    )
    return dict(zip(_PROFILE, np.where(rare, _FREQUENT + strange, usual).T, strict=True))
