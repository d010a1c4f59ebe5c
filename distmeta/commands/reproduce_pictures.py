"""The pictures of a reproduced table: errors user by user, and the users' embeddings by group."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta.commands.reproduce_runs import Run
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.evaluation import groupcharts, plane
from distmeta.evaluation.measured import Measured
from distmeta.evaluation.metrics import task_metrics
from distmeta.evaluation.papertables import HEADS, JUDGED, PaperTable
from distmeta.evaluation.report import figure
from distmeta.parallel import rundir
from distmeta.storage import Location

Seeds = Mapping[str, Sequence[Measured]]


def figures(
    table: PaperTable,
    planned: Sequence[Run],
    places: Mapping[str, Location],
    datasets: Mapping[str, Dataset],
    ours: Mapping[str, Seeds],
    floors: Mapping[str, Seeds],
    tables: Mapping[tuple[str, int], TaskTable],
) -> list[str]:
    """<figure> elements.

    Args:
        ours, floors: data set -> row -> what was measured, by split seed. tables: (data set, split seed) -> its tasks.
    """
    found = []
    if table.boxes:
        by_group = any(column.cohort for column in table.columns)
        for dataset, mine in ours.items():
            found.append(_boxes(dataset, {**mine, **{f: floors[dataset][f] for f in JUDGED}}, by_group))
    if table.maps:
        for i, run in enumerate(r for r in planned if r.seed == 0):
            place, data = places[run.dataset], datasets[run.dataset]
            found += _map(run, data, place, tables[run.dataset, 0], f"map {i}")
    return found


def _boxes(dataset: str, methods: Seeds, by_group: bool) -> str:
    values = {name: _errors(seeds, by_group) for name, seeds in methods.items()}
    head = HEADS.get(dataset, dataset)
    svg = groupcharts.boxes(values, "mean squared error of a user", f"boxes {dataset}")
    caption = (
        "Each test user’s mean squared error, all split seeds together: box from the first to the third quartile, line"
        " at the median, whiskers to the last user within 1.5 box lengths, dots beyond (PAML, Figures 5 and 6)."
    )
    return figure(svg, f"Errors by user, {escape(head)}", caption)


def _errors(seeds: Sequence[Measured], by_group: bool) -> dict[str, NDArray[np.float64]]:
    tasks = pl.concat([m.tasks.filter(pl.col("split") == "test") for m in seeds], how="diagonal")
    if not by_group:
        return {"all": task_metrics(tasks)["mse"].to_numpy()}
    groups = sorted(tasks.partition_by("cohort", as_dict=True).items())
    return {str(cohort): task_metrics(of)["mse"].to_numpy() for (cohort,), of in groups}


def _map(run: Run, dataset: Dataset, place: Location, table: TaskTable, name: str) -> list[str]:
    """One picture, or none for a method without embeddings of users."""
    from distmeta.parallel import embeddings

    found = embeddings.of_users(rundir.stored(run.where), run.where, dataset, place, table)
    if found is None:
        return []
    group, points = found
    apart = plane.silhouette(points, group)
    svg = groupcharts.plane(plane.project(points), group, run.label, name)
    caption = (
        f"Embeddings of the test users of split 0, their first two principal components (PAML’s Figure 11 has t-SNE)."
        f" Silhouette of the groups in all {points.shape[1]} dimensions: {'–' if apart is None else f'{apart:.3f}'}"
        " (1: far apart, 0: mixed)."
    )
    return [figure(svg, f"Users by group, {escape(run.label)}", caption)]
