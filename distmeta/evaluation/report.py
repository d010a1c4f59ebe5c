"""RUN/report.html: one file that says how good a run is, in words, pictures and numbers; no network, no
scripts."""

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from distmeta.data.schema import Dataset
from distmeta.evaluation import charts, factfigures
from distmeta.evaluation.charts import finite, signed
from distmeta.evaluation.metrics import RECALL_CUTOFFS
from distmeta.evaluation.style import PAGE, STYLE
from distmeta.storage import Location

if TYPE_CHECKING:
    from distmeta.evaluation.measured import ErrorHistogram

_COLUMNS = {
    "mae": "MAE",
    "mae_ratings": "MAE, ratings",
    "mse": "MSE",
    "rmse": "RMSE",
    "ndcg@1": "NDCG@1",
    "ndcg@3": "NDCG@3",
    "ndcg@5": "NDCG@5",
    "ndcg@10": "NDCG@10",
    "auc": "AUC",
    "auc_rows": "AUC, rows",
    "nel": "NEL",
    "nel_rows": "NEL, rows",
    **{f"recall@{n}": f"Recall@{n}" for n in RECALL_CUTOFFS},
}
"""What the tables show, where a cohort has it."""
_VERSIONS = ("distmeta", "torch", "numpy", "polars", "pyarrow", "ray")


def write(
    run: Location,
    evaluation: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    config_yaml: str,
    dataset: Dataset,
    errors: "ErrorHistogram",
) -> Location:
    """Write RUN/report.html and return where it is.

    Args:
        evaluation: what `evaluate.assemble` gave.
        metrics: lines of metrics.jsonl, oldest first; none or without losses for a method in closed form.
        errors: signed errors of the method on the split test.

    Raises:
        UserError, RunError: the file cannot be written.
    """
    where = run / "report.html"
    where.write_bytes(page(run.name, evaluation, metrics, config_yaml, dataset, errors).encode())
    return where


def page(
    run_name: str,
    evaluation: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    config_yaml: str,
    dataset: Dataset,
    errors: "ErrorHistogram",
) -> str:
    """The whole page."""
    method = evaluation["method"]
    title = f"{method} on {dataset.name}"
    body = [
        f'<header><p class="kicker">{escape(run_name)} · protocol {escape(evaluation["protocol"])}</p>'
        f"<h1>{escape(title)}</h1>{_headline(evaluation, dataset)}</header>",
        _tiles(evaluation, dataset),
        '<div class="figures">',
        *_figures(evaluation, metrics, errors),
        "</div>",
        _metric_tables(evaluation),
        _paired_tables(evaluation),
        _group_tables(evaluation),
        _provenance(evaluation, metrics, config_yaml, dataset),
    ]
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))


# --- what it says
# --------------------------------------------------------------------------------------------------------


def best_floor(evaluation: Mapping[str, Any]) -> str | None:
    """The floor with the lowest MAE (of scenarios the highest Recall@10) on the cohort `all`, the method itself left
    out; None where there is none.
    """
    lead = _lead(evaluation)
    scores = {
        name: cohorts["all"][lead]
        for name, cohorts in evaluation["floors"].items()
        if name != evaluation["method"] and finite(cohorts.get("all", {}).get(lead))
    }
    return (min if lead == "mae" else max)(scores, key=scores.__getitem__) if scores else None


def _lead(evaluation: Mapping[str, Any]) -> str:
    """The metric that the page begins with."""
    return "recall@10" if "n_lists" in evaluation["cohorts"]["all"] else "mae"


def _headline(evaluation: Mapping[str, Any], dataset: Dataset) -> str:
    method, scores = escape(evaluation["method"]), evaluation["cohorts"]["all"]
    lead = _lead(evaluation)
    if not finite(scores[lead]):
        return '<p class="lead">There was no test task to evaluate on, so there is nothing to report.</p>'
    tasks = f"{scores['n_tasks']:,} test tasks of {escape(dataset.name)}"
    said = [f"On {tasks}, <b>{method}</b> is off by <b>{scores[lead]:.4f}</b> on average (MAE)."]
    if lead != "mae":
        said = [
            f"In {scores['n_lists']:,} lists of {tasks}, <b>{method}</b> has <b>{scores[lead]:.1%}</b> of what a user"
            " took among its first 10 (Recall@10)."
        ]
    floor = best_floor(evaluation)
    if floor:
        said.append(_compared(escape(floor), evaluation["paired"][floor]["all"][lead], 1 if lead == "mae" else -1))
    bayes = dataset.extra.get("bayes", {}).get("mae")
    if finite(bayes):
        said.append(
            f"Nobody can do better than about {bayes:.4f} here: that is the error of one who knows "
            "every noise-free score of this made dataset."
        )
    return f'<p class="lead">{" ".join(said)}</p>'


def _compared(floor: str, interval: Sequence[float | None], sign: int) -> str:
    """The difference to the best floor in words; `sign` 1: less is better, −1: more is."""
    difference, low, high = interval
    if difference is None:
        return f"The best floor is {floor}; the two have no task in common that could be compared."
    size = f"{abs(difference):.4f} {'lower' if difference < 0 else 'higher'} than <b>{floor}</b>, the best floor"
    if difference == 0:
        size = f"the same as <b>{floor}</b>, the best floor"
    if low is None or high is None:
        return f"That is {size}; one task alone gives no interval."
    interval_text = f"95 % interval {signed(low)} to {signed(high)}"
    if low <= 0 <= high:
        return f"That is {size}, but the {interval_text} includes 0: <b>no real difference</b> is shown."
    verdict = "better" if sign * difference < 0 else "worse"
    return f"That is {size}; the {interval_text} excludes 0, so it is <b>{verdict}</b> on these tasks beyond chance."


def _tiles(evaluation: Mapping[str, Any], dataset: Dataset) -> str:
    scores, floor = evaluation["cohorts"]["all"], best_floor(evaluation)
    if _lead(evaluation) != "mae":
        tiles = [(_COLUMNS[k], _show(scores[k]), "mean over lists") for k in _COLUMNS if k in scores]
        tiles += [("lists", f"{scores['n_lists']:,}", f"of {scores['n_tasks']:,} scenarios")]
        return tiled(tiles)
    tiles = [("MAE", _show(scores["mae"]), "mean over users"), ("RMSE", _show(scores["rmse"]), "over ratings")]
    tiles.append(("NDCG@3", _show(scores["ndcg@3"]), f"{scores['n_ranked']:,} tasks ranked"))
    if "auc" in scores:
        tiles.append(("AUC", _show(scores["auc"]), f"{scores['n_both']:,} tasks with both classes"))
    if floor:
        tiles.append(("best floor", _show(evaluation["floors"][floor]["all"]["mae"]), f"MAE of {escape(floor)}"))
    bayes = dataset.extra.get("bayes", {}).get("mae")
    if finite(bayes):
        tiles.append(("best possible", _show(bayes), "MAE of the noise"))
    tiles.append(("tasks", f"{scores['n_tasks']:,}", f"{scores['n_ratings']:,} query ratings"))
    return tiled(tiles)


def tiled(tiles: Sequence[tuple[str, str, str]]) -> str:
    """A row of large numbers: name, number, and a note below it, which are HTML."""
    cells = "".join(f"<div><dt>{k}</dt><dd>{v}<small>{note}</small></dd></div>" for k, v, note in tiles)
    return f'<dl class="tiles">{cells}</dl>'


# --- what it shows
# -------------------------------------------------------------------------------------------------------


def _figures(
    evaluation: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], errors: "ErrorHistogram"
) -> Iterable[str]:
    if _lead(evaluation) == "mae":
        yield from _error_figures(evaluation)
    learned = charts.curves(metrics)
    if learned:
        yield figure(learned, "Learning", "By epoch; the ring marks the epoch that validated best.")
    spread = charts.errors(errors)
    if spread:
        yield figure(
            spread, "Errors", "How often each signed error occurs among the test tasks' query ratings, in equal bins."
        )
    for svg, title, caption in factfigures.figures(evaluation.get("facts", {}), metrics):
        yield figure(svg, title, caption)


def _error_figures(evaluation: Mapping[str, Any]) -> Iterable[str]:
    """The MAE of the method and of each floor, and the paired differences."""
    method, floors = evaluation["method"], evaluation["floors"]
    others = [name for name in floors if name != method]
    cohorts = _cohorts(evaluation)
    mae = {
        c: {method: evaluation["cohorts"][c]["mae"]} | {f: floors[f].get(c, {}).get("mae") for f in others}
        for c in cohorts
    }
    yield figure(
        charts.bars(mae, method),
        "Error by cohort",
        f"Mean absolute error, averaged over users, of the method{' and the floors on the same tasks' * bool(others)}."
        + (" Cohorts other than “all” are of query rows, and average over rows." if _by_row(evaluation) else ""),
    )
    paired = {c: {f: evaluation["paired"][f][c]["mae"] for f in others} for c in cohorts}
    if any(d[0] is not None for group in paired.values() for d in group.values()):
        yield figure(
            charts.forest(paired, method),
            "Difference to each floor, user by user",
            "Mean of the differences on the same users with its 95 % bootstrap interval. "
            "A filled mark: the interval excludes 0. An open one: it does not.",
        )


def figure(svg: str, title: str, caption: str) -> str:
    """A picture with its title and caption, which are HTML."""
    head = f'<figure role="group" aria-label="{escape(title)}"><h2>{title}</h2>'
    return f"{head}{svg}<figcaption>{caption}</figcaption></figure>"


# --- all numbers
# ---------------------------------------------------------------------------------------------------------


def _metric_tables(evaluation: Mapping[str, Any]) -> str:
    method = evaluation["method"]
    parts = ["<section><h2>All numbers</h2>"]
    for cohort in _cohorts(evaluation):
        rows = {method: evaluation["cohorts"][cohort]}
        rows |= {f: c[cohort] for f, c in evaluation["floors"].items() if f != method and cohort in c}
        caption = f"{escape(cohort)} <small>{_counted(rows[method])}</small>"
        columns = {key: head for key, head in _COLUMNS.items() if key in rows[method]}
        body = [_row(name, name == method, [_show(s.get(key)) for key in columns]) for name, s in rows.items()]
        parts.append(_table(caption, ["", *columns.values()], body))
    if _lead(evaluation) != "mae":
        notes = (
            "Recall@N: the share of what a user took that is among the N candidates with the highest scores; mean over"
            " lists, one a user and scenario; tied candidates share their places."
        )
        return "".join([*parts, f'<p class="note">{notes}</p></section>'])
    notes = (
        "MAE, MSE and NDCG are means over tasks; “MAE, ratings” and RMSE are pooled over ratings. Predictions are "
        "clipped to the label’s range. NDCG ranks a task’s query rows: gain 2<sup>r</sup> − 1, tied predictions share "
        "their ranks’ mean discount; tasks without any gain are left out."
    )
    if _by_row(evaluation):
        notes += (
            " Cohorts of query rows: errors are means over rows; NDCG@3 is the mean over clips of 5 rows in a row, by "
            "task and time, as MAMO’s appendix A.2.3 has it."
        )
    if "auc" in evaluation["cohorts"]["all"]:
        notes += (
            " Clicks: AUC and NEL are means over tasks with both classes, Recall@N over tasks with a click; “rows” is "
            "all rows pooled. NEL is the class-weighted log loss: ½ (mean of −log p over clicks + mean of −log(1 − p) "
            "over the others)."
        )
    return "".join([*parts, f'<p class="note">{notes}</p></section>'])


def _paired_tables(evaluation: Mapping[str, Any]) -> str:
    method = evaluation["method"]
    parts = [f"<section><h2>Paired differences: {escape(method)} minus floor</h2>"]
    for cohort in _cohorts(evaluation):
        found = {f: c[cohort] for f, c in evaluation["paired"].items() if f != method and cohort in c}
        keys = [k for k in _COLUMNS if any(k in differences for differences in found.values())]
        body = [
            f'<tr><th scope="row">{escape(floor)}</th>'
            + "".join(_interval_cell(k, differences.get(k)) for k in keys)
            + "</tr>"
            for floor, differences in found.items()
        ]
        if body:
            parts.append(_table(escape(cohort), ["", *(_COLUMNS[k] for k in keys)], body))
    if len(parts) == 1:
        return ""
    notes = (
        "Mean difference on the same tasks, below it the 95 % percentile interval of 10,000 bootstrap resamples of the "
        "tasks (seed 0). Less is better for errors, more for NDCG, AUC and Recall. "
        "▲ better, ▼ worse, where the interval excludes 0."
    )
    return "".join([*parts, f'<p class="note">{notes}</p></section>'])


def _interval_cell(metric: str, interval: Sequence[float | None] | None) -> str:
    difference, low, high = interval or (None, None, None)
    if difference is None:
        return "<td>–</td>"
    if low is None or high is None:
        return f"<td>{signed(difference)}</td>"
    mark, kind = "", ""
    if not low <= 0 <= high:
        good = (difference < 0) != metric.startswith(("ndcg", "auc", "recall"))
        mark, kind = (" ▲", " class=better") if good else (" ▼", " class=worse")
    return f"<td{kind}>{signed(difference)}{mark}<small>{signed(low)} … {signed(high)}</small></td>"


def _group_tables(evaluation: Mapping[str, Any]) -> str:
    """How two groups of users fare by each method, and whether they fare alike; nothing without groups."""
    method, parts = evaluation["method"], []
    for pair, mine in evaluation.get("groups", {}).items():
        floors = {f: g[pair] for f, g in evaluation["floor_groups"].items() if f != method}
        body = [
            _row(name, name == method, [*map(_show, (*test["mse"], test["t"], test["p"]))])
            for name, test in {method: mine, **floors}.items()
        ]
        a, b = pair.split("-")
        caption = f"{escape(pair)} <small>{mine['n'][0]:,} and {mine['n'][1]:,} users</small>"
        parts.append(_table(caption, ["", f"MSE, {escape(a)}", f"MSE, {escape(b)}", "t", "p"], body))
    if not parts:
        return ""
    notes = (
        "Student’s two-tailed t-test between the two groups’ users, by each user’s mean squared error. A low p: the "
        "groups fare differently beyond chance."
    )
    return "".join(["<section><h2>Groups of users</h2>", *parts, f'<p class="note">{notes}</p></section>'])


def _row(name: str, mine: bool, cells: Sequence[str]) -> str:
    head = f'<tr{" class=mine" if mine else ""}><th scope="row">{escape(name)}</th>'
    return head + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _table(caption: str, heads: Sequence[str], body: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    rows = "".join(body)
    table = f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _provenance(
    evaluation: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], config_yaml: str, dataset: Dataset
) -> str:
    facts = {
        "Split hash": f"<code>{escape(evaluation['split_hash'])}</code>",
        "Seed": str(evaluation["seed"]),
        "Dataset": f"{escape(dataset.name)}: {dataset.users:,} users, {dataset.items:,} items, "
        f"{dataset.interactions:,} interactions, labels {dataset.label.minimum:g} to {dataset.label.maximum:g}",
        "Versions": escape(", ".join(_versions())),
    }
    if "notes" in evaluation:
        facts["Protocol"] = escape("; ".join(f"{what}: {note}" for what, note in evaluation["notes"].items()))
    seconds = [m["seconds"] for m in metrics if finite(m.get("seconds"))]
    if seconds:
        facts["Training"] = f"{len(seconds):,} epochs in {sum(seconds):,.0f} s"
    notes = dataset.extra.get("notes", [])
    if notes:
        facts["Notes on the dataset"] = escape("; ".join(map(str, notes)))
    listed = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items())
    return (
        f'<section class="provenance"><h2>Where this comes from</h2><dl>{listed}</dl>'
        f"<h3>Configuration</h3><pre>{escape(config_yaml)}</pre></section>"
    )


def _versions() -> list[str]:
    """Python's and the packages' versions; those that are not installed as packages are left out."""
    found = [f"Python {platform.python_version()}"]
    for name in _VERSIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _by_row(evaluation: Mapping[str, Any]) -> bool:
    """Whether the cohorts besides `all` are of query rows."""
    return any("n_rows" in summary for summary in evaluation["cohorts"].values())


def _counted(summary: Mapping[str, Any]) -> str:
    if "n_rows" in summary:
        return f"{summary['n_rows']:,} query rows of {summary['n_tasks']:,} tasks, {summary['n_clips']:,} clips"
    if "n_lists" in summary:
        return f"{summary['n_lists']:,} lists of {summary['n_tasks']:,} scenarios"
    return f"{summary['n_tasks']:,} tasks, {summary['n_ratings']:,} query ratings"


def _cohorts(evaluation: Mapping[str, Any]) -> list[str]:
    """Cohorts to show: `all` only where it is not the same as the one other cohort."""
    names = list(evaluation["cohorts"])
    same = len(names) == 2 and evaluation["cohorts"][names[0]] == evaluation["cohorts"][names[1]]
    return names[1:] if same else names


def _show(value: Any) -> str:
    return f"{value:.4f}" if finite(value) else "–"
