"""RUN/report.html: one file that says how good a run is, in words, pictures and numbers; no network, no
scripts."""

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from distmeta.data.schema import Dataset
from distmeta.evaluation import charts
from distmeta.evaluation.charts import finite, signed
from distmeta.storage import Location

if TYPE_CHECKING:
    from distmeta.evaluation.evaluate import ErrorHistogram

_COLUMNS = {
    "mae": "MAE",
    "mae_ratings": "MAE, ratings",
    "mse": "MSE",
    "rmse": "RMSE",
    "ndcg@1": "NDCG@1",
    "ndcg@3": "NDCG@3",
    "ndcg@5": "NDCG@5",
    "ndcg@10": "NDCG@10",
}
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
        _provenance(evaluation, metrics, config_yaml, dataset),
    ]
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))


# --- what it says
# --------------------------------------------------------------------------------------------------------


def best_floor(evaluation: Mapping[str, Any]) -> str | None:
    """The floor with the lowest MAE on the cohort `all`, the method itself left out; None where there is
    none.
    """
    scores = {
        name: cohorts["all"]["mae"]
        for name, cohorts in evaluation["floors"].items()
        if name != evaluation["method"] and finite(cohorts.get("all", {}).get("mae"))
    }
    return min(scores, key=scores.__getitem__) if scores else None


def _headline(evaluation: Mapping[str, Any], dataset: Dataset) -> str:
    method, scores = escape(evaluation["method"]), evaluation["cohorts"]["all"]
    if not finite(scores["mae"]):
        return '<p class="lead">There was no test task to evaluate on, so there is nothing to report.</p>'
    tasks = f"{scores['n_tasks']:,} test tasks of {escape(dataset.name)}"
    said = [f"On {tasks}, <b>{method}</b> is off by <b>{scores['mae']:.4f}</b> on average (MAE)."]
    floor = best_floor(evaluation)
    if floor:
        said.append(_compared(method, escape(floor), evaluation["paired"][floor]["all"]["mae"]))
    bayes = dataset.extra.get("bayes", {}).get("mae")
    if finite(bayes):
        said.append(
            f"Nobody can do better than about {bayes:.4f} here: that is the error of one who knows "
            "every noise-free score of this made dataset."
        )
    return f'<p class="lead">{" ".join(said)}</p>'


def _compared(method: str, floor: str, interval: Sequence[float | None]) -> str:
    """The difference to the best floor in words."""
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
    verdict = "better" if difference < 0 else "worse"
    return f"That is {size}; the {interval_text} excludes 0, so it is <b>{verdict}</b> on these tasks beyond chance."


def _tiles(evaluation: Mapping[str, Any], dataset: Dataset) -> str:
    scores, floor = evaluation["cohorts"]["all"], best_floor(evaluation)
    tiles = [("MAE", _show(scores["mae"]), "mean over users"), ("RMSE", _show(scores["rmse"]), "over ratings")]
    tiles.append(("NDCG@3", _show(scores["ndcg@3"]), f"{scores['n_ranked']:,} tasks ranked"))
    if floor:
        tiles.append(("best floor", _show(evaluation["floors"][floor]["all"]["mae"]), f"MAE of {escape(floor)}"))
    bayes = dataset.extra.get("bayes", {}).get("mae")
    if finite(bayes):
        tiles.append(("best possible", _show(bayes), "MAE of the noise"))
    tiles.append(("tasks", f"{scores['n_tasks']:,}", f"{scores['n_ratings']:,} query ratings"))
    cells = "".join(f"<div><dt>{k}</dt><dd>{v}<small>{note}</small></dd></div>" for k, v, note in tiles)
    return f'<dl class="tiles">{cells}</dl>'


# --- what it shows
# -------------------------------------------------------------------------------------------------------


def _figures(
    evaluation: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], errors: "ErrorHistogram"
) -> Iterable[str]:
    method, floors = evaluation["method"], evaluation["floors"]
    others = [name for name in floors if name != method]
    cohorts = _cohorts(evaluation)
    mae = {
        c: {method: evaluation["cohorts"][c]["mae"]} | {f: floors[f].get(c, {}).get("mae") for f in others}
        for c in cohorts
    }
    yield _figure(
        charts.bars(mae, method),
        "Error by cohort",
        "Mean absolute error, averaged over users, of the method and of the floors on the same tasks.",
    )
    paired = {c: {f: evaluation["paired"][f][c]["mae"] for f in others} for c in cohorts}
    if any(d[0] is not None for group in paired.values() for d in group.values()):
        yield _figure(
            charts.forest(paired, method),
            "Difference to each floor, user by user",
            "Mean of the differences on the same users with its 95 % bootstrap interval. "
            "A filled mark: the interval excludes 0. An open one: it does not.",
        )
    learned = charts.curves(metrics)
    if learned:
        yield _figure(learned, "Learning", "By epoch; the ring marks the epoch with the lowest validation error.")
    spread = charts.errors(errors)
    if spread:
        yield _figure(
            spread, "Errors", "How often each signed error occurs among the test tasks' query ratings, in equal bins."
        )


def _figure(svg: str, title: str, caption: str) -> str:
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
        count = evaluation["cohorts"][cohort]
        caption = f"{escape(cohort)} <small>{count['n_tasks']:,} tasks, {count['n_ratings']:,} query ratings</small>"
        body = [
            f'<tr{" class=mine" if name == method else ""}><th scope="row">{escape(name)}</th>'
            + "".join(f"<td>{_show(scores.get(key))}</td>" for key in _COLUMNS)
            + "</tr>"
            for name, scores in rows.items()
        ]
        parts.append(_table(caption, ["", *_COLUMNS.values()], body))
    notes = (
        "MAE, MSE and NDCG are means over tasks; “MAE, ratings” and RMSE are pooled over ratings. Predictions are "
        "clipped to the label’s range. NDCG ranks a task’s query rows: gain 2<sup>r</sup> − 1, tied predictions share "
        "their ranks’ mean discount; tasks without any gain are left out."
    )
    return "".join([*parts, f'<p class="note">{notes}</p></section>'])


def _paired_tables(evaluation: Mapping[str, Any]) -> str:
    method = evaluation["method"]
    keys = [k for k in _COLUMNS if k not in ("mae_ratings", "rmse")]
    parts = [f"<section><h2>Paired differences: {escape(method)} minus floor</h2>"]
    for cohort in _cohorts(evaluation):
        body = [
            f'<tr><th scope="row">{escape(floor)}</th>'
            + "".join(_interval_cell(k, cohorts[cohort].get(k)) for k in keys)
            + "</tr>"
            for floor, cohorts in evaluation["paired"].items()
            if floor != method and cohort in cohorts
        ]
        if body:
            parts.append(_table(escape(cohort), ["", *(_COLUMNS[k] for k in keys)], body))
    if len(parts) == 1:
        return ""
    notes = (
        "Mean difference on the same tasks, below it the 95 % percentile interval of 10,000 bootstrap resamples of the "
        "tasks (seed 0). Less is better for errors, more for NDCG. ▲ better, ▼ worse, where the interval excludes 0."
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
        good = (difference < 0) != metric.startswith("ndcg")
        mark, kind = (" ▲", " class=better") if good else (" ▼", " class=worse")
    return f"<td{kind}>{signed(difference)}{mark}<small>{signed(low)} … {signed(high)}</small></td>"


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


def _cohorts(evaluation: Mapping[str, Any]) -> list[str]:
    """Cohorts to show: `all` only where it is not the same as the one other cohort."""
    names = list(evaluation["cohorts"])
    same = len(names) == 2 and evaluation["cohorts"][names[0]] == evaluation["cohorts"][names[1]]
    return names[1:] if same else names


def _show(value: Any) -> str:
    return f"{value:.4f}" if finite(value) else "–"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

_STYLE = """
:root { color-scheme: light; --ink: #1d232b; --soft: #5b6572; --line: #e3e6ea; --method: #0072b2;
  --better: #00704f; --worse: #b34700;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 var(--sans); -webkit-text-size-adjust: 100%; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; margin: .1em 0 .45em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
.kicker { margin: 0; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.lead { font-size: clamp(1.05rem, 2.6vw, 1.22rem); max-width: 46em; margin: 0; }
small { font-size: .78em; color: var(--soft); font-weight: 400; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); margin: 28px 0 36px;
  border-top: 2px solid var(--ink); border-bottom: 1px solid var(--line); }
.tiles div { padding: 12px 12px 14px 0; }
.tiles dt { color: var(--soft); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.5rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; font-size: .78rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 40px 48px;
  align-items: start; }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; max-width: 520px; overflow: visible; }
figure svg text { font-family: var(--sans) !important; }
figcaption, .note { color: var(--soft); font-size: .88rem; margin: 8px 0 0; max-width: 60em; }
section { margin-top: 52px; padding-top: 18px; border-top: 1px solid var(--line); }
.wide { overflow-x: auto; margin: 0 0 22px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; font-weight: 600; padding: 0 0 6px; }
th, td { text-align: right; padding: 6px 10px; white-space: nowrap; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; font-size: .82rem; border-bottom: 1px solid #aab2bc; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; position: sticky; left: 0; background: #fff; }
td small { display: block; }
tr.mine th, tr.mine td { color: var(--method); font-weight: 600; }
.better { color: var(--better); }
.worse { color: var(--worse); }
.provenance dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; font-size: .92rem; }
.provenance dt { color: var(--soft); }
.provenance dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .82rem; }
pre { background: #f6f7f9; border-radius: 6px; padding: 14px 16px; margin: 0; overflow-x: auto; line-height: 1.5; }
@media (max-width: 560px) {
  main { padding: 24px 16px 48px; }
  .provenance dl { grid-template-columns: 1fr; }
  .provenance dt { margin-top: 8px; }
}
@media print {
  main { max-width: none; padding: 0; }
  body { font-size: 11pt; }
  .wide { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding: 3px 6px; }
  tr, .tiles { break-inside: avoid; }
  h2, caption { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; gap: 24px; }
  pre { white-space: pre-wrap; }
}
"""
