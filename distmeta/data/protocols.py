"""Evaluation protocols: pure, versioned functions from a dataset's interactions to tasks (design §7).

A protocol first makes a `Plan` from the users and items alone (who is new, who validates, which items are
cold), then turns interactions of whole users into rows of tasks, chunk by chunk: a part bounds the memory.
Every choice is a counter hash of (split seed, user or task, row, purpose): it does not depend on the chunks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta import draws
from distmeta.config import DataOptions
from distmeta.errors import UserError
from distmeta.fields import nearest
from distmeta.storage import Location

SPLITS = ("train", "valid", "test", "seen")
"""`seen` holds training tasks again, for protocols that also evaluate on the tasks trained on."""

SUPPORT, QUERY, DRAWN = 0, 1, 2
"""Roles of a row. DRAWN: support or query, drawn anew by the loader each epoch."""

KINDS = 8
"""Task id = user · KINDS + kind, so that one user can have several tasks."""

SCHEMA = pl.Schema(
    {
        "task": pl.Int64,
        "user": pl.Int32,
        "split": pl.Enum(SPLITS),
        "cohort": pl.String,
        "item": pl.Int32,
        "label": pl.Float32,
        "time": pl.Int64,
        "role": pl.Int8,
    }
)
"""Columns of the long frame that a protocol makes: one row a task and interaction, in time order."""


@dataclass(frozen=True)
class Plan:
    """What a protocol decides before it sees any interaction."""

    split_seed: int
    options: Mapping[str, Any]
    group: NDArray[np.int8]
    """[users]: the protocol's own code of what becomes of each user."""
    cold_items: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """[items]: cold items, where the protocol has them."""


@dataclass(frozen=True)
class Protocol:
    """A named and versioned way to make tasks. A change of any task needs a new version."""

    name: str
    version: int
    options: Mapping[str, Any]
    """Options it knows, with their defaults (fields of `config.DataOptions`)."""
    query_rows: int
    """Query rows of a task, and of the loader's draw where a task's rows are DRAWN."""
    plan: Callable[[pl.DataFrame, pl.DataFrame, int, Mapping[str, Any]], Plan]
    """(users: user, raw_id; items: item, year where known (float or null); split seed; options) -> Plan."""
    tasks: Callable[[pl.DataFrame, Plan], tuple[pl.DataFrame, dict[str, int]]]
    """(interactions of whole users by (user, time); Plan) -> (frame of SCHEMA, why -> how many left out)."""
    episode: str = ""
    """The option that bounds the rows of an episode: the loader draws so many of a longer DRAWN task each epoch."""


def protocol(name: str) -> Protocol:
    """The protocol `name`; UserError naming the nearest one where there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}{nearest(name, PROTOCOLS)}; protocols: {' '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def protocol_options(data: DataOptions) -> dict[str, Any]:
    """The options in `data` that its protocol knows.

    Raises:
        UserError: one that only other protocols know was set, which would change nothing.
    """
    known = protocol(data.protocol).options
    for other in PROTOCOLS.values():
        for name, default in other.options.items():
            if name not in known and getattr(data, name) != default:
                raise UserError(
                    f"--{name.replace('_', '-')} is for protocol {other.name}, not {data.protocol}; leave it out, "
                    f"or choose --protocol {other.name}"
                )
    return {name: getattr(data, name) for name in known}


def _lowest(keys: NDArray[np.uint64], count: int, among: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Mask of the `count` lowest keys (ties by position) among the positions where `among` is true."""
    positions = np.arange(len(keys)) if among is None else np.flatnonzero(among)
    chosen = np.zeros(len(keys), bool)
    chosen[positions[np.argsort(keys[positions], kind="stable")[:count]]] = True
    return chosen


def _runs(group: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Position of each row within its run of equal neighbours, and the length of that run; both [rows]."""
    first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.zeros(0, np.int64)
    length = np.diff(np.r_[first, len(group)])
    return np.arange(len(group)) - np.repeat(first, length), np.repeat(length, length)


def _rank(group: NDArray[Any], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rank of each row's key among the rows of its run; `group` is sorted."""
    order = np.lexsort((keys, group))
    rank = np.empty(len(keys), np.int64)
    rank[order] = _runs(group)[0]
    return rank


def _frame(rows: pl.DataFrame, kind: Any, split: Any, cohort: Any, role: Any) -> pl.DataFrame:
    """Rows of one kind of task in SCHEMA; the others: a value or a polars expression."""
    made = {
        "split": split,
        "cohort": cohort,
        "role": role,
        "task": pl.col("user").cast(pl.Int64) * KINDS + kind,
    }
    made = {name: value if isinstance(value, pl.Expr) else pl.lit(value) for name, value in made.items()}
    return rows.with_columns(**made).select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())


# cmml-user: CMML §7.2 (user setting) and appendix. C-W: new users. W-W: held-out rows of training users.
# Who is evaluated keeps their first max_ratings by time. Who is trained on keeps all, of which an episode draws
# max_ratings: a service has its old users' whole history. clip_training clips them as well, as CMML's code does.

CMML_QUERY = 10
_TRAIN, _VALID, _NEW, _HELD_OUT = 0, 1, 2, 3


def _plan_cmml(users: pl.DataFrame, items: pl.DataFrame, split_seed: int, options: Mapping[str, Any]) -> Plan:
    if options["max_ratings"] < 2:
        raise UserError(
            f"max_ratings is {options['max_ratings']}; a task needs 2 ratings, and the papers keep 50 or 100"
        )
    n, user = len(users), np.arange(len(users))

    def keys(purpose: str) -> NDArray[np.uint64]:
        return draws.hashed(split_seed, user, purpose=f"cmml-user/{purpose}")

    new = _lowest(keys("test"), n - round(0.8 * n))
    valid = _lowest(keys("valid"), round(0.1 * (n - int(new.sum()))), ~new)
    held_out = _lowest(keys("held-out"), int(new.sum()), ~new & ~valid)
    group = np.full(n, _TRAIN, np.int8)
    group[valid], group[new], group[held_out] = _VALID, _NEW, _HELD_OUT
    return Plan(split_seed, options, group)


def _tasks_cmml(interactions: pl.DataFrame, plan: Plan) -> tuple[pl.DataFrame, dict[str, int]]:
    position, _ = _runs(interactions["user"].to_numpy())
    first = position < plan.options["max_ratings"]
    trained = np.isin(plan.group[interactions["user"].to_numpy()], (_TRAIN, _HELD_OUT))
    later = interactions.filter(pl.Series(~first & trained & (not plan.options["clip_training"])))
    rows = interactions.filter(pl.Series(first))
    user = rows["user"].to_numpy()
    position, count = _runs(user)
    keys = draws.hashed(plan.split_seed, user, position, purpose="cmml-user/query")
    query_rows = np.where(count < 2 * CMML_QUERY, count // 2, CMML_QUERY)
    query = _rank(user, keys) < query_rows
    rows = rows.with_columns(group=plan.group[user], query=query, count=count, role=query.astype(np.int8))
    dropped = {"users with fewer than 2 ratings": int((count == 1).sum())}
    rows = rows.filter(pl.col("count") >= 2)
    group, held_out = pl.col("group"), rows.filter(pl.col("group") == _HELD_OUT)
    rest = held_out.filter(~pl.col("query"))
    names = interactions.columns
    pool = pl.concat([rows.filter(group == _TRAIN).select(names), rest.select(names), later])
    single = pl.len().over("user") < 2
    dropped["W-W users with fewer than 2 ratings left to train on"] = pool.select(single.sum()).item()
    parts = [
        _frame(pool.filter(~single), 0, "train", "train", DRAWN),
        _frame(rows.filter(group == _VALID), 0, "valid", "C-W", pl.col("role")),
        _frame(rows.filter(group == _NEW), 0, "test", "C-W", pl.col("role")),
        _frame(held_out, 1, "test", "W-W", pl.col("role")),
    ]
    return pl.concat(parts), dropped


# melu: MeLU's four states, users warm/cold × items warm/cold, of 13 to 100 ratings, as its code makes them.

MELU_QUERY = 10
MELU_RATINGS = (13, 100)
MELU_COLD_YEAR = 1998
_STATES = ("warm", "user-cold", "item-cold", "both-cold")
_SEEN_KIND = len(_STATES)


def _plan_melu(users: pl.DataFrame, items: pl.DataFrame, split_seed: int, options: Mapping[str, Any]) -> Plan:
    n, user = len(users), np.arange(len(users))
    if options["cold_users"]:
        cold = _listed(users, Location.of(options["cold_users"]))
    else:
        cold = _lowest(draws.hashed(split_seed, user, purpose="melu/test"), n - round(0.8 * n))
    warm = int((~cold).sum())
    valid = _lowest(draws.hashed(split_seed, user, purpose="melu/valid"), round(0.1 * warm), ~cold)
    group = np.where(cold, _NEW, np.where(valid, _VALID, _TRAIN)).astype(np.int8)
    if "year" in items.columns:
        # An item without a year is warm, as in MeLU, whose cold list holds what is known to be new.
        cold_items = (items["year"] >= MELU_COLD_YEAR).fill_null(False).to_numpy()
    else:
        keys = draws.hashed(split_seed, np.arange(len(items)), purpose="melu/items")
        cold_items = _lowest(keys, len(items) - round(0.8 * len(items)))
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


def read_text(file: Location) -> str:
    """A text file; UserError where it cannot be read as UTF-8."""
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: not readable as a text file ({e}); give a file with one raw user id a line") from None


def _tasks_melu(interactions: pl.DataFrame, plan: Plan) -> tuple[pl.DataFrame, dict[str, int]]:
    user, item = interactions["user"].to_numpy(), interactions["item"].to_numpy()
    state = (plan.group[user] == _NEW) + 2 * plan.cold_items[item].astype(np.int64)
    task = user.astype(np.int64) * KINDS + state
    order = np.argsort(task, kind="stable")  # keeps a state's rows in time order
    rows, task = interactions[order], task[order]
    position, count = _runs(task)
    # MeLU shuffles a state's ratings and takes the last 10 as query; the hash is the shuffle.
    keys = draws.hashed(plan.split_seed, task, position, purpose="melu/query")
    query = _rank(task, keys) >= count - MELU_QUERY
    rows = rows.with_columns(group=plan.group[rows["user"].to_numpy()], state=state[order], role=query.astype(np.int8))
    kept = (count >= MELU_RATINGS[0]) & (count <= MELU_RATINGS[1])
    left_out = state[order][~kept & (position == 0)]
    dropped = {
        f"{name} states with fewer than {MELU_RATINGS[0]} or more than {MELU_RATINGS[1]} ratings": int(
            (left_out == s).sum()
        )
        for s, name in enumerate(_STATES)
    }
    rows = rows.filter(pl.Series(kept))
    warm, role = pl.col("state") == 0, pl.col("role")
    train = rows.filter(warm & (pl.col("group") == _TRAIN))
    names = pl.col("state").replace_strict(dict(enumerate(_STATES)), return_dtype=pl.String)
    parts = [
        _frame(train, 0, "train", "warm", role),
        _frame(rows.filter(warm & (pl.col("group") == _VALID)), 0, "valid", "warm", role),
        _frame(rows.filter(~warm), pl.col("state"), "test", names, role),
        _frame(train, _SEEN_KIND, "seen", "warm", role),
    ]
    return pl.concat(parts), dropped


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            "cmml-user",
            1,
            {"max_ratings": 100, "clip_training": False},
            CMML_QUERY,
            _plan_cmml,
            _tasks_cmml,
            episode="max_ratings",
        ),
        Protocol("melu", 1, {"cold_users": ""}, MELU_QUERY, _plan_melu, _tasks_melu),
    )
}
