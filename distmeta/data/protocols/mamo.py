"""mamo: MAMO §3.1.3, §3.1.4 and A.1: 20 ratings a user by time, 15 of support and the last 5 query.

Query rows are judged by cohort: warm or cold users by their first rating, warm or cold items by how often
they occur among all users' trimmed ratings. A user with fewer ratings keeps the last 5 as query and the rest
as support, but at least one row of support; the paper's MovieLens has no such user, and its code no rule.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta import draws
from distmeta.data.protocols.base import DRAWN, NEW, TRAIN, VALID, Plan, Protocol, Source, frame, lowest, runs
from distmeta.errors import UserError

COLD_RATINGS = {True: 10, False: 6}
"""Items with fewer ratings are cold: MovieLens, which has times, "less than 10"; Book-Crossing, which has
none, has warm items "with more than 5"."""
NEVER = np.iinfo(np.int64).max
"""The first time of a user who is not in the log."""
COLD_USERS = 0.1
"""Share of the users, the last by id, who are cold where no time tells (Book-Crossing)."""


def plan(source: Source, split_seed: int, options: Mapping[str, Any]) -> Plan:
    """Train, validation and test users by hash; who and what is cold, from one pass over the interactions.

    Raises:
        UserError: no room for a support row, or cold_after is not a date.
    """
    kept, query = options["mamo_ratings"], options["mamo_query"]
    if query >= kept:
        raise UserError(f"mamo_query is {query} of {kept} ratings, which leaves no support; make it smaller")
    after = _seconds(options["cold_after"])
    n, user = len(source.users), np.arange(len(source.users))
    new = lowest(draws.hashed(split_seed, user, purpose="mamo/test"), n - round(options["train_share"] * n))
    valid = lowest(draws.hashed(split_seed, user, purpose="mamo/valid"), round(0.1 * int((~new).sum())), ~new)
    group = np.where(new, NEW, np.where(valid, VALID, TRAIN)).astype(np.int8)

    first, rated, timed = _survey(source, kept)
    cold_users = first >= after if timed else user >= n - round(COLD_USERS * n)
    least = options["cold_item_ratings"] or COLD_RATINGS[timed]
    cold_items = rated < least
    there, occurring = first < NEVER, rated > 0
    by_time = f"first rating on or after {options['cold_after']} (UTC)"
    by_id = f"the last {COLD_USERS:.0%} by id: the dataset has no times"
    notes = {
        "cold users": f"{by_time if timed else by_id}; {int((cold_users & there).sum()):,} of {int(there.sum()):,}",
        "cold items": f"fewer than {least} of all users' first {kept} ratings; {int((cold_items & occurring).sum()):,} "
        f"of the {int(occurring.sum()):,} that occur there",
    }
    return Plan(split_seed, options, group, cold_items, cold_users, notes)


def _seconds(date: str) -> int:
    try:
        return int(datetime.fromisoformat(date).replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise UserError(f"cold_after is {date!r}; give a date like 2000-12-03") from None


def _survey(source: Source, kept: int) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
    """Each user's first time, each item's count among the users' first `kept` ratings, whether there are times.

    Sources without times number the rows of a file, or leave one value: no time reaches the number of rows.
    """
    first = np.full(len(source.users), NEVER)
    rated = np.zeros(len(source.items), np.int64)
    latest = -1
    for chunk in source.chunks():
        user, time = chunk["user"].to_numpy(), chunk["time"].to_numpy()
        position, _ = runs(user)
        first[user[position == 0]] = time[position == 0]
        rated += np.bincount(chunk["item"].to_numpy()[position < kept], minlength=len(rated))
        latest = max(latest, int(time.max()))
    return first, rated, latest >= source.manifest.interactions


def tasks(interactions: pl.DataFrame, plan: Plan) -> tuple[pl.DataFrame, dict[str, int]]:
    """Tasks of some users; `protocols.base.Protocol.tasks`."""
    position, _ = runs(interactions["user"].to_numpy())
    rows = interactions.filter(pl.Series(position < plan.options["mamo_ratings"]))
    user, item = rows["user"].to_numpy(), rows["item"].to_numpy()
    position, count = runs(user)
    query = position >= count - np.minimum(plan.options["mamo_query"], count - 1)
    drawn = (plan.group[user] == TRAIN) & plan.options["mamo_drawn"]
    stays = (count > 1) & (query | (position < plan.options["mamo_support"]))
    cold = plan.cohort[user]
    rows = rows.with_columns(
        group=plan.group[user],
        role=np.where(drawn, DRAWN, query).astype(np.int8),
        cohort=np.where(cold, "cold", "warm"),
        row_cohort=(2 * cold + plan.cold_items[item]).astype(np.int8),
    ).filter(pl.Series(stays))
    parts = [
        frame(rows.filter(pl.col("group") == code), 0, split, *map(pl.col, ("cohort", "role", "row_cohort")))
        for code, split in ((TRAIN, "train"), (VALID, "valid"), (NEW, "test"))
    ]
    return pl.concat(parts), {"users with fewer than 2 ratings": int((count == 1).sum())}


MAMO = Protocol(
    "mamo",
    1,
    {
        "mamo_ratings": 20,
        "mamo_query": 5,
        "mamo_support": 15,
        "mamo_drawn": False,
        "train_share": 0.8,
        "cold_after": "2000-12-03",
        "cold_item_ratings": 0,
    },
    5,
    plan,
    tasks,
    row_cohorts=("W-W", "W-C", "C-W", "C-C"),
)
