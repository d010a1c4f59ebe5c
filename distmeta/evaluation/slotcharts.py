"""Pictures of a memory's slots: what each stands for, and how attention is spread over them."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distmeta.evaluation.charts import INK, METHOD, SOFT, draw, finite
from distmeta.evaluation.groupcharts import COLOURS, by_epoch, clean, stacked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def overview(slots: Mapping[str, Any]) -> str:
    """A row a slot: a bar of its mean attention, a ring at that of its top tasks, and above both its name.

    Args:
        slots: `facts.summary`'s entry facts.SLOTS.
    """
    usage, answer = 100 * np.asarray(slots["usage"]), 100 * np.asarray(slots["answer"])
    rows = np.arange(len(usage))

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        for k, (all_, top, name) in enumerate(zip(usage, answer, slots["names"], strict=True)):
            colour = COLOURS[k % len(COLOURS)]
            axes.barh(k, all_, height=0.3, color=colour, alpha=0.8)
            axes.plot([all_, top], [k, k], color=colour, linewidth=1.2)
            axes.plot(top, k, "o", color=colour, markerfacecolor="white", markersize=6, clip_on=False)
            said = textwrap.shorten(name, 62, placeholder=" …") or ("like all test tasks" if slots["fields"] else "")
            axes.text(0, k - 0.36, said, fontsize=8.5, va="center", color=INK if name else SOFT)
            axes.text(104, k, f"{all_:.1f} → {top:.1f}", fontsize=8.5, va="center")
        axes.set_xlim(0, 100)
        axes.set_ylim(len(usage) - 0.6, -0.7)
        axes.set_yticks(rows, [f"slot {k}" for k in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel("attention, %; bar: all test tasks, ring: the slot’s top tasks")
        clean(axes, "x")

    return draw(0.46 * len(usage) + 0.6, paint, "slots")


def field(name: str, found: Mapping[str, Any], label: str) -> str:
    """How a user field's values are spread among each slot's top tasks, a row a slot, beside all test tasks.

    Args:
        found: "values" [V], "shares" [K][V], "overall" [V], as in `facts.summary`. label: keeps element ids apart.
    """
    shares, overall = 100 * np.asarray(found["shares"]), 100 * np.asarray(found["overall"])
    values = [textwrap.shorten(str(v), 24, placeholder="…") for v in found["values"]]
    highest = 1.25 * max(shares.max(), overall.max())
    upright = len(values) * max(map(len, values)) > 50

    def paint(figure: "Figure") -> None:
        column = figure.subplots(len(shares), 1, sharex=True, squeeze=False)[:, 0]
        for k, (axes, of) in enumerate(zip(column, shares, strict=True)):
            _beside(axes, of, overall, COLOURS[k % len(COLOURS)])
            axes.set_ylim(0, highest)
            axes.set_yticks([])
            axes.set_ylabel(f"slot {k}", rotation=0, ha="right", va="center", color=INK)
        column[-1].set_xticks(range(len(values)), values, rotation=90 if upright else 0, fontsize=8.5)
        column[-1].tick_params(labelcolor=INK)
        column[0].set_title(f"{name}: % of the slot’s top tasks (line: of all)", loc="left", fontsize=9)

    beneath = 0.075 * max(map(len, values)) if upright else 0.15
    return draw(0.52 * len(shares) + 0.45 + beneath, paint, label)


def _beside(axes: "Axes", of: NDArray[np.float64], overall: NDArray[np.float64], colour: str) -> None:
    """Bars of one distribution with a line across each at the other's height, and their numbers."""
    at = np.arange(len(of))
    axes.bar(at, of, width=0.8, color=colour, alpha=0.7)
    axes.hlines(overall, at - 0.45, at + 0.45, color=INK, linewidth=1.4)
    few = len(of) <= 12
    for x, (share, usual) in enumerate(zip(of, overall, strict=True)):
        if few or share >= 0.5:
            axes.annotate(f"{share:.0f}", (x, max(share, usual)), (0, 2), textcoords="offset points", ha="center",
                          fontsize=8.5 if few else 6.5)  # fmt: skip
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def training(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """The attention's entropy, the slots' likeness and their use by epoch; None where no epoch tells of two slots.

    Args:
        metrics: lines of metrics.jsonl; "memory" holds {"entropy", "usage": [K], "alike"}.
    """
    told = [(m["epoch"], m["memory"]) for m in metrics if _spread((m.get("memory") or {}).get("usage") or [])]
    if not told:
        return None
    epochs = [e for e, _ in told]
    usage = 100 * np.array([memory["usage"] for _, memory in told], dtype=float)
    lines = {
        word: ([(e, memory[key]) for e, memory in told if finite(memory.get(key))], style)
        for key, word, style in (
            ("entropy", "entropy of the attention", {"color": METHOD, "marker": "o"}),
            ("alike", "slots’ mean cosine", {"color": COLOURS[1], "marker": "s", "linestyle": "--"}),
        )
    }
    lines = {word: line for word, line in lines.items() if line[0]}

    def paint(figure: "Figure") -> None:
        heights = (3, 2) if lines else (2,)
        *above, below = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes in above:
            for word, (points, style) in lines.items():
                axes.plot(*zip(*points, strict=True), **style, markersize=2.5, linewidth=1.6,
                          label=f"{word}: {points[-1][1]:.4f} at the end")  # fmt: skip
            axes.axhline(1, color=SOFT, linewidth=1, linestyle=":")
            axes.set_ylim(min(0, *(v for points, _ in lines.values() for _, v in points)) - 0.03, 1.06)
            axes.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        stacked(below, epochs, usage, "slots")
        below.set_ylabel("% of attention")
        for axes in (*above, below):
            clean(axes)
        by_epoch(below)

    return draw(3.6 if lines else 1.9, paint, "attention")


def _spread(usage: Sequence[Any]) -> bool:
    return len(usage) > 1 and all(map(finite, usage))
