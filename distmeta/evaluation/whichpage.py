"""RESULTS/which-NAME.md and .html: which method suits a data set, by quality, cost of training, serving and memory.

The words are computed from the numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from distmeta.evaluation.report import figure
from distmeta.evaluation.reproduction_page import Cell, bold, grid, interval, table
from distmeta.evaluation.style import PAGE, STYLE
from distmeta.evaluation.whichcharts import COSTS, Cost, front, higher, scatters, sheet

__all__ = ["advice", "body", "findings", "front_table", "markdown", "page", "sheet"]

NEAR = 1.1
"""Within a tenth of the cheapest."""

Made = Mapping[str, Any]
"""What `reproduce_which` has measured: "title", "dataset", "protocol", "cohort", "metric", "floor" (the best one's
name), "requests", "candidates", "rows", where a row has "method", "settings", "quality", "paired" {floor: [difference,
low, high], None for itself}, "to_best" (the same to the best row), the keys of COSTS, "train_all_s", "latency_p95_ms",
"user_bytes", "peak_mb" and "closed", "gradient", "ratings", "clicks", "scenarios", "export"."""


def markdown(made: Made) -> str:
    """The page for a README."""
    heads, rows = _rows(made)
    cells = [[name, *map(bold, of)] for name, of in rows]
    listed = [f"- {r['method']}: {r['settings'] or 'its defaults'}" for r in made["rows"]]
    parts = [f"### {made['title']}", _said(made), advice(made), grid(heads, cells), *_notes(made)]
    return "\n\n".join([*parts, "\n".join(["Settings:\n", *listed])]) + "\n"


def page(made: Made) -> str:
    """The whole page."""
    return PAGE.format(title=escape(made["title"]), style=STYLE + _STYLE, body=body(made))


_STYLE = ".broad svg { max-width: none; min-width: 640px; } .broad { overflow-x: auto; margin-top: 30px; }"


def body(made: Made) -> str:
    """What stands on the page: advice, pictures, numbers, how they were measured."""
    heads, rows = _rows(made)
    told = "".join(f"<li><b>{escape(head)}:</b> {escape(text)}</li>" for head, text in findings(made))
    caption = "Filled and joined: the Pareto front, which no other method beats in both at once."
    listed = "".join(f"<li>{escape(r['method'])}: {escape(r['settings'] or 'its defaults')}</li>" for r in made["rows"])
    notes = "".join(f"<li>{escape(note)}</li>" for note in _notes(made))
    return (
        f'<header><p class="kicker">protocol {escape(made["protocol"])}</p><h1>{escape(made["title"])}</h1>'
        f'<p class="lead">{escape(_said(made))}</p></header><section><h2>In words</h2><ul>{told}</ul></section>'
        f'<div class="broad">{figure(scatters(made), "Quality against each cost", caption)}</div>'
        f"<section><h2>All numbers</h2>{table(heads, rows)}</section>"
        f"<section><h2>How to read it</h2><ul>{notes}</ul></section>"
        f"<section><h2>Settings</h2><ul>{listed}</ul></section>"
    )


def advice(made: Made) -> str:
    """`findings` as a list of Markdown."""
    return "\n".join(f"- {head}: {text}" for head, text in findings(made))


def findings(made: Made) -> list[tuple[str, str]]:
    """What the numbers say: a question and its answer each."""
    rows: Sequence[Made] = made["rows"]
    top = _best(made, rows)
    found = [("Best quality", _called(made, top) + _beside(made, top))]
    alike = [r for r in rows if r is not top and _level(r["to_best"])]
    if alike:
        cheap = min(alike, key=lambda r: r["latency_ms"])
        more = f"{len(alike)} other{'s' * (len(alike) > 1)}; the fastest to serve is {cheap['method']}"
        found.append(("Not told apart from it", f"{more} at {_amount(cheap['latency_ms'])} ms"))
    for cost, what in zip(COSTS, ("train", "serve", "hold in memory"), strict=True):
        least = min(r[cost.key] for r in rows)
        near = [r for r in rows if r[cost.key] <= NEAR * least]
        found.append((f"Best of those within 10 % of the cheapest to {what}", _called(made, _best(made, near), cost)))
    kinds: dict[str, Callable[[Made], bool]] = {
        "Best without a gradient at serving": lambda r: not r["gradient"],
        "Best without training by gradient (closed form)": lambda r: r["closed"],
        "Best of those that can be exported as one graph": lambda r: r["export"],
    }
    for head, able in kinds.items():
        there = [r for r in rows if able(r)]
        found.append((head, _called(made, _best(made, there)) if there else "none here"))
    return found


def front_table(made: Made) -> str:
    """Markdown: the methods on one of the fronts, and on which."""
    fronts = {cost.key: front(made, cost) for cost in COSTS}
    rows = []
    for r in _sorted(made):
        if any(r["method"] in names for names in fronts.values()):
            cells = [f"{r['quality']:.4f}", interval(r["paired"][made["floor"]], made["metric"])]
            costs = [(_amount(r[c.key] * c.scale), r["method"] in fronts[c.key]) for c in COSTS]
            rows.append([r["method"], cells[0], bold(cells[1]), *map(bold, costs)])  # type: ignore[arg-type]
    heads = ["", made["metric"].upper(), f"minus {made['floor']}", *(c.head for c in COSTS)]
    return grid(heads, rows) + "\n\nBold costs: on the Pareto front of quality and that cost."


def _best(made: Made, rows: Sequence[Made]) -> Made:
    return (max if higher(made) else min)(rows, key=lambda r: r["quality"])


def _sorted(made: Made) -> list[Made]:
    return sorted(made["rows"], key=lambda r: r["quality"], reverse=higher(made))


def _level(difference: Sequence[float | None] | None) -> bool:
    """Whether an interval holds 0."""
    if not difference or difference[1] is None or difference[2] is None:
        return False
    return difference[1] <= 0 <= difference[2]


def _called(made: Made, row: Made, cost: Cost | None = None) -> str:
    costs = [cost] if cost else list(COSTS)
    told = ", ".join(c.said.format(_amount(row[c.key] * c.scale)) for c in costs)
    return f"{row['method']} ({made['metric'].upper()} {row['quality']:.4f}; {told})"


def _beside(made: Made, row: Made) -> str:
    if row["method"] == made["floor"]:
        return ", which is a floor: no method here is better"
    return f", {interval(row['paired'][made['floor']], made['metric'])[0]} to {made['floor']}, the best floor"


def _amount(value: float) -> str:
    """Three digits of a number, whatever its size."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rows(made: Made) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    floors = list(made["rows"][0]["paired"])
    heads = ["", made["metric"].upper(), *(f"minus {f}" for f in floors), *(c.head for c in COSTS), "in all, CPU s",
             "p95, ms", "a user's state, kB", "peak of an update, MB", "serves", "works on", "export"]  # fmt: skip
    top = _best(made, made["rows"])
    fronts = {c.key: front(made, c) for c in COSTS}
    found = []
    for r in _sorted(made):
        cells: list[Cell] = [(f"{r['quality']:.4f}", r is top)]
        cells += [interval(r["paired"][f], made["metric"]) for f in floors]
        cells += [(_amount(r[c.key] * c.scale), r["method"] in fronts[c.key]) for c in COSTS]
        peak = "–" if r["peak_mb"] is None else _amount(r["peak_mb"])
        how = "by gradient" if r["gradient"] else "in closed form" if r["closed"] else "in one pass"
        on = " ".join(kind for kind in ("ratings", "clicks", "scenarios") if r[kind])
        words = [_amount(r["train_all_s"]), _amount(r["latency_p95_ms"]), _amount(r["user_bytes"] / 1000), peak, how]
        cells += [(word, False) for word in (*words, on, "yes" if r["export"] else "no")]
        found.append((r["method"], cells))
    return heads, found


def _said(made: Made) -> str:
    data = made["dataset"]
    people = "" if made["cohort"] == "all" else f" (cohort {made['cohort']})"
    return (
        f"{data['name']}: {data['users']:,} users, {data['items']:,} items, {data['interactions']:,} interactions;"
        f" {made['tasks']:,} new users{people} to test on. {len(made['rows'])} methods, one split and one seed each."
    )


def _notes(made: Made) -> list[str]:
    return [
        "Quality: a mean over new users; differences on the same users, in brackets the 95 % interval of 10,000"
        " bootstrap resamples of them. Bold: better, and the interval excludes 0; of costs: on the Pareto front. The"
        " settings are good defaults, not the best that a search would find.",
        "Training: processor seconds of one thread, validation included, to the best checkpoint and to the end."
        f" Serving: adapt to one of {made['requests']} test users with all of the support and score"
        f" {made['candidates']} items, one thread, from the loaded checkpoint, methods taking turns. Memory: parameters"
        " and shared state; what adapting leaves of one user; and how far an update's peak lies above what was there"
        " before (batches as in training; – where there is none).",
    ]
