"""Metrics against hand-worked cases and all orders of tied rows; intervals against normal theory and plain
resampling."""

import itertools
import math
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from distmeta.errors import RunError
from distmeta.evaluation import significance
from distmeta.evaluation.metrics import (
    CLICK_METRICS,
    CUTOFFS,
    METRICS,
    auc,
    click_sums,
    error_sums,
    ndcg,
    pooled_auc,
    recall,
    summarise,
    task_metrics,
)


def _ndcg_of_order(labels: list[float], k: int) -> float:
    def dcg(values: list[float]) -> float:
        return sum((2**y - 1) / math.log2(rank + 2) for rank, y in enumerate(values[:k]))

    return dcg(labels) / dcg(sorted(labels, reverse=True))


def _brute_ndcg(prediction: list[float], label: list[float], k: int) -> float:
    """Mean over all orders of the rows that the predictions allow."""
    found = [
        _ndcg_of_order([label[i] for i in order], k)
        for order in itertools.permutations(range(len(label)))
        if all(prediction[a] >= prediction[b] for a, b in itertools.pairwise(order))
    ]
    return sum(found) / len(found)


def test_ndcg_by_hand() -> None:
    # Ranked 3, 5, 1: gains 7, 31, 1. DCG@2 = 7 + 31 / log2(3); ideal = 31 + 7 / log2(3).
    prediction, label = torch.tensor([[4.0, 3.0, 2.0]]), torch.tensor([[3.0, 5.0, 1.0]])
    expected = (7 + 31 / math.log2(3)) / (31 + 7 / math.log2(3))
    found = ndcg(prediction, label, torch.ones(1, 3, dtype=torch.bool), (1, 2))
    assert found[0].tolist() == pytest.approx([7 / 31, expected], abs=1e-12)


def test_ndcg_shares_discounts_among_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        q, width = int(rng.integers(1, 7)), 8
        prediction, label = rng.integers(1, 4, q).astype(float), rng.integers(1, 6, q).astype(float)
        # Padding anywhere, with values that would win if they were looked at.
        place = np.sort(rng.permutation(width)[:q])
        padded = [np.full(width, 99.0), np.full(width, 9.0), np.zeros(width, bool)]
        padded[0][place], padded[1][place], padded[2][place] = prediction, label, True
        scores, labels, mask = (torch.from_numpy(p)[None] for p in padded)
        found = ndcg(scores, labels, mask)[0]
        expected = [_brute_ndcg(prediction.tolist(), label.tolist(), k) for k in CUTOFFS]
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_ndcg_without_any_gain_is_undefined() -> None:
    found = ndcg(torch.rand(2, 3), torch.tensor([[0.0, 0, 0], [0, 1, 0]]), torch.ones(2, 3, dtype=torch.bool))
    assert found[0].isnan().all()
    assert not found[1].isnan().any()


def test_error_sums_leave_padding_out() -> None:
    mask = torch.tensor([[True, True, False]])
    absolute, squared = error_sums(torch.tensor([[1.0, 5.0, 77.0]]), torch.tensor([[2.0, 2.0, 0.0]]), mask)
    assert (absolute.tolist(), squared.tolist()) == ([4.0], [10.0])


def _frame(task: Any, error: Any, n: Any = 1, ndcg: Any = 0.5) -> pl.DataFrame:
    error = np.asarray(error, float)
    made = pl.DataFrame({"task": np.asarray(task, np.int64), "cohort": ["c"] * len(task), "n": np.full(len(task), n)})
    columns = {"abs_sum": np.abs(error) * n, "sq_sum": error**2 * n}
    columns |= {f"ndcg@{k}": np.broadcast_to(np.asarray(ndcg, float), len(task)) for k in CUTOFFS}
    return made.with_columns(**{k: pl.Series(v) for k, v in columns.items()})


def test_summary_weighs_users_or_ratings_as_each_metric_says() -> None:
    frame = pl.concat([_frame([1], [1.0], n=1, ndcg=0.2), _frame([2], [2.0], n=3, ndcg=math.nan)])
    found = summarise(frame)
    assert found["mae"] == pytest.approx((1 + 2) / 2)
    assert found["mae_ratings"] == pytest.approx((1 + 3 * 2) / 4)
    assert found["mse"] == pytest.approx((1 + 4) / 2)
    assert found["rmse"] == pytest.approx(math.sqrt((1 + 3 * 4) / 4))
    assert found["ndcg@3"] == pytest.approx(0.2)
    assert (found["n_tasks"], found["n_ratings"], found["n_ranked"]) == (2, 4, 1)
    empty = summarise(frame.clear())
    assert (empty["mae"], empty["rmse"], empty["n_tasks"]) == (None, None, 0)


def test_interval_is_that_of_normal_theory() -> None:
    x = np.random.default_rng(1).normal(0.03, 1.0, 2000)
    mean, low, high = significance.intervals(np.arange(2000), x[:, None])[0]
    half = 1.96 * x.std() / math.sqrt(2000)
    assert mean == pytest.approx(x.mean(), abs=1e-12)
    assert [low, high] == pytest.approx([x.mean() - half, x.mean() + half], abs=0.06 * half)


def test_interval_is_that_of_all_resamples() -> None:
    x = np.array([-1.0, 0.0, 0.5, 2.0, 4.0])
    every = np.array([np.mean(p) for p in itertools.product(x, repeat=5)])  # the exact bootstrap distribution
    mean, low, high = np.array(significance.intervals(np.arange(5), x[:, None])[0], float)
    assert mean == pytest.approx(x.mean())
    assert (every <= low).mean() == pytest.approx(0.025, abs=0.01)
    assert (every <= high).mean() == pytest.approx(0.975, abs=0.01)


def test_nan_pairs_are_dropped_column_by_column() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 2))
    with_nan = x.copy()
    with_nan[::5, 1] = np.nan
    both = significance.intervals(np.arange(50), with_nan)
    assert both[0] == pytest.approx(significance.intervals(np.arange(50), x)[0], abs=1e-12)
    kept = ~np.isnan(with_nan[:, 1])
    alone = significance.intervals(np.arange(50)[kept], with_nan[kept, 1:])[0]
    assert both[1] == pytest.approx(alone, abs=1e-12)
    assert significance.intervals(np.arange(3), np.full((3, 1), np.nan)) == [[None, None, None]]
    assert significance.intervals(np.arange(1), np.ones((1, 1))) == [[1.0, None, None]]


def test_many_tasks_are_resampled_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(3).normal(size=(3000, 1)) + 0.1
    alone = significance.intervals(np.arange(3000), x)[0]
    monkeypatch.setattr(significance, "MAX_UNITS", 500)
    grouped = significance.intervals(np.arange(3000), x)[0]
    assert grouped[0] == pytest.approx(alone[0], abs=1e-12)
    assert grouped[2] - grouped[1] == pytest.approx(alone[2] - alone[1], rel=0.1)  # type: ignore[operator]
    assert grouped != alone


def test_pooled_runs_widen_the_interval_where_they_share_users() -> None:
    x = np.random.default_rng(4).normal(size=400)
    a, b = _frame(range(400), x + 5), _frame(range(400), np.full(400, 5.0))
    other = a.with_columns(task=pl.col("task") + 1000), b.with_columns(task=pl.col("task") + 1000)
    units = [tuple((task_metrics(f),) for f in pair) for pair in ((a, b), other)]
    once, same = significance.pooled(units[:1])["mae"], significance.pooled([units[0], units[0]])["mae"]
    apart = significance.pooled(units)["mae"]
    assert same == pytest.approx(once)  # the same users again tell nothing new
    assert apart[0] == pytest.approx(once[0])
    assert (apart[2] - apart[1]) / (once[2] - once[1]) == pytest.approx(math.sqrt(0.5), rel=0.05)  # type: ignore[operator]


def test_comparison_needs_the_same_tasks() -> None:
    a = _frame([1, 2, 3], [1.0, 2.0, 3.0])
    mine, swapped, fewer = ((task_metrics(f),) for f in (a, a.reverse(), a.head(2)))
    assert significance.against(mine, {"x": swapped})["x"] == {m: [0.0, 0.0, 0.0] for m in METRICS}
    with pytest.raises(RunError, match="floor-x: was evaluated on other tasks"):
        significance.against(mine, {"floor-x": fewer})


def test_units_of_a_task_are_resampled_together() -> None:
    """Each task's difference ten times over: as many rows as tell nothing new leave the interval as it is."""
    x = np.random.default_rng(5).normal(size=300)
    alone = pl.DataFrame({"task": np.arange(300), "mae": x})
    rows = alone.select(pl.all().repeat_by(10).explode())
    zero = (alone.with_columns(mae=pl.lit(0.0)),), (rows.with_columns(mae=pl.lit(0.0)),)
    once = significance.against((alone,), {"x": zero[0]})["x"]["mae"]
    assert significance.against((rows,), {"x": zero[1]})["x"]["mae"] == pytest.approx(once, abs=1e-12)


def _brute_auc(score: np.ndarray, positive: np.ndarray) -> float:
    wins = np.sign(score[positive][:, None] - score[~positive]) / 2 + 0.5
    return float(wins.mean())


def _brute_recall(score: np.ndarray, positive: np.ndarray, n: int) -> float:
    """Mean over all orders of the rows that the scores allow."""
    orders = [
        order
        for order in itertools.permutations(range(len(score)))
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order))
    ]
    return float(np.mean([positive[list(order[:n])].sum() / positive.sum() for order in orders]))


def test_click_metrics_by_brute_force() -> None:
    """Ties, padding anywhere, tasks of one class: AUC over all pairs, Recall@N over all orders, NEL by definition."""
    rng = np.random.default_rng(6)
    width, tasks = 8, 60
    score, label = rng.integers(0, 4, (tasks, width)) / 3, rng.integers(0, 2, (tasks, width)).astype(float)
    mask = rng.random((tasks, width)) < 0.7
    mask[:, 0] = True
    padded = torch.from_numpy(np.where(mask, score, 99)), torch.from_numpy(np.where(mask, label, 1))
    given = *padded, torch.from_numpy(mask)
    aucs, recalls, sums = auc(*given), recall(*given, (1, 3)), click_sums(*given)
    for t in range(tasks):
        s, positive = score[t, mask[t]], label[t, mask[t]] > 0
        p = np.clip(s, 1e-6, 1 - 1e-6)
        assert sums[t, 0] == positive.sum()
        assert sums[t, 1:3].tolist() == pytest.approx([-np.log(p[positive]).sum(), -np.log(1 - p[~positive]).sum()])
        if positive.any() and not positive.all():
            assert aucs[t].item() == pytest.approx(_brute_auc(s, positive), abs=1e-12)
        else:
            assert aucs[t].isnan()
        if positive.any():
            expected = [_brute_recall(s, positive, n) for n in (1, 3)]
            assert recalls[t].tolist() == pytest.approx(expected, abs=1e-12)
        else:
            assert recalls[t].isnan().all()
    rows = pl.DataFrame({"score": score[mask], "label": label[mask]})
    assert pooled_auc(rows) == pytest.approx(_brute_auc(score[mask], label[mask] > 0), abs=1e-12)
    assert pooled_auc(rows.filter(pl.col("label") > 0)) is None


def test_click_summary_by_hand() -> None:
    """Task 1: p = .8 for a click, .4 and .1 for none; task 2: .5 for two clicks; task 3: .5 for none."""
    score = torch.tensor([[0.8, 0.4, 0.1], [0.5, 0.5, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    label = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    columns = ["positives", "nll_positive", "nll_negative", "auc", *CLICK_METRICS[2:]]
    frame = pl.concat(
        [_frame([1, 2, 3], [0.0] * 3), pl.DataFrame(click_sums(score, label, mask).numpy(), schema=columns)],
        how="horizontal",
    ).with_columns(n=pl.Series([3, 2, 1]))
    found = summarise(frame)
    assert found["nel"] == pytest.approx((-math.log(0.8) - (math.log(0.6) + math.log(0.9)) / 2) / 2)
    negatives = -(math.log(0.6) + math.log(0.9) + math.log(0.5)) / 3
    assert found["nel_rows"] == pytest.approx((-(math.log(0.8) + 2 * math.log(0.5)) / 3 + negatives) / 2)
    assert (found["auc"], found["recall@10"], found["n_positive"], found["n_both"]) == (1.0, 1.0, 2, 1)
    assert set(CLICK_METRICS) <= set(task_metrics(frame).columns)
    assert not set(CLICK_METRICS) & set(summarise(_frame([1], [1.0])))
