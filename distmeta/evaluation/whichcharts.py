"""Quality against each cost, method by method: three pictures whose Pareto front is marked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distmeta.evaluation import pareto
from distmeta.evaluation.charts import INK, METHOD, OTHER, SOFT, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.6
_LABEL = 0.2
"""Inches from one label to the next."""


@dataclass(frozen=True)
class Cost:
    """One axis of costs."""

    key: str
    """Of a row."""
    head: str
    """In a table."""
    label: str
    """On the axis."""
    scale: float
    """From the row's unit to the one that is shown."""
    said: str
    """An amount in words."""


COSTS = (
    Cost("train_s", "training, CPU s", "CPU seconds of training, to the best checkpoint", 1.0, "{} CPU s to train"),
    Cost(
        "latency_ms",
        "a user, ms",
        "median milliseconds to adapt to a user and score",
        1.0,
        "{} ms a user",
    ),
    Cost("model_bytes", "model, MB", "MB of parameters and shared state", 1e-6, "{} MB"),
)


def higher(made: Mapping[str, Any]) -> bool:
    """Whether more of the page's quality is better."""
    return made["metric"] != "mae"


def front(made: Mapping[str, Any], cost: Cost) -> list[str]:
    """Methods that no other beats in quality and this cost at once, the cheapest first."""
    sign = -1 if higher(made) else 1
    rows = made["rows"]
    return [rows[i]["method"] for i in pareto.front([(r[cost.key], sign * r["quality"]) for r in rows])]


def sheet(made: Mapping[str, Any]) -> str:
    """The picture as a file of its own."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + scatters(made).replace(' aria-hidden="true"', "", 1)


def scatters(made: Mapping[str, Any]) -> str:
    """<svg>: a panel a cost, one under the other; names stand in a column beside it, each with a line to its point."""
    height = max(2.6, _LABEL * len(made["rows"]) + 0.9)

    def paint(figure: "Figure") -> None:
        parts: Any = figure.subplots(len(COSTS), 1, squeeze=False)
        for axes, cost in zip(parts[:, 0], COSTS, strict=True):
            _panel(axes, made, cost, (height - 0.7) / _LABEL)

    return draw(height * len(COSTS), paint, made["name"], WIDTH)


def _panel(axes: "Axes", made: Mapping[str, Any], cost: Cost, room: float) -> None:
    rows, on_front = made["rows"], front(made, cost)
    x = {r["method"]: r[cost.key] * cost.scale for r in rows}
    y = {r["method"]: r["quality"] for r in rows}
    axes.set_xscale("log")
    axes.plot([x[m] for m in on_front], [y[m] for m in on_front], color=METHOD, linewidth=1.2, drawstyle="steps-post")
    for name in x:
        mine = name in on_front
        axes.plot(x[name], y[name], marker="o", markersize=7 if mine else 6, linestyle="none", color=METHOD,
                  markerfacecolor=METHOD if mine else "white", markeredgecolor=METHOD if mine else SOFT)  # fmt: skip
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # LogFormatter's are TeX
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.margins(x=0.06, y=0.08)
    if not higher(made):
        axes.invert_yaxis()  # up is better
    axes.set_xlabel(f"{cost.label} (left is better)")
    axes.set_ylabel(f"{made['metric'].upper()} (up is better)")
    axes.grid(axis="both")
    axes.tick_params(length=0, which="both")
    low, high = axes.get_ylim()
    at = spread([(y[name] - low) / (high - low) for name in x], 1 / room)
    for (name, value), fraction in zip(x.items(), at, strict=True):
        mine = name in on_front
        axes.annotate(
            name, (value, y[name]), (1.04, fraction), "data", "axes fraction", va="center", fontsize=8.5,
            annotation_clip=False, color=INK, fontweight="bold" if mine else "normal",
            arrowprops={"arrowstyle": "-", "color": METHOD if mine else OTHER, "linewidth": 0.6, "relpos": (0, 0.5),
                        "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places (0 to 1) for labels that want these, in that order from below, at least `gap` apart where it fits."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    gap = min(gap, 1 / max(1, len(order) - 1))
    found: dict[int, float] = {}
    below = -gap
    for i in order:
        found[i] = below = max(min(max(wanted[i], 0.0), 1.0), below + gap)
    above = 1.0 + gap
    for i in reversed(order):
        found[i] = above = min(found[i], above - gap)
    return [found[i] for i in range(len(wanted))]
