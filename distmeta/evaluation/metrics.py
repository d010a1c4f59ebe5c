"""Errors and NDCG of padded blocks of tasks, and how they are averaged over tasks (design §7).

Per task, over its query rows: Σ|ŷ − y|, Σ(ŷ − y)², NDCG@k. `mae`, `mse` and NDCG are means over tasks (MAMO
Eq. 13–15, CMML); `mae_ratings` and `rmse` are pooled over ratings (HML Eq. 4, 5).
"""

import math
from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

CUTOFFS = (1, 3, 5, 10)
"""The k of NDCG@k."""

METRICS = ("mae", "mse", *(f"ndcg@{k}" for k in CUTOFFS))
"""Metrics that are one number a task, and therefore compared in pairs."""


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
    scores = torch.where(mask, prediction.double(), -math.inf)  # padding ranks behind all
    gain = torch.where(mask, torch.exp2(label.double()) - 1, 0.0)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    ranked, ideal = gain.gather(1, order), gain.sort(dim=1, descending=True).values
    first, last = _tied_runs(scores)
    rank = torch.arange(scores.shape[1], dtype=torch.float64, device=scores.device)
    columns = []
    for k in cutoffs:
        discount = torch.where(rank < k, 1 / torch.log2(rank + 2), 0.0)
        upto = torch.cat((discount.new_zeros(1), discount.cumsum(0)))
        shared = (upto[last + 1] - upto[first]) / (last + 1 - first)
        best = (ideal * discount).sum(1)
        columns.append(torch.where(best > 0, (ranked * shared).sum(1) / best, math.nan))
    return torch.stack(columns, 1)


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
    """`task` and METRICS, one row a task, from a per-task frame; NaN where a metric is undefined."""
    return frame.select(
        "task",
        (pl.col("abs_sum") / pl.col("n")).alias("mae"),
        (pl.col("sq_sum") / pl.col("n")).alias("mse"),
        *(f"ndcg@{k}" for k in CUTOFFS),
    )


def summarise(frame: pl.DataFrame) -> dict[str, float | int | None]:
    """The metrics of one cohort from its per-task frame; None where nothing is defined.

    Returns:
        mae, mse, ndcg@k: means over tasks (those where the metric is defined); mae_ratings and rmse: pooled
        over ratings; n_tasks; n_ratings; n_ranked: tasks whose NDCG is defined.
    """
    n = int(frame["n"].sum())
    means = task_metrics(frame).select(pl.col(METRICS).fill_nan(None).mean()).row(0, named=True)
    pooled = {
        "mae_ratings": frame["abs_sum"].sum() / n if n else None,
        "rmse": math.sqrt(frame["sq_sum"].sum() / n) if n else None,
    }
    ranked = int(frame[f"ndcg@{CUTOFFS[0]}"].is_not_nan().sum())
    return {**means, **pooled, "n_tasks": len(frame), "n_ratings": n, "n_ranked": ranked}
