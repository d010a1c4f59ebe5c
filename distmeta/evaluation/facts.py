"""What a method says of each test task (Method.facts), summed up for evaluation.json and the report."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta.data.schema import Dataset, Field
from distmeta.data.tables import AGAIN, read_part, to_polars
from distmeta.data.tasktable import TaskTable
from distmeta.evaluation.measured import FACT, Measured
from distmeta.storage import Location

CLUSTER = "cluster"
"""The fact that is a group's number; any other is a quantity."""
SLOTS = "slots"
"""What the facts slot_0, slot_1, …, a task's attention to each slot of a memory, are together called."""
BINS = 40
MOST_VALUES = 24
"""A field with more values is no picture beside clusters or slots."""
TOP = 100
"""By how many tasks a slot is told (MAMO's Figure 5b has "the top 100 users")."""
NAMED = 3
"""How many values a slot's name has at most."""
BY_CHANCE = 0.001
"""A value names a slot if it is so frequent among the slot's tasks by this chance at most: with some thirty values one
slot in thirty is then named by chance."""
BOUNDS = {"entropy": (0.0, 1.0)}
"""The range of a quantity whose range is known."""
TRUTH = "planted_cluster"
"""The user field of a made data set that holds the true groups."""


def summary(measured: Measured, table: TaskTable, dataset: Dataset, place: Location) -> dict[str, Any]:
    """The facts of the split test, by name; none where the method has none.

    Args:
        place: where `dataset` lies.

    Returns:
        Of a quantity {"edges": [BINS + 1], "cohorts": {cohort: {"counts": [BINS], "n", "mean", "below_0"}}}, the last
        a share; of CLUSTER {"sizes": [K], "fields": {field: {"values": [V], "shares": [K][V], "ari"}}}: of each
        cluster's tasks the share with each value, and the adjusted Rand index of the two; of SLOTS what `_slots` gives.

    Raises:
        UserError: the task table or a vocabulary is damaged.
    """
    test = measured.tasks.filter(pl.col("split") == "test")
    facts: dict[str, list[str]] = {}
    for column in (c for c in test.columns if c.startswith(FACT)):
        name = column.removeprefix(FACT)
        facts.setdefault(SLOTS if re.fullmatch(r"slot_\d+", name) else name, []).append(column)
    found = {}
    for name, columns in facts.items():
        known = test.filter(pl.all_horizontal(pl.col(columns).is_finite().fill_null(False)))
        if known.height == 0:
            continue
        if name == CLUSTER:
            found[name] = _clusters(known, table, dataset, place)
        elif name == SLOTS:
            found[name] = _slots(known, columns, table, dataset, place)
        else:
            found[name] = _quantity(known, columns[0], BOUNDS.get(name))
    return found


def _quantity(tasks: pl.DataFrame, column: str, bounds: tuple[float, float] | None = None) -> dict[str, Any]:
    every = tasks[column].to_numpy()
    low, high = bounds or (float(every.min()), float(every.max()))
    if high - low <= 1e-6 * max(-low, high):  # one value but for rounding: not to be cut into bins
        around = 0.05 * max(-low, high) or 0.5
        low, high = low - around, high + around
    edges = np.linspace(low, high, BINS + 1)
    groups = {}
    for (cohort,), of in sorted(tasks.partition_by("cohort", as_dict=True).items()):
        values = of[column].to_numpy()
        groups[str(cohort)] = {
            "counts": np.histogram(values.clip(low, high), edges)[0].tolist(),
            "n": len(values),
            "mean": float(values.mean()),
            "below_0": float((values < 0).mean()),
        }
    return {"edges": edges.tolist(), "cohorts": groups}


def _clusters(tasks: pl.DataFrame, table: TaskTable, dataset: Dataset, place: Location) -> dict[str, Any]:
    cluster = tasks[FACT + CLUSTER].cast(pl.Int64).to_numpy()
    sizes, fields = np.bincount(cluster), {}
    for name, (values, index) in profiles(tasks, table, dataset, place).items():
        counts = contingency(cluster, index)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        fields[name] = {"values": values, "shares": shares.tolist(), "ari": adjusted_rand(cluster, index)}
    return {"sizes": sizes.tolist(), "fields": fields}


def _slots(
    tasks: pl.DataFrame, columns: Sequence[str], table: TaskTable, dataset: Dataset, place: Location
) -> dict[str, Any]:
    """What each slot of a memory stands for: the tasks that answer to it most, beside all (MAMO, Figure 5b).

    Returns:
        {"usage": [K] mean attention over the test tasks, "top": [K] how many tasks each slot is told by, "answer": [K]
        their mean attention to it, "fields": {field: {"values": [V], "shares": [K][V] among those, "overall": [V] among
        all}}, "names": [K] the values that its top tasks have more often than chance has it, as "age 18 ×2.1"; empty
        where there is none}. The top tasks are the TOP with most attention, no more than an even share of all so that
        slots can differ on few tasks, and whoever ties with the last of them.
    """
    from scipy.stats import hypergeom

    columns = sorted(columns, key=lambda c: int(c.rpartition("_")[2]))
    weights = tasks.select(columns).to_numpy().T
    most = min(TOP, -(-tasks.height // len(columns)))
    least = -np.partition(-weights, most - 1, axis=1)[:, most - 1]
    top = weights >= least[:, None]
    slot, task = np.nonzero(np.vstack([top, np.ones(tasks.height, bool)]))  # the last row: all tasks
    fields = {}
    told: list[list[tuple[float, float, str]]] = [[] for _ in columns]
    for name, (values, index) in profiles(tasks, table, dataset, place).items():
        counts = contingency(slot, index[task])
        shares = counts / counts.sum(1, keepdims=True)
        fields[name] = {"values": values, "shares": shares[:-1].tolist(), "overall": shares[-1].tolist()}
        chance = hypergeom.sf(counts[:-1] - 1, tasks.height, counts[-1], counts[:-1].sum(1, keepdims=True))
        for k, v in np.argwhere(chance <= BY_CHANCE):
            times = shares[k, v] / shares[-1, v]
            told[k].append((chance[k, v], -times, f"{name} {values[v]} ×{times:.1f}"))
    return {
        "usage": weights.mean(1).tolist(),
        "top": top.sum(1).tolist(),
        "answer": (np.where(top, weights, 0).sum(1) / top.sum(1)).tolist(),
        "fields": fields,
        "names": [", ".join(name for *_, name in sorted(of)[:NAMED]) for of in told],
    }


def profiles(
    tasks: pl.DataFrame, table: TaskTable, dataset: Dataset, place: Location
) -> dict[str, tuple[list[str], NDArray[np.int64]]]:
    """The values of each user field with few values, TRUTH first: those that some task has, and which of them each
    of the test tasks [n] has, in their order."""
    wanted = [f for f in dataset.user_fields if f.type == "categorical" and (f.size <= MOST_VALUES or f.name == TRUTH)]
    if not wanted:
        return {}
    wanted.sort(key=lambda f: f.name != TRUTH)
    parts = [to_polars(t) for t in table.read("test", columns=["task", *(f.name for f in wanted)])]
    users = tasks.select("task").join(pl.concat(parts), on="task", how="left", validate="1:1", maintain_order="left")
    found = {}
    for field in wanted:
        there, index = np.unique(users[field.name].to_numpy(), return_inverse=True)
        names = _vocabulary(field, place)
        found[field.name] = [names[v] for v in there], index
    return found


def _vocabulary(field: Field, place: Location) -> list[str]:
    file = place / f"vocabularies/user-{field.name}.parquet"
    return to_polars(read_part(file, ["value"], field.size, AGAIN))["value"].fill_null("unknown").to_list()


def contingency(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many have each pair of labels: [a.max() + 1, b.max() + 1]."""
    rows, columns = int(a.max()) + 1, int(b.max()) + 1
    return np.bincount(a * columns + b, minlength=rows * columns).reshape(rows, columns)


def adjusted_rand(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Adjusted Rand index of two labellings of the same n (Hubert & Arabie, 1985): 1 the same groups, 0 as by chance.

    1 too where both have one group, or both n groups.
    """
    counts = contingency(np.unique(a, return_inverse=True)[1], np.unique(b, return_inverse=True)[1])
    together, of_a, of_b = (float((n * (n - 1) / 2).sum()) for n in (counts, counts.sum(1), counts.sum(0)))
    pairs = len(a) * (len(a) - 1) / 2
    by_chance = of_a * of_b / pairs if pairs else 0.0
    most = (of_a + of_b) / 2
    return 1.0 if most == by_chance else (together - by_chance) / (most - by_chance)
