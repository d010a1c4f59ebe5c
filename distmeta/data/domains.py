"""What surrounds the scenarios of a task table: who likes items of none of them, and which items each of them has."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from distmeta.data.encode import ragged
from distmeta.data.protocols import SPLITS
from distmeta.data.reading import Reading
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Surroundings:
    """Of all scenarios of a table, those to validate and test on among them."""

    user: Ints
    """Positives on items that no scenario has, each user and item once: users, by (user, item)."""
    item: Ints
    task: Ints
    """What each scenario has: tasks, each with its `candidate` once."""
    candidate: Ints


def surroundings(table: TaskTable) -> Surroundings:
    """One pass over the tasks' items and one over the interactions.

    Items of no scenario are asked about by nobody, so that their positives tell nothing that a list asks.

    Raises:
        UserError: a part is missing or damaged.
    """
    place = table.location.parent.parent
    dataset = Dataset.open(place)
    task, candidate = _candidates(table)
    free = np.ones(dataset.items, bool)
    free[candidate] = False
    positive = pl.col("label") > 0
    if dataset.label.kind != "click":
        positive = pl.col("label") >= table.options["positive_from"]
    outside = pl.DataFrame({"item": np.flatnonzero(free)}, schema={"item": pl.Int64})
    found = pl.DataFrame(schema={"user": pl.Int64, "item": pl.Int64})
    if len(outside):
        for chunk in Reading(place, dataset).interactions():
            rows = chunk.filter(positive).select(pl.col("user", "item").cast(pl.Int64))
            found = pl.concat([found, rows.join(outside, on="item", how="semi")]).unique()
    found = found.sort("user", "item")
    return Surroundings(found["user"].to_numpy(), found["item"].to_numpy(), task, candidate)


def _candidates(table: TaskTable) -> tuple[Ints, Ints]:
    """Tasks and items of all splits, each pair once."""
    pairs = pl.DataFrame(schema={"task": pl.Int64, "item": pl.Int64})
    for split in SPLITS:
        groups = [(v, range(len(g))) for v, g in enumerate(table.groups(split)) if g]
        for part in table.stream(split, groups, ["task", "item"]):
            item, count = ragged(part["item"], pa.int32())
            task = np.repeat(part["task"].to_numpy(), count)
            pairs = pl.concat([pairs, pl.DataFrame({"task": task, "item": item.astype(np.int64)}).unique()])
    pairs = pairs.unique().sort("task", "item")
    return pairs["task"].to_numpy(), pairs["item"].to_numpy()
