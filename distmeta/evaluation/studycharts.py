"""Pictures of parameter studies: MAE above, NDCG@3 below, against one parameter's values."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distmeta.evaluation.charts import INK, SOFT, WIDTH, draw, finite
from distmeta.evaluation.groupcharts import COLOURS, DASHES, MARKS
from distmeta.evaluation.studies import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

HEIGHT = 3.9
"""Inches of one panel."""
ACROSS = 5
"""Panels beside one another on the stand-alone picture, at most."""
_FLOORS = ((1, 1.5), (5, 2))
"""Dashes of the floors' lines, in points on and off."""

Panel = Mapping[str, Any]
"""One of the panels that `study.assemble` gives."""


def panel(found: Panel, split: str, name: str) -> str:
    """One panel, one split, as an <svg> element; `name` keeps its ids apart from others' on the page."""
    return draw(HEIGHT, lambda figure: _paint(figure, found, split), name)


def sheet(panels: Sequence[Panel], splits: Mapping[str, str], name: str) -> str:
    """All panels and splits on one picture: a file of its own.

    Args:
        splits: split -> what stands above its panels.
    """
    cells = [(p, split) for p in panels for split in splits]
    down = -(-len(cells) // (ACROSS // len(splits) * len(splits)))
    across = -(-len(panels) // down) * len(splits)

    def paint(figure: "FigureBase") -> None:
        parts = figure.subfigures(down, across, squeeze=False).ravel()
        for part, (found, split) in zip(parts, cells, strict=False):
            part.suptitle(splits[split] if len(splits) > 1 else found["label"], x=0.02, ha="left", fontsize=9.5)
            _paint(part, found, split)

    svg = draw((HEIGHT + 0.3) * down, paint, name, WIDTH * across)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace(' aria-hidden="true"', "", 1)


def _paint(figure: "FigureBase", found: Panel, split: str) -> None:
    rows = figure.subplots(len(METRICS), 1, sharex=True)
    for axes, (metric, head) in zip(rows, METRICS.items(), strict=True):
        if split == "test":
            _floors(axes, found, metric)
        several = len(found["curves"]) > 1
        for k, curve in enumerate(found["curves"]):
            _curve(axes, curve, k, found, metric, split, several)
        axes.set_ylabel(head)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.margins(x=0.08, y=0.12)
    default = found["values"].index(found["default"])
    rows[-1].set_xticks(range(len(found["values"])), [f"{v:g}" for v in found["values"]])
    rows[-1].get_xticklabels()[default].set(color=INK, fontweight="bold")
    rows[-1].set_xlabel(found["label"])
    handles, labels = rows[0].get_legend_handles_labels()
    rows[0].legend(handles, labels, frameon=False, fontsize=8, ncols=len(labels), loc="lower left",
                   bbox_to_anchor=(0, 1), borderaxespad=0.1, handlelength=2.2, columnspacing=1.2)  # fmt: skip


def _curve(
    axes: "Axes", curve: Mapping[str, Any], k: int, found: Panel, metric: str, split: str, several: bool
) -> None:
    """One curve with its deviations; curves beside one another are moved apart a little, so that bars stay legible."""
    there = [(i, point) for i, point in enumerate(curve["points"]) if not point["failed"]]
    numbers = [(i, point["splits"][split][metric]) for i, point in there]
    known = [(i, n) for i, n in numbers if finite(n["mean"])]
    shift = 0.06 * (k - (len(found["curves"]) - 1) / 2) if several else 0.0
    x, y = [i + shift for i, _ in known], [n["mean"] for _, n in known]
    bars = [n["sd"] or 0.0 for _, n in known]
    colour = COLOURS[k % len(COLOURS)]
    axes.errorbar(x, y, yerr=bars if any(bars) else None, color=colour, marker=MARKS[k % len(MARKS)], markersize=4.5,
                  linewidth=1.7, elinewidth=1.1, capsize=2.5, linestyle=DASHES[k % len(DASHES)],
                  label=curve["label"])  # fmt: skip
    default = found["values"].index(found["default"])
    ringed = [(a, b) for (i, _), a, b in zip(known, x, y, strict=True) if i == default]
    for at in ringed:
        axes.plot(*at, marker="o", markersize=10, markerfacecolor="none", markeredgecolor=INK, linestyle="none")


def _floors(axes: "Axes", found: Panel, metric: str) -> None:
    for (floor, points), dashes in zip(found["floors"].items(), _FLOORS, strict=True):
        means = [p[metric]["mean"] for p in points]
        known = [(i, m) for i, m in enumerate(means) if finite(m)]
        if known:
            axes.plot(*zip(*known, strict=True), color=SOFT, linewidth=1.2, dashes=dashes, label=floor)
