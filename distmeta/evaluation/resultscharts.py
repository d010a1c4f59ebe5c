"""The picture of a reproduced table: each row's number, ours and the paper's, and its difference to the best floor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distmeta.evaluation.charts import BETTER, INK, METHOD, SOFT, WORSE, draw, signed
from distmeta.evaluation.reproduction import HIGHER, best

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.6
_ROW = 0.25
"""Inches."""


@dataclass(frozen=True)
class Row:
    """A row of a table in one of its columns."""

    label: str
    floor: bool
    paper: float | None
    """Of the same data; None where the paper has none."""
    ours: float | None
    spread: float
    """What stands after ±, 0 for nothing."""
    difference: Sequence[float | None]
    """To the best floor: [difference, low, high], or nothing."""


@dataclass(frozen=True)
class Panel:
    """One column."""

    head: str
    metric: str
    against: str
    """The floor of the differences; "" for none."""
    rows: Sequence[Row]


def sheet(panels: Sequence[Panel], name: str) -> str:
    """The picture as a file of its own."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + dots(panels, name).replace(' aria-hidden="true"', "", 1)


def dots(panels: Sequence[Panel], name: str) -> str:
    """<svg>: for each column, left the numbers, right the differences; a line a row."""
    heights = [_ROW * len(p.rows) + 1.0 for p in panels]

    def paint(figure: "Figure") -> None:
        parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False).ravel()
        for part, found in zip(parts, panels, strict=True):
            part.suptitle(found.head, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
            left, right = part.subplots(1, 2, sharey=True, width_ratios=[1, 1])
            _numbers(left, found)
            _differences(right, found)

    return draw(sum(heights), paint, name, WIDTH)


def _numbers(axes: "Axes", found: Panel) -> None:
    for at, row in enumerate(found.rows):
        if row.paper is not None:
            axes.plot(row.paper, at, marker="D", markersize=5, color=SOFT, markerfacecolor="white", linestyle="none")
        if row.ours is None:
            continue
        if row.spread:
            axes.plot([row.ours - row.spread, row.ours + row.spread], [at, at], color=METHOD, linewidth=1.6)
        mark, face = ("s", SOFT) if row.floor else ("o", METHOD)
        axes.plot(row.ours, at, marker=mark, markersize=5.5, color=face, linestyle="none")
    top = next((r.ours for r in found.rows if r.label == found.against), None)
    if top is not None:
        axes.axvline(top, color=SOFT, linewidth=1, linestyle=(0, (4, 2)))
    _handles(axes, found)
    axes.set_yticks(range(len(found.rows)), [r.label for r in found.rows])
    for tick in axes.get_yticklabels():
        tick.set_color(INK)
    more = "larger" if found.metric.startswith(HIGHER) else "smaller"
    _finish(axes, found, f"{found.metric.removesuffix('_ratings').upper()} ({more} is better)")


def _handles(axes: "Axes", found: Panel) -> None:
    from matplotlib.lines import Line2D

    kinds = [("o", METHOD, METHOD, "ours")]
    kinds += [("s", SOFT, SOFT, "floor")] if any(r.floor for r in found.rows) else []
    kinds += [("D", SOFT, "white", "paper")] if any(r.paper is not None for r in found.rows) else []
    handles = [
        Line2D([], [], marker=m, color=c, markerfacecolor=f, linestyle="none", markersize=5, label=label)
        for m, c, f, label in kinds
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1),
                borderaxespad=0.1, handletextpad=0.2, columnspacing=1.2)  # fmt: skip


def _differences(axes: "Axes", found: Panel) -> None:
    axes.axvline(0, color=SOFT, linewidth=1)
    higher = found.metric.startswith(HIGHER)
    beside = axes.get_yaxis_transform()  # x: fraction of the axes, y: row
    ends = [0.0]
    for at, row in enumerate(found.rows):
        known = [float(v) for v in row.difference if v is not None]
        if not known:
            continue
        ends += known
        sure = len(known) == 3 and not known[1] <= 0 <= known[2]
        colour = (BETTER if (known[0] > 0) == higher else WORSE) if sure else SOFT
        if len(known) == 3:
            axes.plot(known[1:], [at, at], color=colour, linewidth=2, solid_capstyle="butt")
        face = colour if sure else "white"
        axes.plot(known[0], at, marker="o", markersize=5.5, color=colour, markerfacecolor=face, linestyle="none")
        axes.text(1.02, at, signed(known[0]), va="center", fontsize=8.5, transform=beside)
    reach = max(map(abs, ends)) or 0.01
    axes.set_xlim(min(min(ends) - 0.08 * reach, -0.35 * reach), max(max(ends) + 0.08 * reach, 0.35 * reach))
    words = ("← worse", "better →") if higher else ("← better", "worse →")
    for text, side, gap in zip(words, ("right", "left"), (-4, 4), strict=True):
        axes.annotate(
            text, (0, 1), (gap, 2), axes.get_xaxis_transform(), "offset points", ha=side, fontsize=8.5, color=SOFT
        )
    _finish(axes, found, f"minus {found.against}, on the same tasks" if found.against else "no floor is judged here")


def _finish(axes: "Axes", found: Panel, label: str) -> None:
    axes.set_ylim(len(found.rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)


def panels(found: Mapping[str, Any]) -> list[Panel]:
    """The key columns of a table (`reproduction.assemble`) that have a number of ours."""
    from distmeta.evaluation.reproduction_page import column_scale, plus_minus, titled

    made = []
    for s, c, p in found["key"]:
        section = found["sections"][s]
        column, scale = section["columns"][c], column_scale(found, section["columns"][c]["metric"])
        if not any(row["ours"][c] and row["ours"][c]["mean"] is not None for row in section["rows"]):
            continue
        against = best_floor(found, section, c)
        pairs = {q["label"]: q["differences"][c] for q in section["paired"] if q["against"] == against}
        rows = []
        for row in section["rows"]:
            ours, paper = row["ours"][c], row["paper"][p] if p == c else None
            if ours is None and paper is None:
                continue
            mean = None if ours is None else scale * ours["mean"]
            difference = [None if d is None else scale * d for d in pairs.get(row["label"]) or ()]
            spread = plus_minus(found, ours, scale) or 0.0 if ours else 0.0
            rows.append(Row(row["label"], row["floor"], paper[0] if paper else None, mean, spread, difference))
        head = " · ".join(t for t in (titled(column["dataset"]), section["title"], column["head"]) if t)
        made.append(Panel(head, column["metric"], against, rows))
    return made


def best_floor(found: Mapping[str, Any], section: Mapping[str, Any], column: int) -> str:
    """The floor of those judged that is best in a column, or else the row that all others are compared with; "" for
    neither."""
    rows = [r for r in section["rows"] if r["label"] in others(found, section)]
    top = best(rows, column, section["columns"][column]["metric"], "ours")
    return rows[top[0]]["label"] if top else ""


def others(found: Mapping[str, Any], section: Mapping[str, Any]) -> list[str]:
    """What the rows are compared with: the floors judged, or where there are none the one row that all others are."""
    rows = list(dict.fromkeys(q["against"] for q in section["paired"]))
    return found["judged"] or (rows if len(rows) == 1 else [])
