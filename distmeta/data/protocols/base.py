"""What a protocol is made of: what it plans from, what it decides, and the small steps that all of them take.

Every choice is a counter hash of (split seed, user or task, row, purpose): it does not depend on the chunks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta import remote
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.storage import Location

SPLITS = ("train", "valid", "test", "seen")
"""`seen` holds training tasks again, for protocols that also evaluate on the tasks trained on."""

SUPPORT, QUERY, DRAWN, OFFERED = 0, 1, 2, 3
"""Roles of a row. DRAWN: support or query, drawn anew by the loader each epoch. OFFERED: a candidate of a scenario that
no other row of the task has; its user is −1."""

KINDS = 8
"""Task id = user (or scenario) · KINDS + kind, so that one user can have several tasks."""

TRAIN, VALID, NEW = 0, 1, 2
"""What becomes of a user (`Plan.group`) in every protocol; each may add codes of its own."""

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
        "row_cohort": pl.Int8,
    }
)
"""Columns of the long frame that a protocol makes: one row a task and interaction, in time order.

`row_cohort` is a position in the protocol's `row_cohorts`, or null throughout where it has none.
"""


@dataclass(frozen=True)
class Source:
    """The dataset that a protocol plans from."""

    manifest: Dataset
    where: Location
    users: pl.DataFrame
    """user, raw_id and the user's fields, as users/ holds them."""
    items: pl.DataFrame
    """item, and year where known (float or null)."""
    vocabulary: Callable[[str], pl.Series]
    """What the indices of a user field stand for; the first, the unknown value, is null."""
    chunks: Callable[[], Iterator[pl.DataFrame]]
    """One pass over the interactions: user, item, label, time (and scenario, where the dataset has its own), of whole
    users by (user, time). A plan that makes a pass keeps what it counts by user and by item, never rows."""
    field: Callable[[str], pl.DataFrame]
    """An item field that is not numeric -> item, value: one row a known value of an item, as text."""
    scenarios: Callable[[], pl.Series]
    """The names of the dataset's own scenarios."""


@dataclass(frozen=True)
class Plan:
    """What a protocol decides before it makes any task."""

    split_seed: int
    options: Mapping[str, Any]
    group: NDArray[np.int8]
    """[users] or [scenarios]: what becomes of each, TRAIN, VALID, NEW or a code of the protocol's own."""
    cold_items: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """[items]: cold items, where the protocol has them."""
    cohort: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """[users]: which of two kinds of users each is, where the protocol tells them apart."""
    notes: dict[str, str] = field(default_factory=dict)
    """What was decided from the data, in words; the task table's manifest keeps it."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Why -> how many were left out already."""
    names: dict[int, str] = field(default_factory=dict)
    """What a report calls test tasks, by task id, where they have names; the manifest keeps them."""
    more: Any = None
    """What else the protocol's tasks need."""


@dataclass(frozen=True)
class Protocol:
    """A named and versioned way to make tasks. A change of any task needs a new version."""

    name: str
    version: int
    options: Mapping[str, Any]
    """Options it knows, with their defaults (fields of `config.DataOptions`)."""
    query_rows: float
    """Query rows that the loader draws of a task whose rows are DRAWN; below 1: that share of the rows."""
    plan: Callable[[Source, int, Mapping[str, Any]], Plan]
    """(dataset; split seed; options) -> Plan."""
    tasks: Callable[[pl.DataFrame, Plan], tuple[pl.DataFrame, dict[str, int]]]
    """(interactions of whole users by (user, time); Plan) -> (frame of SCHEMA, why -> how many left out)."""
    episode: str = ""
    """The option that bounds the rows of an episode: the loader draws so many of a longer DRAWN task each epoch."""
    row_cohorts: tuple[str, ...] = ()
    """Cohorts of query rows, for protocols that report by row and not by task."""
    compared: tuple[tuple[str, str], ...] = ()
    """Pairs of cohorts whose users' errors a t-test compares; their names have no hyphen."""
    chunks: Callable[[Source, Plan], Iterator[pl.DataFrame]] | None = None
    """What `tasks` is called with in turn, where tasks are scenarios; none: tasks are users, it gets whole users."""
    sizes: Callable[[Mapping[str, Any]], Mapping[str, int]] = lambda options: {}
    """Options -> query_rows, episode_rows and draws of the task table, where they depend on them."""


def lowest(keys: NDArray[np.uint64], count: int, among: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Mask of the `count` lowest keys (ties by position) among the positions where `among` is true."""
    positions = np.arange(len(keys)) if among is None else np.flatnonzero(among)
    chosen = np.zeros(len(keys), bool)
    chosen[positions[np.argsort(keys[positions], kind="stable")[:count]]] = True
    return chosen


def runs(group: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Position of each row within its run of equal neighbours, and the length of that run; both [rows]."""
    first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.zeros(0, np.int64)
    length = np.diff(np.r_[first, len(group)])
    return np.arange(len(group)) - np.repeat(first, length), np.repeat(length, length)


def rank(group: NDArray[Any], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rank of each row's key among the rows of its run; `group` is sorted."""
    order = np.lexsort((keys, group))
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = runs(group)[0]
    return ranks


def frame(rows: pl.DataFrame, kind: Any, split: Any, cohort: Any, role: Any, row_cohort: Any = None) -> pl.DataFrame:
    """Rows of one kind of task in SCHEMA; the others: a value or a polars expression."""
    made = {
        "split": split,
        "cohort": cohort,
        "role": role,
        "row_cohort": row_cohort,
        "task": pl.col("user").cast(pl.Int64) * KINDS + kind,
    }
    made = {name: value if isinstance(value, pl.Expr) else pl.lit(value) for name, value in made.items()}
    return rows.with_columns(**made).select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())


def read_text(file: Location) -> str:
    """A text file; UserError where it cannot be read as UTF-8."""
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as e:
        remote.let_pass(e)
        raise UserError(f"{file}: not readable as a text file ({e}); give a file with one raw user id a line") from None
