"""paml: PAML §Experiments: the 80 % of users with the least log data, 7:1:2, a random 80:20 of each one's items.

Cohorts are major and minor users: a major user has more than `major_over` fields whose value is among the most
frequent 30 % of that field's values, by users. Frequencies are those of all users who occur in the log, before
the least active are chosen: so counted, ML-1M gives 72.7 / 71.7 / 58.2 / 64.1 % against the paper's Table 1 with
72.4 / 71.7 / 56.7 / 64.0 %, and 60.5 % major users where the paper says 65 %. Users of whom nothing is known are
neither: all tasks are then in the one cohort `all`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta import draws
from distmeta.data.protocols.base import DRAWN, NEW, TRAIN, VALID, Plan, Protocol, Source, frame, lowest, rank, runs
from distmeta.errors import UserError

QUERY_SHARE = 0.2
AGES = (10, 100)
"""Ages kept, of a numeric field `age`; a categorical one holds age groups."""
LOCATIONS = ("location", "city", "state", "region", "country")
"""Categorical fields that hold a place."""
GARBLED = r"[^\p{L}\p{M}\p{N}\s.,:'’`&/()_-]|^[^\p{L}\p{N}]*$"
"""A place is garbled where it has a character that neither names nor codes have, or no letter and no digit."""

_OTHER = 3
"""`Plan.group` of users who are not among the least active; from _DROPPED on: REASONS."""
_DROPPED = 4
REASONS = (
    "users with fewer than 2 items",
    f"users with an age outside {AGES[0]} to {AGES[1]}",
    "users with a garbled location",
    "users with a blank field",
)
"""Why a user is left out, the first that applies."""


def plan(source: Source, split_seed: int, options: Mapping[str, Any]) -> Plan:
    """The least active users, their split, who of them is dropped, and who is major where users have fields.

    Raises:
        UserError: fewer user fields than a major user needs frequent values.
    """
    rows, counted = _survey(source)
    active = rows > 0
    low = lowest(rows.astype(np.uint64), round(0.8 * int(active.sum())), active)
    n, user = int(low.sum()), np.arange(len(rows))
    new = lowest(draws.hashed(split_seed, user, purpose="paml/test"), round(0.2 * n), low)
    valid = lowest(draws.hashed(split_seed, user, purpose="paml/valid"), round(0.1 * n), low & ~new)
    group = np.select([new, valid, low], [NEW, VALID, TRAIN], _OTHER)
    wrong = np.stack([counted < 2, *_wrong(source)])
    group = np.where(low & wrong.any(0), _DROPPED + wrong.argmax(0), group).astype(np.int8)
    major, notes = _major(source, active, options["major_over"])
    kept = group < _OTHER
    notes["least active users"] = f"{n:,} of {int(active.sum()):,}, {int(kept.sum()):,} after the filters"
    if len(major):
        notes["major users"] = f"{_share(major[active])} of all, {_share(major[kept])} of those kept"
    return Plan(split_seed, options, group, cohort=major, notes=notes)


def _survey(source: Source) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of each user, and those that count towards the least number of items: ratings, or clicks made."""
    rows, counted = np.zeros((2, len(source.users)), np.int64)
    clicks = source.manifest.label.kind == "click"
    for chunk in source.chunks():
        user = chunk["user"].to_numpy()
        rows += np.bincount(user, minlength=len(rows))
        counted += np.bincount(user[chunk["label"].to_numpy() > 0] if clicks else user, minlength=len(rows))
    return rows, counted


def _wrong(source: Source) -> list[NDArray[np.bool_]]:
    """Masks [users] of wrong ages, garbled locations and blank fields, where the dataset has such fields."""
    age, garbled, blank = np.zeros((3, len(source.users)), bool)
    for f in source.manifest.user_fields:
        values = source.users[f.name]
        if f.type == "numeric":
            blank |= values.is_null().to_numpy()
            if f.name == "age":
                age |= ~values.is_between(*AGES).fill_null(True).to_numpy()
        elif f.type == "categorical":
            blank |= (values == 0).to_numpy()
            if f.name in LOCATIONS:
                strange = source.vocabulary(f.name).str.contains(GARBLED).fill_null(False)
                garbled |= strange.to_numpy()[values.to_numpy()]
        else:
            blank |= (values.list.len() == 0).to_numpy()
    return [age, garbled, blank]


def _major(source: Source, active: NDArray[np.bool_], over: int) -> tuple[NDArray[np.bool_], dict[str, str]]:
    """Mask [users] of major users, [0] without fields; and the share of users with a major value, by field."""
    fields = [f for f in source.manifest.user_fields if f.type != "multi_categorical"]
    if not fields:
        return np.zeros(0, bool), {"major users": "no major or minor users, as there is no single-valued user field"}
    if len(fields) <= over:
        raise UserError(
            f"{source.where}: protocol paml calls a user major by more than {over} single-valued fields with a frequent"
            f" value, and the users have {len(fields)}; set --major-over below that, or choose another protocol"
        )
    frequent = []
    for f in fields:
        column = source.users[f.name]
        known = (column.is_not_null() if f.type == "numeric" else column != 0).to_numpy()
        values, index = np.unique(column.to_numpy(), return_inverse=True)
        users = np.bincount(index[active & known], minlength=len(values))
        most = np.argsort(-users, kind="stable")[: -(-3 * int((users > 0).sum()) // 10)]
        frequent.append(known & np.isin(index, most))
    notes = {f"frequent {f.name}": _share(mask[active]) for f, mask in zip(fields, frequent, strict=True)}
    return np.sum(frequent, axis=0) > over, notes


def _share(mask: NDArray[np.bool_]) -> str:
    return f"{mask.mean():.1%}" if len(mask) else "none"


def tasks(interactions: pl.DataFrame, plan: Plan) -> tuple[pl.DataFrame, dict[str, int]]:
    """Tasks of some users; `protocols.base.Protocol.tasks`."""
    group = plan.group[interactions["user"].to_numpy()]
    first = runs(interactions["user"].to_numpy())[0] == 0
    dropped = {why: int((group[first] == _DROPPED + code).sum()) for code, why in enumerate(REASONS)}
    rows = interactions.filter(pl.Series(group < _OTHER))
    user = rows["user"].to_numpy()
    position, count = runs(user)
    keys = draws.hashed(plan.split_seed, user, position, purpose="paml/query")
    query = rank(user, keys) < np.maximum(1, np.rint(QUERY_SHARE * count))
    rows = rows.with_columns(
        group=plan.group[user],
        cohort=np.where(plan.cohort[user], "major", "minor") if len(plan.cohort) else pl.lit("all"),
        role=query.astype(np.int8),
    )
    cohort, role = pl.col("cohort"), pl.col("role")
    parts = [
        frame(rows.filter(pl.col("group") == TRAIN), 0, "train", cohort, DRAWN),
        frame(rows.filter(pl.col("group") == VALID), 0, "valid", cohort, role),
        frame(rows.filter(pl.col("group") == NEW), 0, "test", cohort, role),
    ]
    return pl.concat(parts), dropped


PAML = Protocol("paml", 1, {"major_over": 2}, QUERY_SHARE, plan, tasks, compared=(("major", "minor"),))
