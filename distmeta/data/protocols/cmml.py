"""cmml-user: CMML §7.2 (user setting) and appendix. C-W: new users. W-W: held-out rows of training users.

Who is evaluated keeps their first max_ratings by time. Who is trained on keeps all, of which an episode draws
max_ratings: a service has its old users' whole history. clip_training clips them as well, as CMML's code does.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta import draws
from distmeta.data.protocols.base import (
    DRAWN,
    NEW,
    TRAIN,
    VALID,
    Plan,
    Protocol,
    Source,
    frame,
    lowest,
    rank,
    runs,
)
from distmeta.errors import UserError

QUERY_ROWS = 10
HELD_OUT = 3
"""A training user with held-out rows (`Plan.group`)."""


def plan(source: Source, split_seed: int, options: Mapping[str, Any]) -> Plan:
    """80 % of the users to train on, a tenth of them for validation; UserError where max_ratings is below 2."""
    if options["max_ratings"] < 2:
        raise UserError(
            f"max_ratings is {options['max_ratings']}; a task needs 2 ratings, and the papers keep 50 or 100"
        )
    n = len(source.users)
    user = np.arange(n)

    def keys(purpose: str) -> NDArray[np.uint64]:
        return draws.hashed(split_seed, user, purpose=f"cmml-user/{purpose}")

    new = lowest(keys("test"), n - round(0.8 * n))
    valid = lowest(keys("valid"), round(0.1 * (n - int(new.sum()))), ~new)
    held_out = lowest(keys("held-out"), int(new.sum()), ~new & ~valid)
    group = np.full(n, TRAIN, np.int8)
    group[valid], group[new], group[held_out] = VALID, NEW, HELD_OUT
    return Plan(split_seed, options, group)


def tasks(interactions: pl.DataFrame, plan: Plan) -> tuple[pl.DataFrame, dict[str, int]]:
    """Tasks of some users; `protocols.base.Protocol.tasks`."""
    position, _ = runs(interactions["user"].to_numpy())
    first = position < plan.options["max_ratings"]
    trained = np.isin(plan.group[interactions["user"].to_numpy()], (TRAIN, HELD_OUT))
    later = interactions.filter(pl.Series(~first & trained & (not plan.options["clip_training"])))
    rows = interactions.filter(pl.Series(first))
    user = rows["user"].to_numpy()
    position, count = runs(user)
    keys = draws.hashed(plan.split_seed, user, position, purpose="cmml-user/query")
    query_rows = np.where(count < 2 * QUERY_ROWS, count // 2, QUERY_ROWS)
    query = rank(user, keys) < query_rows
    rows = rows.with_columns(group=plan.group[user], query=query, count=count, role=query.astype(np.int8))
    dropped = {"users with fewer than 2 ratings": int((count == 1).sum())}
    rows = rows.filter(pl.col("count") >= 2)
    group, held_out = pl.col("group"), rows.filter(pl.col("group") == HELD_OUT)
    rest = held_out.filter(~pl.col("query"))
    names = interactions.columns
    pool = pl.concat([rows.filter(group == TRAIN).select(names), rest.select(names), later])
    single = pl.len().over("user") < 2
    dropped["W-W users with fewer than 2 ratings left to train on"] = pool.select(single.sum()).item()
    parts = [
        frame(pool.filter(~single), 0, "train", "train", DRAWN),
        frame(rows.filter(group == VALID), 0, "valid", "C-W", pl.col("role")),
        frame(rows.filter(group == NEW), 0, "test", "C-W", pl.col("role")),
        frame(held_out, 1, "test", "W-W", pl.col("role")),
    ]
    return pl.concat(parts), dropped


CMML_USER = Protocol(
    "cmml-user",
    1,
    {"max_ratings": 100, "clip_training": False},
    QUERY_ROWS,
    plan,
    tasks,
    episode="max_ratings",
)
