"""Errors, NDCG and click metrics of padded blocks of tasks, and how they are averaged (design §7).

Per task, over its query rows: Σ|ŷ − y|, Σ(ŷ − y)², NDCG@k; for clicks also AUC, NEL and Recall@N. `mae`, `mse`,
NDCG and the click metrics are means over tasks (MAMO Eq. 13–15, CMML, PAML); `mae_ratings` and `rmse` are pooled
over ratings (HML Eq. 4, 5), `auc_rows` and `nel_rows` over all rows.
"""

import math
from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

CUTOFFS = (1, 3, 5, 10)
"""The k of NDCG@k."""
RECALL_CUTOFFS = (10, 20, 50, 100)
"""The N of Recall@N."""

METRICS = ("mae", "mse", *(f"ndcg@{k}" for k in CUTOFFS))
"""Metrics that are one number a task, and therefore compared in pairs."""
CLICK_METRICS = ("auc", "nel", *(f"recall@{n}" for n in RECALL_CUTOFFS))
"""Those that clicks have besides."""
CLICK_COLUMNS = ("positives", "nll_positive", "nll_negative", "auc", *(f"recall@{n}" for n in RECALL_CUTOFFS))
"""What a per-task frame holds for them; `click_sums` gives it."""

CLIP = 1e-6
"""Predicted probabilities are clipped to [CLIP, 1 − CLIP] before their logarithm."""


def error_sums(prediction: Tensor, label: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Σ|ŷ − y| and Σ(ŷ − y)² over the real rows of each task: float64 [b] each, from [b, Q]."""
    error = torch.where(mask, prediction.double() - label.double(), 0.0)
    return error.abs().sum(1), error.square().sum(1)


def ndcg(prediction: Tensor, label: Tensor, mask: Tensor, cutoffs: Sequence[int] = CUTOFFS) -> Tensor:
    """NDCG@k of each task for each cutoff: float64 [b, len(cutoffs)], from [b, Q].

    Gain 2^y − 1; discount 1 / log2(rank + 1) up to rank k, 0 beyond; ideal = the same rows sorted by label.
    Rows with equal predictions share the mean discount of the ranks that they occupy, which is the
    expectation over all orders of the tied rows, so a constant predictor gets what a random order gets on
    average. Where no row has any gain (all labels 0) every order is as good as any other and NDCG is
    undefined: NaN, left out of means and counted.

    Args:
        prediction: finite on real rows.
        label: at least 0 on real rows.
        mask: bool, true on real rows, in any position.
    """
    gain = torch.where(mask, torch.exp2(label.double()) - 1, 0.0)
    ranked, first, last = _ranked(prediction, gain, mask)
    ideal = gain.sort(dim=1, descending=True).values
    rank = torch.arange(gain.shape[1], dtype=torch.float64, device=gain.device)
    columns = []
    for k in cutoffs:
        discount = torch.where(rank < k, 1 / torch.log2(rank + 2), 0.0)
        best = (ideal * discount).sum(1)
        columns.append(torch.where(best > 0, (ranked * _shared(discount, first, last)).sum(1) / best, math.nan))
    return torch.stack(columns, 1)


def recall(prediction: Tensor, label: Tensor, mask: Tensor, cutoffs: Sequence[int] = RECALL_CUTOFFS) -> Tensor:
    """Recall@N of each task for each cutoff: float64 [b, len(cutoffs)], from [b, Q] as for `ndcg`.

    Positives among the N query rows with the highest predictions / the task's positives. Tied rows share the
    places that they occupy, as in `ndcg`. NaN where a task has no positive row.
    """
    positive = (mask & (label > 0)).double()
    ranked, first, last = _ranked(prediction, positive, mask)
    rank = torch.arange(positive.shape[1], device=positive.device)
    total = positive.sum(1)
    columns = [(ranked * _shared((rank < n).double(), first, last)).sum(1) / total for n in cutoffs]
    return torch.stack(columns, 1)


def auc(prediction: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """Share of (positive, negative) pairs of a task's rows ranked right, ties counting half: float64 [b].

    The Mann–Whitney statistic by mid-ranks. NaN where a task has not both classes.
    """
    positive = (mask & (label > 0)).double()
    ranked, first, last = _ranked(prediction, positive, mask)
    rows, positives = mask.sum(1).double(), positive.sum(1)
    ascending = rows[:, None] - (first + last).double() / 2  # mid-rank from below, 1 = lowest
    wins = (ranked * ascending).sum(1) - positives * (positives + 1) / 2
    return wins / (positives * (rows - positives))


def click_sums(prediction: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """CLICK_COLUMNS of each task: float64 [b, len(CLICK_COLUMNS)], from [b, Q] as for `ndcg`.

    `nll_positive` is Σ −log p̂ over the positive rows, `nll_negative` Σ −log(1 − p̂) over the others.
    """
    positive = mask & (label > 0)
    p = prediction.double().clamp(CLIP, 1 - CLIP)
    sums = [
        positive.sum(1).double(),
        torch.where(positive, -p.log(), 0.0).sum(1),
        torch.where(mask & ~positive, -torch.log1p(-p), 0.0).sum(1),
        auc(prediction, label, mask),
    ]
    return torch.column_stack([*sums, recall(prediction, label, mask)])


def _ranked(prediction: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`value` [b, Q] by descending prediction, padding last, and the first and last position of each one's tie."""
    scores = torch.where(mask, prediction.double(), -math.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return value.gather(1, order), *_tied_runs(scores)


def _shared(worth: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """What each place [b, Q] is worth where a tie shares the mean worth [Q] of its places."""
    upto = torch.cat((worth.new_zeros(1), worth.cumsum(0)))
    return (upto[last + 1] - upto[first]) / (last + 1 - first)


def _tied_runs(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position of the run of equal neighbours around each entry of sorted rows: int64 [b, Q]
    each.
    """
    b, q = ordered.shape
    position = torch.arange(q, device=ordered.device).expand(b, q)
    edge = torch.ones(b, 1, dtype=torch.bool, device=ordered.device)
    change = ordered[:, 1:] != ordered[:, :-1]
    starts, ends = torch.cat((edge, change), 1)[:, :q], torch.cat((change, edge), 1)[:, :q]
    first = torch.where(starts, position, 0).cummax(1).values
    last = torch.where(ends, position, q - 1).flip(1).cummin(1).values.flip(1)
    return first, last


def task_metrics(frame: pl.DataFrame) -> pl.DataFrame:
    """`task` and its metrics, one row a task, by task, from a per-task frame; NaN where a metric is undefined.

    METRICS, and for clicks CLICK_METRICS, of which NEL is the class-weighted log loss, as PAML's appendix with its
    definition is absent: ½ (mean over positives of −log p̂ + mean over negatives of −log(1 − p̂)), for tasks with
    both classes.
    """
    n, positives = pl.col("n"), pl.col("positives")
    columns = [(pl.col("abs_sum") / n).alias("mae"), (pl.col("sq_sum") / n).alias("mse")]
    columns += [pl.col(name) for name in METRICS[2:]]
    if "positives" in frame.columns:
        both = (positives > 0) & (positives < n)
        nel = (pl.col("nll_positive") / positives + pl.col("nll_negative") / (n - positives)) / 2
        columns += [pl.col("auc"), pl.when(both).then(nel).otherwise(math.nan).alias("nel")]
        columns += [pl.col(name) for name in CLICK_METRICS[2:]]
    return frame.select("task", *columns).sort("task")


def means(units: pl.DataFrame) -> dict[str, Any]:
    """Mean of each metric over the units (tasks, rows or clips) where it is defined; None where it nowhere is."""
    names = [name for name in units.columns if name != "task"]
    return units.select(pl.col(names).fill_nan(None).mean()).row(0, named=True)


def summarise(frame: pl.DataFrame) -> dict[str, float | int | None]:
    """The metrics of one cohort from its per-task frame; None where nothing is defined.

    Returns:
        `task_metrics`: means over tasks (those where the metric is defined); mae_ratings and rmse: pooled over
        ratings; n_tasks; n_ratings; n_ranked: tasks whose NDCG is defined. For clicks also nel_rows, pooled over
        rows; n_positive: tasks with a positive, which Recall@N is the mean over; n_both: tasks with both classes,
        which AUC and NEL are the mean over.
    """
    sums = frame.select(pl.col(pl.Int64, pl.Float64).exclude("task").sum()).row(0, named=True)
    n = sums["n"]
    found: dict[str, float | int | None] = {**means(task_metrics(frame))}
    found["mae_ratings"] = sums["abs_sum"] / n if n else None
    found["rmse"] = math.sqrt(sums["sq_sum"] / n) if n else None
    counts = {"n_tasks": len(frame), "n_ratings": n}
    counts["n_ranked"] = int(frame[f"ndcg@{CUTOFFS[0]}"].is_not_nan().sum())
    if "positives" in frame.columns:
        positives, both = sums["positives"], 0 < sums["positives"] < n
        sides = (sums["nll_positive"] / positives, sums["nll_negative"] / (n - positives)) if both else ()
        found["nel_rows"] = sum(sides) / 2 if both else None
        counts["n_positive"] = int((frame["positives"] > 0).sum())
        counts["n_both"] = int(frame["auc"].is_not_nan().sum())
    return found | counts


def pooled_auc(rows: pl.DataFrame) -> float | None:
    """`auc` over all rows (columns score, label) together; None where they have not both classes."""
    positive = rows["label"] > 0
    n, positives = len(rows), int(positive.sum())
    if not 0 < positives < n:
        return None
    wins = float(rows["score"].rank("average").filter(positive).sum()) - positives * (positives + 1) / 2
    return wins / (positives * (n - positives))
