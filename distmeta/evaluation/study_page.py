"""OUT/STUDY.md and OUT/STUDY.html: a parameter study for a README, and a page with its pictures."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from distmeta.evaluation import studycharts
from distmeta.evaluation.papertables import JUDGED
from distmeta.evaluation.report import figure
from distmeta.evaluation.reproduction_page import Cell, bold, grid, interval, spread, table
from distmeta.evaluation.studies import METRICS
from distmeta.evaluation.study import DEFAULT, best
from distmeta.evaluation.style import PAGE, STYLE

DIGITS = 4
SPLITS = {"train": "Training tasks", "test": "Test tasks"}
_NOTE = (
    "Mean ± standard deviation over split seeds of the means over users. Differences: on the same users, all split"
    " seeds together; in brackets the 95 % percentile interval of 10,000 bootstrap resamples of the users. Bold: the"
    " best mean of a curve; a difference that is better and whose interval excludes 0. The best of several values is"
    " chosen on the users that it is measured on, which flatters it."
)
_CAPTION = (
    "Above MAE (smaller is better), below NDCG@3 (larger is better); bars: ± one standard deviation over split seeds."
    " Ring and bold number: the default."
)

Study = Mapping[str, Any]
"""What `study.assemble` gives, with "seeds", "datasets", "settings" and "left_out" added."""
Panel = Mapping[str, Any]


def markdown(found: Study) -> str:
    """The study to paste into a README: tables, what the paper says and what ours shows."""
    parts = [f"### {found['title']}", _said(found)]
    for panel in found["panels"]:
        parts += [f"**{panel['label']}** (`--{panel['flag']}`)", f"Paper: {panel['paper']}"]
        for split in found["splits"]:
            heads, rows = _rows(panel, split)
            parts.append(f"{SPLITS[split]}. {' '.join(_findings(panel, split))}")
            parts.append(grid(heads, [[name, *map(bold, cells)] for name, cells in rows]))
    parts += [_NOTE, "\n".join(f"- {note}" for note in found["notes"])]
    return "\n\n".join(parts) + "\n"


def page(found: Study) -> str:
    """The whole page."""
    return PAGE.format(title=escape(found["title"]), style=STYLE, body=body(found))


def body(found: Study) -> str:
    """What stands on the page: for each parameter a picture, the paper's words and ours, and the numbers."""
    body = [
        f'<header><p class="kicker">protocol {escape(found["protocol"])}</p><h1>{escape(found["title"])}</h1>'
        f'<p class="lead">{escape(_said(found))}</p></header>'
    ]
    for panel in found["panels"]:
        body.append(
            f"<section><h2>{escape(panel['label'])} <small><code>--{escape(panel['flag'])}</code></small></h2>"
            f"<p>Paper: {escape(panel['paper'])}</p>"
        )
        figures, tables = [], []
        for split in found["splits"]:
            said = escape(" ".join(_findings(panel, split)))
            svg = studycharts.panel(panel, split, f"{panel['name']} {split}")
            figures.append(figure(svg, SPLITS[split], _CAPTION))
            tables.append(f"<p><b>{SPLITS[split]}.</b> {said}</p>{table(*_rows(panel, split))}")
        body.append(f'<div class="figures">{"".join(figures)}</div>{"".join(tables)}</section>')
    notes = "".join(f"<li>{escape(note)}</li>" for note in (_NOTE, *found["notes"]))
    body.append(f"<section><h2>How to read it</h2><ul>{notes}</ul></section>")
    return "\n".join(body)


def _said(found: Study) -> str:
    """What the numbers are of, in words."""
    data, n = found["datasets"][found["dataset"]], found["seeds"]
    given = f" Settings besides our defaults: {found['settings']}." if found["settings"] else ""
    left = f" Left out of this call: {', '.join(found['left_out'])}." if found["left_out"] else ""
    return (
        f"{n} split seed{'s' * (n > 1)}, protocol {found['protocol']}, on {data['name']}"
        f" ({data['interactions']:,} interactions).{given}{left}"
    )


def shown(value: Any) -> str:
    """A parameter's value as text."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _rows(panel: Panel, split: str) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Heads and rows of one split's table: the numbers of each curve at each value, then its differences."""
    against = _against(panel, split)
    names = list(METRICS.values())
    heads = ["", "users", *names, *(f"{name} − {other}" for other in against for name in names)]
    rows: list[tuple[str, list[Cell]]] = []
    for curve in panel["curves"]:
        which = {metric: best(panel, curve, metric, split) for metric in METRICS}
        for i, point in enumerate(curve["points"]):
            label = f"{curve['label']}, " * (len(panel["curves"]) > 1) + shown(panel["values"][i])
            label += " (default)" * (panel["values"][i] == panel["default"])
            rows.append((label, _cells(point, split, against, {m: which[m] == i for m in METRICS})))
    if split == "test":
        for floor, points in panel["floors"].items():
            alike = all(numbers == points[0] for numbers in points)
            for value, numbers in zip(panel["values"], points[:1] if alike else points, strict=not alike):
                label = floor if alike else f"{floor}, {shown(value)}"
                point = {"splits": {split: numbers}, "paired": {split: {}}}
                rows.append((label, _cells(point, split, against, {})))
    return heads, rows


def _against(panel: Panel, split: str) -> list[str]:
    """What the points of a split are compared with."""
    found = {name for curve in panel["curves"] for p in curve["points"] for name in p["paired"].get(split, ())}
    return [name for name in (DEFAULT, *(c["label"] for c in panel["curves"]), *JUDGED) if name in found]


def _cells(point: Mapping[str, Any], split: str, against: Sequence[str], stands_out: Mapping[str, bool]) -> list[Cell]:
    if point.get("failed"):
        return [("diverged", False)] + [("–", False)] * (len(METRICS) * (1 + len(against)))
    numbers, paired = point["splits"][split], point["paired"][split]
    cells: list[Cell] = [(", ".join(f"{n:,}" for n in dict.fromkeys(numbers["n_tasks"])), False)]
    for m in METRICS:
        cells.append((spread(numbers[m]["mean"], numbers[m]["sd"], DIGITS), stands_out.get(m, False)))
    return cells + [interval(paired.get(other, {}).get(m), m) for other in against for m in METRICS]


def _findings(panel: Panel, split: str) -> list[str]:
    """What ours shows, a sentence a curve: where each metric is best, and whether that is told from the default."""
    said = []
    for curve in panel["curves"]:
        parts = [_best(panel, curve, metric, split) for metric in METRICS]
        for value, point in zip(panel["values"], curve["points"], strict=True):
            parts += [f"at {shown(value)} training diverged ({point['failed']})"] if point["failed"] else []
        said.append(f"{curve['label']}: {'; '.join(part for part in parts if part)}.")
    return said


def _best(panel: Panel, curve: Mapping[str, Any], metric: str, split: str) -> str:
    """Where a curve is best in a metric; "" where nothing was measured."""
    i = best(panel, curve, metric, split)
    if i is None:
        return ""
    value, default = panel["values"][i], shown(panel["default"])
    words = f"{METRICS[metric]} is {'lowest' if metric == 'mae' else 'highest'} at {shown(value)}"
    if value == panel["default"]:
        return f"{words}, the default"
    found = curve["points"][i]["paired"][split].get(DEFAULT, {}).get(metric)
    if not found or found[0] is None:
        why = "there is no default to pair it with" if panel["same_tasks"] else "other users, so no paired difference"
        return f"{words} (default {default}; {why})"
    text, _ = interval(found, metric)
    if found[1] is None or found[2] is None:
        return f"{words}, {text} against the default {default}"
    apart = "the interval excludes 0" if found[1] > 0 or found[2] < 0 else "not told apart"
    return f"{words}, {text} against the default {default}: {apart}"
