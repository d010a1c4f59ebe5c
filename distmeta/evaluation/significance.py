"""Paired differences of two methods on the same tasks, with a bootstrap interval over tasks.

A split alone moves MAE by ±.01, as much as most methods differ; on the same tasks that noise cancels.
Percentile bootstrap (Efron & Tibshirani 1993, ch. 13): 10,000 resamples of the tasks, seed 0, the middle 95 %
of their means.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta import draws
from distmeta.errors import RunError
from distmeta.evaluation.metrics import METRICS, task_metrics

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95
MAX_UNITS = 50_000
"""More tasks than this are resampled in this many groups by a hash of the task id: random groups of tasks
have the same variance of the mean as the tasks themselves, and 10,000 resamples stay a matter of seconds."""

_CELLS = 1 << 22
"""Resampled positions held at a time, which bounds memory to tens of MB."""

Interval = list[float | None]
"""[difference, low, high]; None where it is not defined (no pair at all; one pair has no interval)."""


def bootstrap(
    sums: NDArray[np.float64], counts: NDArray[np.float64], resamples: int = RESAMPLES, seed: int = SEED
) -> NDArray[np.float64]:
    """Percentile intervals of means, each column on the same resamples.

    Args:
        sums: [n, m] sum of the differences in each of n units (a unit: one task, or a group of them), for m
            columns.
        counts: [n] differences in each unit.

    Returns:
        [m, 3]: mean, low, high.
    """
    n = len(counts)
    # random_raw is the stream that numpy guarantees not to change; 32 bits times n, high word: bias below n /
    # 2^32.
    bits = np.random.PCG64(seed)
    rows = np.column_stack((sums, counts))
    means = np.empty((resamples, sums.shape[1]))
    chunk = max(1, _CELLS // n)
    for start in range(0, resamples, chunk):
        c = min(chunk, resamples - start)
        words = bits.random_raw((c * n + 1) // 2).view(np.uint32)[: c * n].astype(np.uint64)
        drawn = ((words * np.uint64(n)) >> np.uint64(32)).astype(np.int64).reshape(c, n)
        drawn += np.arange(c)[:, None] * n
        times = np.bincount(drawn.ravel(), minlength=c * n).reshape(c, n).astype(np.float64)
        total = times @ rows
        means[start : start + c] = total[:, :-1] / total[:, -1:]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return np.column_stack((sums.sum(0) / counts.sum(), low, high))


def intervals(task: NDArray[np.int64], differences: NDArray[np.float64]) -> list[Interval]:
    """[difference, low, high] of each column of `differences` [n, m]; NaNs are dropped column by column.

    Rows with the same task id (a user who is tested in several splits) are one unit of the bootstrap.
    """
    result: list[Interval] = [[None, None, None] for _ in range(differences.shape[1])]
    if not differences.size:
        return result
    valid = ~np.isnan(differences)
    patterns, column_pattern = np.unique(valid, axis=1, return_inverse=True)  # mostly one: no NaN anywhere
    for p in range(patterns.shape[1]):
        rows, columns = np.flatnonzero(patterns[:, p]), np.flatnonzero(column_pattern.ravel() == p)
        if not len(rows):
            continue
        unit = np.unique(task[rows], return_inverse=True)[1]
        if unit.max() >= MAX_UNITS:
            groups = draws.hashed(task[rows], purpose="bootstrap") % np.uint64(MAX_UNITS)
            unit = np.unique(groups, return_inverse=True)[1]
        values = differences[np.ix_(rows, columns)]
        sums = np.column_stack([np.bincount(unit, weights=v) for v in values.T]).astype(np.float64)
        found = bootstrap(sums, np.bincount(unit).astype(np.float64))
        for column, (mean, low, high) in zip(columns, found, strict=True):
            alone = len(sums) == 1
            result[column] = [float(mean), None if alone else float(low), None if alone else float(high)]
    return result


def against(frame: pl.DataFrame, others: Mapping[str, pl.DataFrame]) -> dict[str, dict[str, Interval]]:
    """Paired differences `frame` − other, for each other: metric -> [difference, low, high].

    Frames are per-task frames of the same tasks. Negative is better for errors, positive for NDCG.

    Raises:
        RunError: an other frame has not the same tasks.
    """
    if not others:
        return {}
    pairs = [_differences(frame, other, name) for name, other in others.items()]
    found = iter(intervals(pairs[0][0], np.column_stack([d for _, d in pairs])))
    return {name: {metric: next(found) for metric in METRICS} for name in others}


def pooled(pairs: Sequence[tuple[pl.DataFrame, pl.DataFrame]]) -> dict[str, Interval]:
    """Paired differences a − b over several runs (split seeds) together: metric -> [difference, low, high].

    The differences of all runs are concatenated; a task that is tested in several runs is resampled as one.
    """
    both = [_differences(a, b, "the second frame") for a, b in pairs]
    found = intervals(np.concatenate([t for t, _ in both]), np.concatenate([d for _, d in both]))
    return dict(zip(METRICS, found, strict=True))


def _differences(a: pl.DataFrame, b: pl.DataFrame, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Task ids [n], sorted, and differences a − b of METRICS [n, m]."""
    left, right = task_metrics(a).sort("task"), task_metrics(b).sort("task")
    if not left["task"].equals(right["task"]):
        raise RunError(
            f"{name}: was evaluated on other tasks ({len(right)} of them, here {len(left)}); "
            "a paired difference needs the same split, evaluate both again"
        )
    return left["task"].to_numpy(), left.select(METRICS).to_numpy() - right.select(METRICS).to_numpy()
