"""A parameter study: means over split seeds by value, and each value's paired difference to the default and the floors.

The result is plain data: OUT/STUDY.json holds it, study_page.py and studycharts.py show it.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from distmeta.errors import RunError
from distmeta.evaluation import significance
from distmeta.evaluation.measured import Measured
from distmeta.evaluation.metrics import means, task_metrics
from distmeta.evaluation.papertables import JUDGED
from distmeta.evaluation.studies import METRICS, Panel, Study

DEFAULT = "default"
"""In `paired`: the same curve at the parameter's default."""

Seeds = Sequence[Measured]
"""By split seed."""


@dataclass(frozen=True)
class Point:
    """One curve at one value."""

    splits: Mapping[str, Seeds]
    """What was measured, by split; empty where a run diverged."""
    failed: str = ""
    """What it said, where one did."""


@dataclass(frozen=True)
class Curves:
    """What was measured of one panel."""

    values: Sequence[Any]
    """In order."""
    default: Any
    """One of `values`."""
    points: Mapping[str, Sequence[Point]]
    """Label of the curve -> its points, by value."""
    floors: Sequence[Mapping[str, Seeds]]
    """By value: each floor of JUDGED on the same test tasks."""


def assemble(study: Study, measured: Mapping[str, Curves]) -> dict[str, Any]:
    """The study as plain data.

    Args:
        measured: name of a panel -> its curves; panels that were left out are not in it.

    Returns:
        {"study", "title", "protocol", "dataset", "splits", "notes", "panels": [{"name", "flag", "label", "paper",
        "same_tasks", "values", "default", "floors": {floor: [numbers, by value]}, "curves": [{"label", "points":
        [{"failed", "splits": {split: numbers}, "paired": {split: {against: {metric: [difference, low, high]}}}}, by
        value]}]}]}, where numbers: {metric: {"mean", "sd", "seeds"}, "n_tasks": [by seed]}; `against`: DEFAULT, a floor
        (of new tasks alone), or the first curve's label.

    Raises:
        RunError: what is to be compared was measured on other tasks.
    """
    return {
        "study": study.name,
        "title": study.title,
        "protocol": study.protocol,
        "dataset": study.dataset,
        "splits": list(study.splits),
        "panels": [_panel(panel, measured[panel.name]) for panel in study.panels if panel.name in measured],
        "notes": list(study.notes),
    }


def _panel(panel: Panel, found: Curves) -> dict[str, Any]:
    first = next(iter(found.points))
    curves = []
    for label, points in found.points.items():
        default = points[list(found.values).index(found.default)]
        made = []
        for i, point in enumerate(points):
            others = {DEFAULT: default} if panel.same_tasks and point is not default else {}
            others |= {first: found.points[first][i]} if label != first else {}
            paired = {split: _paired(point, others, found.floors[i], split) for split in point.splits}
            splits = {s: _numbers(seeds, s) for s, seeds in point.splits.items()}
            made.append({"failed": point.failed, "splits": splits, "paired": paired})
        curves.append({"label": label, "points": made})
    return {
        "name": panel.name,
        "flag": panel.flag,
        "label": panel.label,
        "paper": panel.paper,
        "same_tasks": panel.same_tasks,
        "values": list(found.values),
        "default": found.default,
        "floors": {floor: [_numbers(by[floor], "test") for by in found.floors] for floor in JUDGED},
        "curves": curves,
    }


def _numbers(seeds: Seeds, split: str) -> dict[str, Any]:
    """Each metric's mean over the tasks of a split, by split seed, and the mean and deviation of these."""
    frames = [_units(m, split) for m in seeds]
    by_seed = [means(frame) for frame in frames]
    found: dict[str, Any] = {"n_tasks": [len(frame) for frame in frames]}
    for metric in METRICS:
        values = [m[metric] for m in by_seed]
        known = [v for v in values if v is not None]
        sd = statistics.stdev(known) if len(known) > 1 else None
        found[metric] = {"mean": statistics.fmean(known) if known else None, "sd": sd, "seeds": values}
    return found


def _units(measured: Measured, split: str) -> pl.DataFrame:
    """task, then each metric: the tasks of one split, by task."""
    return task_metrics(measured.tasks.filter(pl.col("split") == split)).select("task", *METRICS)


def _paired(
    point: Point, others: Mapping[str, Point], floors: Mapping[str, Seeds], split: str
) -> dict[str, dict[str, significance.Interval]]:
    """Differences point − other and, of new tasks, point − floor, all split seeds together; on the same resamples."""
    theirs = {name: other.splits[split] for name, other in others.items() if other.splits}
    theirs |= {floor: floors[floor] for floor in JUDGED} if split == "test" else {}
    pairs = []
    for i, mine in enumerate(point.splits[split]):
        frame = _units(mine, split)
        a, b = [frame.select("task")], [frame.select("task")]
        for name, seeds in theirs.items():
            other = _units(seeds[i], split)
            if not other["task"].equals(frame["task"]):
                raise RunError(
                    f"{name}: was measured on other {split} tasks ({len(other)}, here {len(frame)}); a paired"
                    " difference needs the same, delete the runs and have them trained anew"
                )
            a.append(frame.select(pl.col(m).alias(f"{name} {m}") for m in METRICS))
            b.append(other.select(pl.col(m).alias(f"{name} {m}") for m in METRICS))
        pairs.append(((pl.concat(a, how="horizontal"),), (pl.concat(b, how="horizontal"),)))
    found = significance.pooled(pairs) if theirs else {}
    return {name: {m: found[f"{name} {m}"] for m in METRICS} for name in theirs}


def best(panel: Mapping[str, Any], curve: Mapping[str, Any], metric: str, split: str) -> int | None:
    """Position of the value at which a curve is best; None where nothing was measured."""
    known = [(p["splits"][split][metric]["mean"], i) for i, p in enumerate(curve["points"]) if not p["failed"]]
    known = [(mean, i) for mean, i in known if mean is not None]
    if not known:
        return None
    top = max(m for m, _ in known) if metric.startswith("ndcg") else min(m for m, _ in known)
    ties = [i for m, i in known if m == top]
    default = panel["values"].index(panel["default"])
    return default if default in ties else ties[0]
