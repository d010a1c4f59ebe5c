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

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95
MAX_UNITS = 50_000
"""More tasks than this are resampled in this many groups by a hash of the task id: random groups of tasks
have the same variance of the mean as the tasks themselves, and 10,000 resamples stay a matter of seconds."""

_CELLS = 1 << 22
"""Resampled positions held at a time, which bounds memory to tens of MB."""

Units = Sequence[pl.DataFrame]
"""Of one cohort (cohorts.Cohort.units): task, then metrics with one number a unit; in an order that all share."""

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


def against(mine: Units, others: Mapping[str, Units]) -> dict[str, dict[str, Interval]]:
    """Paired differences `mine` − other, for each other: metric -> [difference, low, high].

    The units of a frame are paired one by one (tasks, or rows, or clips of rows) and resampled by task: all units
    of a task are in a resample or none. Negative is better for errors, positive for ranking metrics.

    Raises:
        RunError: an other method was not measured on the same tasks.
    """
    found: dict[str, dict[str, Interval]] = {name: {} for name in others}
    if not others:
        return found
    for part, left in enumerate(mine):
        pairs = [_differences(left, other[part], name) for name, other in others.items()]
        measured = iter(intervals(left["task"].to_numpy(), np.column_stack(pairs)))
        for name in others:
            found[name] |= {metric: next(measured) for metric in left.columns[1:]}
    return found


def pooled(pairs: Sequence[tuple[Units, Units]]) -> dict[str, Interval]:
    """Paired differences a − b over several runs (split seeds) together: metric -> [difference, low, high].

    The differences of all runs are concatenated; a task that is tested in several runs is resampled as one.
    """
    found: dict[str, Interval] = {}
    for part, first in enumerate(pairs[0][0]):
        tasks = [a[part]["task"].to_numpy() for a, _ in pairs]
        apart = [_differences(a[part], b[part], "the second frame") for a, b in pairs]
        measured = intervals(np.concatenate(tasks), np.concatenate(apart))
        found |= dict(zip(first.columns[1:], measured, strict=True))
    return found


def _differences(a: pl.DataFrame, b: pl.DataFrame, name: str) -> NDArray[np.float64]:
    """Differences a − b of each metric, unit by unit: [n, m]."""
    if not a["task"].equals(b["task"]):
        raise RunError(
            f"{name}: was evaluated on other tasks ({len(b)} numbers, here {len(a)}); "
            "a paired difference needs the same split, evaluate both again"
        )
    names = a.columns[1:]
    return a.select(names).to_numpy() - b.select(names).to_numpy()
