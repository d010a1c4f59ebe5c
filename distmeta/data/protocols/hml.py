"""hml: HML's recommendation kinds, existing/new users × existing/new items, which the paper (§3.4, §3.5) leaves open.

A fifth of the users and a fifth of the items are new, by hash. As in MeLU, a user's ratings of existing and of new
items are two states of 13 to 100 ratings each, of which 10 are query:

  ee  existing users, existing items: the query is 10 held-out rows, which no training task has; the support is
      what the user's training task is made of
  ne  new users, existing items
  en  existing users, new items: support and query both of new items, as in MeLU's item-cold state
  nn  new users, new items; ours, the paper has no such row

Existing users are those trained on. A tenth of the users who are not new validate instead, on existing items:
they are in no other task, so what stops a training early is not what is reported. All four kinds are the split
test. A training task draws its query anew each epoch from what the held-out rows leave.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from distmeta import draws
from distmeta.data.protocols.base import DRAWN, NEW, QUERY, TRAIN, VALID, Plan, Protocol, Source, frame, lowest
from distmeta.data.protocols.melu import QUERY_ROWS, by_state

KINDS_OF_TASKS = ("ee", "ne", "en", "nn")
"""By state: new user + 2 · new item."""
HELD_OUT_KIND = len(KINDS_OF_TASKS)
"""Kind of the tasks ee; kind 0 is the same user's training task."""


def plan(source: Source, split_seed: int, options: Mapping[str, Any]) -> Plan:
    """New users and new items by hash, a tenth of the other users for validation."""
    n, items = len(source.users), len(source.items)
    user = np.arange(n)
    new = lowest(draws.hashed(split_seed, user, purpose="hml/test"), n - round(0.8 * n))
    valid = lowest(draws.hashed(split_seed, user, purpose="hml/valid"), round(0.1 * int((~new).sum())), ~new)
    group = np.where(new, NEW, np.where(valid, VALID, TRAIN)).astype(np.int8)
    keys = draws.hashed(split_seed, np.arange(items), purpose="hml/items")
    return Plan(split_seed, options, group, lowest(keys, items - round(0.8 * items)))


def tasks(interactions: pl.DataFrame, plan: Plan) -> tuple[pl.DataFrame, dict[str, int]]:
    """Tasks of some users; `protocols.base.Protocol.tasks`."""
    rows, dropped = by_state(interactions, plan, KINDS_OF_TASKS, "hml/query")
    group, state, role = pl.col("group"), pl.col("state"), pl.col("role")
    valid_en = rows.filter((group == VALID) & (state == 2))
    dropped["en states of validation users"] = valid_en["user"].n_unique()
    trained = rows.filter((group == TRAIN) & (state == 0))
    cold = rows.filter(((group == TRAIN) & (state == 2)) | (group == NEW))
    names = state.replace_strict(dict(enumerate(KINDS_OF_TASKS)), return_dtype=pl.String)
    parts = [
        frame(trained.filter(role != QUERY), 0, "train", "train", DRAWN),
        frame(rows.filter((group == VALID) & (state == 0)), 0, "valid", "ne", role),
        frame(cold, state, "test", names, role),
        frame(trained, HELD_OUT_KIND, "test", "ee", role),
    ]
    return pl.concat(parts), dropped


HML = Protocol("hml", 1, {}, QUERY_ROWS, plan, tasks)
