"""What the traits of the sampled test tasks come to: contexts on a plane and how far apart groups of them are, and the
routes of tasks (paper 002, Figures 3 and 4); for evaluation.json and the report.
"""

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.evaluation import plane
from distmeta.evaluation.facts import profiles
from distmeta.evaluation.measured import TRAIT
from distmeta.storage import Location

CONTEXTS, ROUTES = "contexts", "routes"
"""Entries of `facts` in evaluation.json."""
CONTEXT, ROUTE = f"{TRAIT}context", f"{TRAIT}route "
QUARTERS = 4

Grouping = tuple[list[str], NDArray[np.int64], NDArray[np.float64] | None]
"""Names of the groups, whose each point is, and the number that the groups are quarters of, where they are."""


def summary(traits: pl.DataFrame | None, table: TaskTable, dataset: Dataset, place: Location) -> dict[str, Any]:
    """What `Measured.traits` comes to; nothing where there is none.

    Args:
        place: where `dataset` lies.

    Returns:
        "contexts": {"tasks", "supports" (a task's), "width", "shares" (two, of the variance, on each axis),
        "points" [[x, y]] (principal components, the farthest at 1), "groups": {what: {"names": [G], "index": [n],
        "silhouette" (in all dimensions), "silhouette_plane", "rank" (correlation of the first component with the
        number that the groups are quarters of; None where they are not)}}}; "routes": see `_routes`.

    Raises:
        UserError: the task table or a vocabulary is damaged.
    """
    found: dict[str, Any] = {}
    if traits is None:
        return found
    known = pl.all_horizontal(pl.col(c).arr.to_list().list.eval(pl.element().is_finite()).list.all()
                              for c in traits.columns if c.startswith(TRAIT))  # fmt: skip
    traits = traits.filter(known)
    if CONTEXT in traits.columns and len(traits) > 2:
        found[CONTEXTS] = _contexts(traits, table, dataset, place)
    if any(c.startswith(ROUTE) for c in traits.columns) and len(traits):
        routes = _routes(traits, table)
        found |= {ROUTES: routes} if routes else {}
    return found


def _contexts(traits: pl.DataFrame, table: TaskTable, dataset: Dataset, place: Location) -> dict[str, Any]:
    whole = traits[CONTEXT].to_numpy().astype(np.float64)
    points = plane.project(whole)
    spread = (whole - whole.mean(0)).var(0).sum()
    groups = {}
    for what, (names, index, number) in _groups(traits, table, dataset, place).items():
        apart = plane.silhouette(whole, index)
        if apart is not None:
            rank = None if number is None else _rank_correlation(points[:, 0], number)
            groups[what] = {
                "names": names,
                "index": index.tolist(),
                "silhouette": apart,
                "silhouette_plane": plane.silhouette(points, index),
                "rank": rank,
            }
    return {
        "tasks": traits["task"].n_unique(),
        "supports": int(traits["support"].max()) + 1,  # type: ignore[arg-type]
        "width": whole.shape[1],
        "shares": (points.var(0) / (spread or 1.0)).tolist(),
        "points": (points / (np.abs(points).max() or 1.0)).round(4).tolist(),
        "groups": groups,
    }


def _groups(traits: pl.DataFrame, table: TaskTable, dataset: Dataset, place: Location) -> dict[str, Grouping]:
    """What the points are told apart by: scenarios and their kinds; or of users cohorts, fields and what their support
    is like."""
    found: dict[str, Grouping] = {}
    kind, of_kind = np.unique(traits["cohort"].to_numpy(), return_inverse=True)
    if table.scenarios:
        tasks, index = np.unique(traits["task"].to_numpy(), return_inverse=True)
        found["scenario"] = [called(table, int(t)) for t in tasks], index, None
        found["kind of scenario"] = list(map(str, kind)), of_kind, None
        return found
    for what, (names, index) in profiles(traits, table, dataset, place).items():
        found[what] = names, index, None
    mean = "share of clicks in the support" if dataset.label.kind == "click" else "mean rating of the support"
    for what, column, digits in ((mean, "mean", 2), ("size of the support", "rows", 0)):
        number = traits[column].cast(pl.Float64).to_numpy()
        found[what] = *_quarters(number, digits), number
    found["cohort"] = list(map(str, kind)), of_kind, None
    return found


def _quarters(number: NDArray[np.float64], digits: int) -> tuple[list[str], NDArray[np.int64]]:
    """Four groups by a number, called by their bounds; fewer where many are alike, and one more of those without."""
    there = np.isfinite(number)
    edges = np.unique(np.quantile(number[there], np.arange(1, QUARTERS) / QUARTERS)) if there.any() else np.zeros(0)
    index = np.where(there, np.searchsorted(edges, np.where(there, number, 0)), len(edges) + 1)
    kept, index = np.unique(index, return_inverse=True)
    names = []
    for k in range(len(kept)):
        of = number[index == k]
        low, high = (f"{v:.{digits}f}" for v in (of.min(), of.max()))
        names.append("none" if not np.isfinite(of[0]) else low if low == high else f"{low} to {high}")
    return names, index


def _rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Spearman's, without its sign (an axis has none) and of those that have the number; None where one is constant."""
    from scipy.stats import rankdata

    there = np.isfinite(b)
    ranks = np.stack([rankdata(v[there]) for v in (a, b)])
    if there.sum() < 2 or not (ranks.std(1) > 0).all():
        return None
    return float(abs(np.corrcoef(ranks)[0, 1]))


def called(table: TaskTable, task: int) -> str:
    """What a report calls a task."""
    return table.names.get(str(task), f"{'scenario' if table.scenarios else 'task'} {task}")


def _routes(traits: pl.DataFrame, table: TaskTable) -> dict[str, Any] | None:
    """The routes of tasks (means over their supports), and how they differ; None where there is one module.

    Returns:
        {"modules": m, "layers": [[m][m]] or, of the output, [1][m], of all tasks' mean, "shown": [{"name", "layers"}]
        of the two tasks whose routes differ most (or the only one), "entropy" of a task's route at each layer (mean
        over tasks and destinations; 1: all modules alike), "distance": total variation between two routes of tasks,
        mean over layers and destinations: {"mean" over pairs of tasks, "most", "same" (between supports of one
        scenario)}, None where there is no pair}.
    """
    from scipy.spatial.distance import pdist, squareform

    columns = sorted((c for c in traits.columns if c.startswith(ROUTE)), key=lambda c: int(c.removeprefix(ROUTE)))
    layers = [traits[c].to_numpy().astype(np.float64) for c in columns]
    m = layers[-1].shape[1]
    if m < 2:
        return None
    whole = np.concatenate(layers, 1)
    tasks, of = np.unique(traits["task"].to_numpy(), return_inverse=True)
    mean = np.zeros((len(tasks), whole.shape[1]))
    np.add.at(mean, of, whole)
    mean /= np.bincount(of)[:, None]
    destinations = whole.shape[1] // m
    apart = pdist(mean, "cityblock") / 2 / destinations
    first, second = np.unravel_index(squareform(apart).argmax(), (len(tasks), len(tasks))) if len(apart) else (0, 0)
    return {
        "modules": m,
        "layers": _cut(mean.mean(0), m, len(layers)),
        "shown": [_shown(int(k), mean[k], traits, table, tasks, m, len(layers)) for k in sorted({first, second})],
        "entropy": [_entropy(part, m) for part in np.split(mean, np.cumsum([p.shape[1] for p in layers])[:-1], 1)],
        "distance": {
            "mean": float(apart.mean()) if len(apart) else None,
            "most": float(apart.max()) if len(apart) else None,
            "same": _within(whole, of, destinations),
        },
    }


def _shown(
    k: int,
    route: NDArray[np.float64],
    traits: pl.DataFrame,
    table: TaskTable,
    tasks: NDArray[np.int64],
    m: int,
    n: int,
) -> dict[str, Any]:
    name = called(table, int(tasks[k]))
    if not table.scenarios:
        rows, mean = traits.filter(pl.col("task") == tasks[k]).select("rows", "mean").row(0)
        name += f": {rows} support rows" + (f" of mean {mean:.2f}" if rows else "")
    return {"name": name, "layers": _cut(route, m, n)}


def _cut(route: NDArray[np.float64], m: int, layers: int) -> list[list[list[float]]]:
    """Routes side by side as matrices, destinations by sources: of each layer [m][m], of the output [1][m]."""
    rows = route.reshape(-1, m).round(4)
    return [rows[k * m : (k + 1) * m].tolist() for k in range(layers)]


def _entropy(routes: NDArray[np.float64], m: int) -> float:
    """Mean entropy of distributions over m sources, [tasks, destinations · m], as a share of the most it can be."""
    from scipy.special import entr

    return float(entr(routes.reshape(-1, m)).sum(1).mean() / np.log(m))


def _within(whole: NDArray[np.float64], of: NDArray[np.int64], destinations: int) -> float | None:
    """Mean distance between two supports of one task; None where no task has two."""
    from scipy.spatial.distance import pdist

    each = [pdist(whole[of == k], "cityblock") for k in np.flatnonzero(np.bincount(of) > 1)]
    return float(np.concatenate(each).mean() / 2 / destinations) if each else None
