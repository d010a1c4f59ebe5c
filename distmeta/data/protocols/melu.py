"""melu: MeLU's four states, users warm/cold × items warm/cold, of 13 to 100 ratings, as its code makes them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta import draws
from distmeta.data.protocols.base import (
    KINDS,
    NEW,
    TRAIN,
    VALID,
    Plan,
    Protocol,
    Source,
    frame,
    lowest,
    rank,
    read_text,
    runs,
)
from distmeta.errors import UserError
from distmeta.storage import Location

QUERY_ROWS = 10
RATINGS = (13, 100)
COLD_YEAR = 1998
STATES = ("warm", "user-cold", "item-cold", "both-cold")
SEEN_KIND = len(STATES)


def plan(source: Source, split_seed: int, options: Mapping[str, Any]) -> Plan:
    """Cold users by list or hash, cold items by year or hash; UserError where the list is not usable."""
    users, items = source.users, source.items
    n, user = len(users), np.arange(len(users))
    if options["cold_users"]:
        cold = _listed(users, Location.of(options["cold_users"]))
    else:
        cold = lowest(draws.hashed(split_seed, user, purpose="melu/test"), n - round(0.8 * n))
    warm = int((~cold).sum())
    valid = lowest(draws.hashed(split_seed, user, purpose="melu/valid"), round(0.1 * warm), ~cold)
    group = np.where(cold, NEW, np.where(valid, VALID, TRAIN)).astype(np.int8)
    if "year" in items.columns:
        # An item without a year is warm, as in MeLU, whose cold list holds what is known to be new.
        cold_items = (items["year"] >= COLD_YEAR).fill_null(False).to_numpy()
    else:
        keys = draws.hashed(split_seed, np.arange(len(items)), purpose="melu/items")
        cold_items = lowest(keys, len(items) - round(0.8 * len(items)))
    return Plan(split_seed, options, group, cold_items)


def _listed(users: pl.DataFrame, file: Location) -> NDArray[np.bool_]:
    """Mask [users] of the raw ids listed in `file`; UserError naming the file and line of an unknown one."""
    lines = pl.Series("raw_id", [line.strip() for line in read_text(file).splitlines()], pl.String)
    wanted = pl.DataFrame({"raw_id": lines, "line": np.arange(1, len(lines) + 1)}).filter(pl.col("raw_id") != "")
    unknown = wanted.join(users, on="raw_id", how="anti", maintain_order="left")
    if len(unknown):
        raw_id, line = unknown.row(0)
        raise UserError(f"{file}, line {line}: no user {raw_id!r} in this dataset; list raw user ids, one a line")
    if not len(wanted):
        raise UserError(f"{file}: lists no user; give the cold users' raw ids, one a line, or leave cold_users empty")
    return users["raw_id"].is_in(wanted["raw_id"].implode()).to_numpy()


def by_state(
    interactions: pl.DataFrame, plan: Plan, names: Sequence[str], purpose: str
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The rows of each user's two states of 13 to 100 ratings, and how many states are left out, by name.

    Args:
        names: of the states 0 to 3: new user + 2 · cold item.
        purpose: what the 10 query rows are drawn for.

    Returns:
        The interactions sorted by (user, state, time) with the columns group and state, and role: QUERY for the 10.
    """
    user, item = interactions["user"].to_numpy(), interactions["item"].to_numpy()
    state = (plan.group[user] == NEW) + 2 * plan.cold_items[item].astype(np.int64)
    task = user.astype(np.int64) * KINDS + state
    order = np.argsort(task, kind="stable")  # keeps a state's rows in time order
    rows, task = interactions[order], task[order]
    position, count = runs(task)
    # MeLU shuffles a state's ratings and takes the last 10 as query; the hash is the shuffle.
    keys = draws.hashed(plan.split_seed, task, position, purpose=purpose)
    query = rank(task, keys) >= count - QUERY_ROWS
    rows = rows.with_columns(group=plan.group[rows["user"].to_numpy()], state=state[order], role=query.astype(np.int8))
    kept = (count >= RATINGS[0]) & (count <= RATINGS[1])
    left_out = state[order][~kept & (position == 0)]
    dropped = {
        f"{name} states with fewer than {RATINGS[0]} or more than {RATINGS[1]} ratings": int((left_out == s).sum())
        for s, name in enumerate(names)
    }
    return rows.filter(pl.Series(kept)), dropped


def tasks(interactions: pl.DataFrame, plan: Plan) -> tuple[pl.DataFrame, dict[str, int]]:
    """Tasks of some users; `protocols.base.Protocol.tasks`."""
    rows, dropped = by_state(interactions, plan, STATES, "melu/query")
    warm, role = pl.col("state") == 0, pl.col("role")
    train = rows.filter(warm & (pl.col("group") == TRAIN))
    names = pl.col("state").replace_strict(dict(enumerate(STATES)), return_dtype=pl.String)
    parts = [
        frame(train, 0, "train", "warm", role),
        frame(rows.filter(warm & (pl.col("group") == VALID)), 0, "valid", "warm", role),
        frame(rows.filter(~warm), pl.col("state"), "test", names, role),
        frame(train, SEEN_KIND, "seen", "warm", role),
    ]
    return pl.concat(parts), dropped


MELU = Protocol("melu", 1, {"cold_users": ""}, QUERY_ROWS, plan, tasks)
