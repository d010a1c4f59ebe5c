"""A made world whose best possible error is known: ratings or clicks from factors of users and items.

s_ui = μ + b_u + b_i + ⟨p_u, q_i⟩ is a user's noise-free score; the rating is clip(s_ui + σ ε, 1, 5) with ε
standard normal, a click is s_ui + σ ε above a threshold (oracle.py). In an open world features tell a part of the
factors, so that they say something about an unseen user; in a planted one users have one of a few tastes
(planted.py). Every draw is a counter hash (draws.py): the same seed gives the same dataset.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import polars as pl

from distmeta.data.schema import Dataset, Label
from distmeta.data.sources import oracle
from distmeta.data.sources.oracle import HIGH, LOW
from distmeta.data.sources.planted import (
    ITEM_FIELDS,
    MOST_FACTORS,
    Floats,
    Ints,
    Users,
    choice,
    item_side,
    n_tastes,
    open_users,
    planted_users,
)
from distmeta.data.write import clear_place, write_dataset
from distmeta.draws import normal, uniform
from distmeta.errors import UserError
from distmeta.fields import build, option
from distmeta.storage import Location

_MEAN = 3.2
_EPOCH = 1_600_000_000
_ALWAYS = ("users", "items", "per_user", "seed", "noise", "clusters", "factors")
"""Arguments that a manifest lists even where they are the defaults; the others came later."""


@dataclass(frozen=True)
class Recipe:
    """What a world is made from."""

    users: int = option(600, "Number of users.", least=1)
    items: int = option(300, "Number of items.", least=1)
    per_user: tuple[int, ...] = option((20, 60), "Fewest and most ratings of a user, both included.", least=1)
    seed: int = option(0, "What every draw comes from.")
    noise: float = option(0.4, "Standard deviation of the noise, in stars.", above=0)
    clusters: int = option(4, "Groups of items and, without planted tastes, of users, that share factors.", least=1)
    factors: int = option(4, "Length of the factors.", least=1)
    preference_clusters: int = option(
        0, "Plant N clusters of users by taste, to be known from ratings only; 0: open users.", least=0
    )
    told: float = option(0.0, "How often the field segment tells the preference cluster.", least=0, most=1)
    personal: float = option(
        0.2, "Share of a planted taste's variance that is the user's own, of major users.", least=0, most=1
    )
    minor: float = option(0.0, "Share of minor users, with rare field values and tastes of their own.", least=0)
    clicks: bool = option(False, "Labels are clicks, 0 or 1, and not ratings.")

    @property
    def planted(self) -> bool:
        return self.preference_clusters > 0 or self.minor > 0

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Recipe":
        """From some of its fields; UserError for one that makes no world, or would change nothing."""
        made = build(cls, arguments, "synthetic", flags=True)
        default, pair = cls(), len(made.per_user) == 2
        tastes = n_tastes(made.preference_clusters, made.minor)
        for flag, bad, need in (
            ("--per-user", not pair or not made.per_user[0] <= made.per_user[-1] <= made.items,
             f"LOW HIGH, 1 <= LOW <= HIGH <= {made.items} items"),
            ("--minor", not made.minor < 0.5, "below 0.5: minor users are the fewer"),
            ("--preference-clusters", made.planted and tastes > MOST_FACTORS,
             f"fewer: {tastes} tastes are planted, and there is room for {MOST_FACTORS}"),
            ("--factors", made.planted and not tastes <= made.factors <= MOST_FACTORS,
             f"{tastes} (the number of tastes) to {MOST_FACTORS}"),
            ("--items", made.planted and made.items <= 2 * made.factors, "more than twice --factors"),
            ("--told", made.told != default.told and not made.preference_clusters,
             "left out without --preference-clusters, which it is about"),
            ("--personal", made.personal != default.personal and not made.planted,
             "left out without --preference-clusters or --minor, which it is about"),
        ):  # fmt: skip
            if bad:
                raise UserError(f"synthetic: {flag} must be {need}")
        return made

    def stated(self) -> dict[str, Any]:
        """The arguments as the manifest has them: `of` makes the same recipe of them."""
        values = asdict(self) | {"per_user": list(self.per_user)}
        return {f.name: values[f.name] for f in fields(self) if f.name in _ALWAYS or values[f.name] != f.default}


@dataclass(frozen=True)
class World:
    """Everybody and every pair, before there is any noise."""

    recipe: Recipe
    users: Users
    items: pl.DataFrame
    factors: Floats
    """[items, factors]: q_i."""
    user: Ints
    item: Ints
    order: Ints
    score: Floats
    """[n] each: who rated what, its place in the user's time order, and s_ui."""

    @classmethod
    def of(cls, recipe: Recipe) -> "World":
        r, tastes = recipe, (recipe.preference_clusters, recipe.told, recipe.personal, recipe.minor)
        if r.planted:
            users = planted_users(r.seed, r.users, r.factors, *tastes)
        else:
            users = open_users(r.seed, r.users, r.clusters, r.factors)
        items, bias, q = item_side(r.seed, r.items, r.clusters, r.factors, r.planted)
        user, item, order = _pairs(r.seed, r.users, r.items, r.per_user)
        score = _MEAN + users.bias[user] + bias[item] + np.einsum("nf,nf->n", users.factors[user], q[item])
        return cls(r, users, items, q, user, item, order, score)

    def labels(self) -> Floats:
        """[n]: what was observed."""
        r, pair = self.recipe, (self.recipe.seed, self.user, self.item)
        if r.clicks:
            p = oracle.probability(oracle.click_logit(self.score, r.noise))
            return (uniform(*pair, purpose="synthetic click") < p).astype(np.float64)
        return np.clip(self.score + r.noise * normal(*pair, purpose="synthetic noise"), LOW, HIGH)

    def bayes(self) -> tuple[dict[str, float], dict[str, dict[str, dict[str, float]]]]:
        """Least possible errors over all rows; and by hidden column and its value, with the number of rows."""
        error = oracle.click_bayes if self.recipe.clicks else oracle.rating_bayes
        groups: dict[str, dict[str, dict[str, float]]] = {}
        for name in self.users.hidden:
            of_row = self.users.table[name].to_numpy()[self.user]
            rows = {str(value): of_row == value for value in np.unique(of_row)}
            groups[name] = {
                v: {**error(self.score[mine], self.recipe.noise), "rows": int(mine.sum())} for v, mine in rows.items()
            }
        return error(self.score, self.recipe.noise), groups


def generate(where: Location, **arguments: Any) -> Dataset:
    """Write a made dataset at `where`; `extra["bayes"]` of its manifest is the oracle's errors (oracle.py).

    Args:
        arguments: fields of `Recipe`; those left out have its defaults.

    Raises:
        UserError: an argument that makes no world, or `where` is taken.
    """
    recipe = Recipe.of(arguments)
    clear_place(where)
    world = World.of(recipe)
    start = (uniform(recipe.seed, np.arange(recipe.users), purpose="synthetic start") * 1e8).astype(np.int64)
    interactions = pl.DataFrame(
        {
            "user": world.user,
            "item": world.item,
            "label": world.labels().astype(np.float32),
            "time": _EPOCH + start[world.user] + 60 * world.order,
        }
    )
    bayes, groups = world.bayes()
    people = world.users
    extra: dict[str, Any] = {
        "source": "synthetic",
        "arguments": recipe.stated(),
        "content_fields": {"user": list(people.fields), "item": list(ITEM_FIELDS)},
        "bayes": bayes,
        **({"bayes_groups": groups} if groups else {}),
        "read": {},
        "notes": ["bayes is the error, averaged over all ratings, of one who knows every noise-free score"],
    }
    return write_dataset(
        where, name="synthetic", label=Label("click", 0.0, 1.0) if recipe.clicks else Label("rating", LOW, HIGH),
        user_fields=people.fields | people.hidden, item_fields=ITEM_FIELDS, users=people.table,
        items=world.items, interactions=interactions, extra=extra,
    )  # fmt: skip


def optimal(dataset: Dataset) -> pl.DataFrame:
    """The best predictions for a made dataset, from the arguments in its manifest; rows as in interactions/.

    Returns:
        user, item; score: s_ui; mean: the expected label, best by squared error (of a click: its probability, best
        by log loss too); median: best by absolute error.

    Raises:
        UserError: the dataset was not made here.
    """
    if dataset.extra.get("source") != "synthetic":
        raise UserError(f"{dataset.name}: not made by `prepare synthetic`, so nobody knows its best predictions")
    world = World.of(Recipe.of(dataset.extra["arguments"]))
    score, noise = world.score, world.recipe.noise
    if world.recipe.clicks:
        mean = oracle.probability(oracle.click_logit(score, noise))
        median = (mean > 0.5).astype(np.float64)
    else:
        mean, median = oracle.rating_mean(score, noise), np.clip(score, LOW, HIGH)
    return pl.DataFrame({"user": world.user, "item": world.item, "score": score, "mean": mean, "median": median})


def _pairs(seed: int, users: int, items: int, per_user: tuple[int, ...]) -> tuple[Ints, Ints, Ints]:
    """Who rated what: user, item and the rating's place in the user's time order, each [n].

    A user's items are drawn without replacement, popular ones more often (the exponential race of
    Efraimidis & Spirakis, 2006); a block of users at a time bounds the memory.
    """
    rate = np.exp(0.7 * normal(seed, np.arange(items), purpose="synthetic popularity"))
    counts = per_user[0] + choice(per_user[1] - per_user[0] + 1, seed, np.arange(users), purpose="synthetic ratings")
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
