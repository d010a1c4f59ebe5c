"""From what was measured to cohorts: which units each metric is a mean over, and what is pooled besides.

A unit is what has one number: a task, or where a protocol has cohorts of rows (MAMO appendix A.2.3) a row for the
errors and a clip for NDCG: the cohort's rows sorted by (task, time), cut into clips of 5, the last one kept if it
has 3 or more. A clip belongs to the task of its first row.
Of scenarios a unit is a list, one a user and scenario.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch

from distmeta.evaluation.measured import Measured
from distmeta.evaluation.metrics import means, ndcg, pooled_auc, summarise, task_metrics

CLIP_ROWS, CLIP_LEAST, CLIP_CUTOFF = 5, 3, 3
"""Rows of a clip, rows that the last one needs, and the k of its NDCG@k."""


@dataclass(frozen=True)
class Cohort:
    """One cohort of one method."""

    units: tuple[pl.DataFrame, ...]
    """Each: task, then metrics with one number a unit. In an order that depends on the tasks alone."""
    summary: dict[str, float | int | None]
    """The cohort's metrics as evaluation.json has them."""


def cohorts(measured: Measured) -> dict[str, Cohort]:
    """`all`, which is every task of the split test, then the other cohorts: of rows, in the protocol's order, where
    there are any, else of tasks, by name.
    """
    tasks, rows = measured.tasks, measured.rows
    test = tasks.filter(pl.col("split") == "test")
    in_test = rows.filter(pl.col("split") == "test") if rows is not None else None
    if "user" in tasks.columns:  # a row is a list of a scenario
        by_kind = tasks.partition_by("cohort", as_dict=True)
        return {"all": _of_lists(test)} | {str(key[0]): _of_lists(by_kind[key]) for key in sorted(by_kind)}
    found = {"all": _of_tasks(test, in_test)}
    if in_test is not None and in_test["row_cohort"].null_count() < len(in_test):
        named = in_test.partition_by("row_cohort", as_dict=True)
        clicks = "positives" in tasks.columns
        order = in_test["row_cohort"].drop_nulls().unique().sort()  # an Enum sorts as the protocol names them
        return found | {name: _of_rows(named[name,], clicks) for name in order}
    named = tasks.partition_by("cohort", as_dict=True)
    for key in sorted(named):
        mine = rows.join(named[key].select("task"), on="task", how="semi") if rows is not None else None
        found[str(key[0])] = _of_tasks(named[key], mine)
    return found


def _of_tasks(tasks: pl.DataFrame, rows: pl.DataFrame | None) -> Cohort:
    summary = summarise(tasks)
    if "positives" in tasks.columns and rows is not None:
        summary["auc_rows"] = pooled_auc(rows)
    return Cohort((task_metrics(tasks),), summary)


def _of_lists(lists: pl.DataFrame) -> Cohort:
    names = [name for name in lists.columns if name.startswith("recall@")]
    ranked = lists.sort("task", "user").select("task", *names)
    counts = {"n_tasks": lists["task"].n_unique(), "n_lists": len(lists)}
    return Cohort((ranked,), means(ranked) | counts)


def _of_rows(rows: pl.DataFrame, clicks: bool) -> Cohort:
    error = pl.col("score") - pl.col("label")
    errors = rows.select("task", error.abs().alias("mae"), (error * error).alias("mse"))
    ranked = clips(rows)
    summary = means(errors) | means(ranked)
    summary["rmse"] = math.sqrt(summary["mse"])
    if clicks:
        summary["auc_rows"] = pooled_auc(rows)
    counts = {"n_tasks": rows["task"].n_unique(), "n_rows": len(rows), "n_clips": len(ranked)}
    return Cohort((errors, ranked), summary | counts)


def clips(rows: pl.DataFrame) -> pl.DataFrame:
    """NDCG@3 of each clip of a cohort's rows, sorted by (task, position): task of its first row, ndcg@3."""
    whole = len(rows) // CLIP_ROWS * CLIP_ROWS
    kept = len(rows) if len(rows) - whole >= CLIP_LEAST else whole
    n = -(-kept // CLIP_ROWS)
    padded = torch.zeros(2, n * CLIP_ROWS, dtype=torch.float64)
    for side, name in enumerate(("score", "label")):
        padded[side, :kept] = torch.from_numpy(rows[name][:kept].to_numpy().astype("float64"))
    mask = (torch.arange(n * CLIP_ROWS) < kept).reshape(n, CLIP_ROWS)
    score, label = padded.reshape(2, n, CLIP_ROWS)
    found = ndcg(score, label, mask, (CLIP_CUTOFF,))[:, 0]
    tasks = rows["task"][:kept].gather_every(CLIP_ROWS)
    return pl.DataFrame({"task": tasks, f"ndcg@{CLIP_CUTOFF}": found.numpy()}, schema_overrides={"task": pl.Int64})


def groups(measured: Measured, compared: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Two-tailed Student t-test between two cohorts' users, by their mean squared errors (PAML's experiments).

    Args:
        compared: pairs of cohorts of tasks.

    Returns:
        "A-B" -> {"mse": [A's, B's], "t", "p", "n": [users of A, of B]}; None where undefined: a cohort is empty, or
        one of the two has fewer than 2 users, or nobody's error differs from that of their cohort's others.
    """
    test = measured.tasks.filter(pl.col("split") == "test")
    found = {}
    for a, b in compared:
        mse = [task_metrics(test.filter(pl.col("cohort") == c))["mse"] for c in (a, b)]
        t, p = _t_test(*mse)
        found[f"{a}-{b}"] = {"mse": [m.mean() for m in mse], "t": t, "p": p, "n": [len(m) for m in mse]}
    return found


def _t_test(a: pl.Series, b: pl.Series) -> tuple[float | None, float | None]:
    if min(len(a), len(b)) < 2 or (a.n_unique() == 1 and b.n_unique() == 1):
        return None, None
    from scipy.stats import ttest_ind

    found: Any = ttest_ind(a.to_numpy(), b.to_numpy())
    return float(found.statistic), float(found.pvalue)


def matched(mine: Mapping[str, Cohort], other: Mapping[str, Cohort]) -> dict[str, Cohort]:
    """`other`'s cohorts under `mine`'s names; one that it has not is empty, and so cannot be compared."""
    return {
        name: other.get(name, Cohort(tuple(u.clear() for u in cohort.units), cohort.summary))
        for name, cohort in mine.items()
    }
