"""A paper's table reproduced: its numbers and ours over split seeds, and what differs from the floors user by user.

The result is plain data: OUT/TABLE.json holds it, and reproduction_page.py shows it.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from distmeta.evaluation.cohorts import cohorts, groups
from distmeta.evaluation.evaluate import pooled
from distmeta.evaluation.measured import Measured
from distmeta.evaluation.papertables import Column, PaperTable, Section

P = "p"
"""The metric of a column that is the p-value of the t-test between two groups."""
PAIRED = {"mae_ratings": "mae", "rmse": "mse"}
"""Metrics over ratings, and the one by user that a paired difference stands for them."""
HIGHER = ("ndcg", "auc", "recall")
"""What the names of metrics begin with of which more is better."""

Seeds = Sequence[Measured]
"""One method on one data set, by split seed."""


def assemble(
    table: PaperTable,
    ours: Mapping[str, Mapping[str, Seeds]],
    floors: Mapping[str, Mapping[str, Seeds]],
    compared: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """The table as plain data.

    Args:
        ours: data set -> label of `table.ours` -> what was measured on each split seed. Data sets and labels that
            were left out are not in it.
        floors: data set -> floor -> the same, on the same tasks.
        compared: the pairs of cohorts whose users the protocol compares.

    Returns:
        {"table", "title", "protocol", "digits", "confidence", "percent", "notes", "key", "judged", "sections":
        [{"title", "cohort", "columns", "counts", "rows", "paired"}]}, where
        key: [section, column, column of the paper's number beside it], as `papertables.Key`;
        columns: [{"dataset", "metric", "head", "cohort", "table", "ours"}], as `papertables.Column`;
        rows: [{"label", "method" (None: none of ours), "floor", "paper": [[mean, sd] | None], "ours": [{"mean", "sd",
        "seeds"} | None]}], of a p-value "seeds" alone; only rows that have a number;
        paired: [{"label", "against": a floor or another label, "differences": [[difference, low, high] | None]}];
        counts: data set -> by split seed {"n_tasks", and of a cohort of rows "n_rows", "n_clips", of scenarios
        "n_lists"};
        the inner lists by column. The paper's sd is what it prints after ±.
    """
    every = {d: {**{table.floors[f]: seeds for f, seeds in floors[d].items()}, **mine} for d, mine in ours.items()}
    numbers = {
        dataset: {name: [_summaries(m, compared) for m in seeds] for name, seeds in there.items()}
        for dataset, there in every.items()
    }
    others = {o.label: (*table.judged, *o.against) for o in table.ours}
    differences = {
        dataset: {label: _differences(seeds, others[label], every[dataset]) for label, seeds in mine.items()}
        for dataset, mine in ours.items()
    }
    return {
        "table": table.name,
        "title": table.title,
        "protocol": table.protocol,
        "digits": table.digits,
        "confidence": table.confidence,
        "percent": table.percent,
        "sections": [_section(table, section, numbers, differences) for section in table.sections],
        "notes": list(table.notes),
        "key": [[k.section, k.column, k.column if k.paper is None else k.paper] for k in table.key],
        "judged": list(table.judged),
    }


def _differences(seeds: Seeds, names: Sequence[str], others: Mapping[str, Seeds]) -> dict[str, dict[str, Any]]:
    """`evaluate.pooled` against those of `names` that are among `others`, rows left out of this call are not."""
    there = [name for name in names if name in others]
    return pooled([(m, {name: others[name][i] for name in there}) for i, m in enumerate(seeds)])


def _summaries(measured: Measured, compared: Sequence[Sequence[str]]) -> dict[str, Mapping[str, Any]]:
    """Cohort -> its metrics; under P the t-tests' p-values by pair."""
    found: dict[str, Mapping[str, Any]] = {name: cohort.summary for name, cohort in cohorts(measured).items()}
    return found | {P: {pair: test["p"] for pair, test in groups(measured, compared).items()}}


def _section(
    table: PaperTable, section: Section, numbers: Mapping[str, Any], differences: Mapping[str, Any]
) -> dict[str, Any]:
    columns = table.columns_of(section)
    papers = section.rows(len(columns))
    mine = [o for o in table.ours if o.label in section.ours or not section.ours]
    methods, floors = {o.label: o.method for o in mine}, {label: name for name, label in table.floors.items()}
    rows = []
    for label in dict.fromkeys([*papers, *methods, *floors]):
        paper = papers.get(label) or [None] * len(columns)
        ours = [_ours(numbers.get(c.dataset, {}).get(label), c, section) for c in columns]
        if any(paper) or any(ours):
            rows.append(
                {
                    "label": label,
                    "method": floors.get(label) or methods.get(label),
                    "floor": label in floors,
                    "paper": [None if p is None else [p.mean, p.sd] for p in paper],
                    "ours": ours,
                }
            )
    paired = []
    for o in mine:
        for other in (*table.judged, *o.against):
            found = [_difference(differences.get(c.dataset, {}).get(o.label), other, c, section) for c in columns]
            if any(found):
                paired.append({"label": o.label, "against": other, "differences": found})
    there = {c.dataset: numbers[c.dataset] for c in columns if c.ours and c.dataset in numbers}
    counts = {d: [_counts(s.get(section.cohort, {})) for s in next(iter(by.values()))] for d, by in there.items()}
    return {
        "title": section.title,
        "cohort": section.cohort,
        "columns": [dataclasses.asdict(c) for c in columns],
        "counts": counts,
        "rows": rows,
        "paired": paired,
    }


def _counts(summary: Mapping[str, Any]) -> dict[str, int]:
    return {name: summary[name] for name in ("n_tasks", "n_rows", "n_clips", "n_lists") if name in summary}


def _ours(seeds: Sequence[Mapping[str, Any]] | None, column: Column, section: Section) -> dict[str, Any] | None:
    """One cell of ours; None where nothing was run, or nobody is in the cohort."""
    if seeds is None or not column.ours:
        return None
    if column.metric == P:
        values = [p for s in seeds for p in s[P].values()]
        return {"mean": None, "sd": None, "seeds": values} if any(v is not None for v in values) else None
    summaries = [s.get(column.cohort or section.cohort, {}) for s in seeds]
    values = [s.get(column.metric, s.get("mae") if column.metric == "mae_ratings" else None) for s in summaries]
    known = [v for v in values if v is not None]
    if not known:
        return None
    sd = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "sd": sd, "seeds": values}


def _difference(
    found: Mapping[str, Any] | None, other: str, column: Column, section: Section
) -> list[float | None] | None:
    """[difference, low, high] of a column; None where it has none by user, or nobody is in the cohort."""
    if found is None or column.metric == P or not column.ours:
        return None
    metrics = found.get(column.cohort or section.cohort, {}).get(other, {})
    interval = metrics.get(PAIRED.get(column.metric, column.metric))
    return interval if interval and interval[0] is not None else None


def best(rows: Sequence[Mapping[str, Any]], column: int, metric: str, side: str) -> list[int]:
    """Positions of the rows whose mean in `column` is best, of the paper's (`paper`) or of ours (`ours`)."""
    if metric == P:
        return []
    cells = [row[side][column] for row in rows]
    means = [None if c is None else c["mean"] if side == "ours" else c[0] for c in cells]
    known = [m for m in means if m is not None]
    if not known:
        return []
    top = max(known) if metric.startswith(HIGHER) else min(known)
    return [i for i, m in enumerate(means) if m == top]
