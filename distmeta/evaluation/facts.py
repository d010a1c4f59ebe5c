"""What a method says of each test task (Method.facts), summed up for evaluation.json and the report."""

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
BINS = 40
MOST_VALUES = 24
"""A field with more values is no picture beside clusters."""
TRUTH = "planted_cluster"
"""The user field of a made data set that holds the true groups."""


def summary(measured: Measured, table: TaskTable, dataset: Dataset, place: Location) -> dict[str, Any]:
    """The facts of the split test, by name; none where the method has none.

    Args:
        place: where `dataset` lies.

    Returns:
        Of a quantity {"edges": [BINS + 1], "cohorts": {cohort: {"counts": [BINS], "n", "mean", "below_0"}}}, the last
        a share; of CLUSTER {"sizes": [K], "fields": {field: {"values": [V], "shares": [K][V], "ari"}}}: of each
        cluster's tasks the share with each value, and the adjusted Rand index of the two.

    Raises:
        UserError: the task table or a vocabulary is damaged.
    """
    test = measured.tasks.filter(pl.col("split") == "test")
    names = [c.removeprefix(FACT) for c in test.columns if c.startswith(FACT)]
    found = {}
    for name in names:
        known = test.filter(pl.col(FACT + name).is_finite().fill_null(False))
        if known.height:
            found[name] = _clusters(known, table, dataset, place) if name == CLUSTER else _quantity(known, FACT + name)
    return found


def _quantity(tasks: pl.DataFrame, column: str) -> dict[str, Any]:
    edges = np.histogram_bin_edges(tasks[column].to_numpy(), BINS)
    groups = {}
    for (cohort,), of in sorted(tasks.partition_by("cohort", as_dict=True).items()):
        values = of[column].to_numpy()
        groups[str(cohort)] = {
            "counts": np.histogram(values, edges)[0].tolist(),
            "n": len(values),
            "mean": float(values.mean()),
            "below_0": float((values < 0).mean()),
        }
    return {"edges": edges.tolist(), "cohorts": groups}


def _clusters(tasks: pl.DataFrame, table: TaskTable, dataset: Dataset, place: Location) -> dict[str, Any]:
    tasks = tasks.select("task", pl.col(FACT + CLUSTER).cast(pl.Int64).alias(CLUSTER))
    wanted = [f for f in dataset.user_fields if f.type == "categorical" and (f.size <= MOST_VALUES or f.name == TRUTH)]
    wanted.sort(key=lambda f: f.name != TRUTH)
    sizes = np.bincount(tasks[CLUSTER].to_numpy())
    fields = {}
    if wanted:
        parts = [to_polars(t) for t in table.read("test", columns=["task", *(f.name for f in wanted)])]
        users = tasks.join(pl.concat(parts), on="task", how="left", validate="1:1")
        fields = {f.name: _against(users, f, len(sizes), place) for f in wanted}
    return {"sizes": sizes.tolist(), "fields": fields}


def _against(users: pl.DataFrame, field: Field, clusters: int, place: Location) -> dict[str, Any]:
    """One field's part of `summary`; values that no task has are left out."""
    cluster, value = users[CLUSTER].to_numpy(), users[field.name].to_numpy()
    file = place / f"vocabularies/user-{field.name}.parquet"
    names = to_polars(read_part(file, ["value"], field.size, AGAIN))["value"].fill_null("unknown").to_list()
    there, index = np.unique(value, return_inverse=True)
    counts = contingency(cluster, index)
    assert len(counts) == clusters
    return {
        "values": [names[v] for v in there],
        "shares": (counts / np.maximum(counts.sum(1, keepdims=True), 1)).tolist(),
        "ari": adjusted_rand(cluster, index),
    }


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
