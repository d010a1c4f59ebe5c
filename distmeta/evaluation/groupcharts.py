"""Pictures of groups of tasks: step sizes, clusters, neighbours' ages, errors by method, users on a plane."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distmeta.evaluation.charts import INK, OTHER, SOFT, draw, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#000000")
"""Okabe & Ito's, the yellow darkened; groups beyond them begin again with other dashes or marks."""
DASHES = ("-", "--", ":", "-.")
MARKS = "osD^v"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STEPS = ("#9CCBE8", "#56A5D6", "#2B7BB5", "#14507D", "#062A47")
"""From light to dark, for steps of one quantity."""
AROUND: Any = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.75, "linewidth": 0}


def histograms(name: str, edges: Sequence[float], counts: Mapping[str, Sequence[int]]) -> str:
    """A quantity's distribution in each group, each as shares of its own tasks, laid over one another."""

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        for k, (group, n) in enumerate(counts.items()):
            shares, colour = 100 * np.asarray(n) / max(sum(n), 1), COLOURS[k % len(COLOURS)]
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.2)
            axes.stairs(shares, edges, color=colour, linewidth=1.6, linestyle=DASHES[k % 4], label=group)
        if edges[0] < 0 < edges[-1]:
            axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel(name)
        axes.set_ylabel("% of the group's tasks")
        axes.locator_params(axis="x", nbins=6)
        clean(axes)
        axes.legend(frameon=False, fontsize=8.5)

    return draw(2.6, paint, f"histogram {name}")


def clusters(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Cluster sizes by epoch, as shares stacked on one another, and the churn; None where no epoch tells them."""
    told = [(m["epoch"], m["clusters"]) for m in metrics if (m.get("clusters") or {}).get("sizes")]
    if not told:
        return None
    epochs = [e for e, _ in told]
    sizes = np.array([c["sizes"] for _, c in told], dtype=float)
    shares = 100 * sizes / np.maximum(sizes.sum(1, keepdims=True), 1)
    churn = [(e, 100 * c["churn"]) for e, c in told if finite(c.get("churn"))]
    anew = [e for e, c in told if c.get("reseeded")]

    def paint(figure: "Figure") -> None:
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        stacked(top, epochs, shares, "clusters")
        top.set_ylabel("% of tasks")
        if churn:
            below.plot(*zip(*churn, strict=True), color=INK, marker="o", markersize=2.5, linewidth=1.6)
        for e in anew:
            below.axvline(e, color=COLOURS[1], linestyle=":", linewidth=1.2)
        below.set_ylim(bottom=0)
        below.set_ylabel("churn, %")
        for axes in (top, below):
            clean(axes)
        by_epoch(below, "; dotted: clusters re-seeded" if anew else "")

    return draw(3.4, paint, "clusters")


def stacked(axes: "Axes", epochs: Sequence[int], shares: NDArray[np.float64], title: str) -> None:
    """Shares [E, K] of K numbered groups by epoch, on one another, in the groups' colours and with a legend."""
    floor = np.zeros(len(epochs))
    for k, part in enumerate(shares.T):
        axes.bar(epochs, part, bottom=floor, width=0.8, color=COLOURS[k % len(COLOURS)], alpha=0.8, label=f"{k}")
        floor += part
    axes.set_title(title, loc="left", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0,
                handlelength=1, columnspacing=1)  # fmt: skip


def assignment(field: str, values: Sequence[str], shares: Sequence[Sequence[float]], name: str) -> str:
    """What share of each cluster's tasks has each value of a field: a heat map with its numbers."""

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        table = 100 * np.asarray(shares).T
        heat(axes, table, 100.0)
        axes.set_xticks(range(table.shape[1]), [str(k) for k in range(table.shape[1])])
        axes.set_yticks(range(len(values)), [str(v)[:24] for v in values])
        axes.set_xlabel("cluster")
        axes.set_title(f"{field}: % of the cluster", loc="left", fontsize=9)
        axes.invert_yaxis()

    return draw(0.24 * len(values) + 0.9, paint, name)


def ages(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """How long unused the neighbours were that searches returned, by epoch; None where no epoch tells it.

    Each epoch's "index" holds "age": counts in bins 0, 1, 2–3, 4–7, … of meta-updates since a node was last used or
    stored.
    """
    told = [(m["epoch"], m["index"]["age"]) for m in metrics if sum((m.get("index") or {}).get("age") or []) > 0]
    if not told:
        return None
    bins = max(len(age) for _, age in told)
    table = np.array([[*age, *[0] * (bins - len(age))] for _, age in told], dtype=float)
    shares = 100 * (table / table.sum(1, keepdims=True)).T
    used = np.flatnonzero(shares.any(1)).max() + 1

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        heat(axes, shares[:used], float(shares.max()), numbers=len(told) <= 12)
        step = -(-len(told) // 10)
        axes.set_xticks(range(0, len(told), step), [str(e) for e, _ in told[::step]])
        axes.set_yticks(range(used), [_age(k) for k in range(used)])
        axes.set_xlabel("epoch")
        axes.set_ylabel("age, meta-updates")
        axes.set_title("% of an epoch's neighbours", loc="left", fontsize=9)

    return draw(0.22 * used + 1.1, paint, "ages")


def _age(k: int) -> str:
    """The ages of a bin: 0, 1, 2–3, 4–7, …"""
    low, high = (1 << k) >> 1, (1 << k) - 1
    return f"{low}" if low >= high else f"{low:,}–{high:,}"


def boxes(values: Mapping[str, Mapping[str, NDArray[np.float64]]], label: str, name: str) -> str:
    """Box plots of per-user numbers: a row a method, a box a group; whiskers to 1.5 times the box, points beyond."""
    groups = list(dict.fromkeys(g for of in values.values() for g in of))

    def paint(figure: "Figure") -> None:
        from matplotlib.patches import Patch

        axes = figure.subplots()
        height = 0.8 / len(groups)
        for row, of in enumerate(values.values()):
            for k, group in enumerate(groups):
                if len(of.get(group, ())):
                    _box(axes, of[group], row - 0.4 + (k + 0.5) * height, 0.4 * height, COLOURS[k % len(COLOURS)])
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        clean(axes, "x")
        if len(groups) > 1:
            handles = [Patch(color=COLOURS[k % len(COLOURS)], alpha=0.5, label=g) for k, g in enumerate(groups)]
            axes.legend(handles=handles, frameon=False, fontsize=8.5, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))

    return draw(0.3 * len(values) * max(1, 0.7 * len(groups)) + 0.9, paint, name)


def _box(axes: "Axes", values: NDArray[np.float64], at: float, half: float, colour: str) -> None:
    """One box at height `at`: quartiles and median, whiskers to the last values within 1.5 times the box (Tukey)."""
    from matplotlib.patches import Rectangle

    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    near = values[(values >= low - 1.5 * (high - low)) & (values <= high + 1.5 * (high - low))]
    beyond = values[(values < near.min()) | (values > near.max())]
    axes.add_patch(Rectangle((low, at - half), high - low, 2 * half, facecolor=colour, alpha=0.5, linewidth=0))
    axes.plot([middle, middle], [at - half, at + half], color=INK, linewidth=1.8)
    for end, side in ((near.min(), low), (near.max(), high)):
        axes.plot([end, side], [at, at], color=SOFT, linewidth=0.9)
        axes.plot([end, end], [at - half / 2, at + half / 2], color=SOFT, linewidth=0.9)
    axes.plot(beyond, np.full(len(beyond), at), ".", color=colour, markersize=2.2, alpha=0.45, markeredgewidth=0)


def plane(
    points: NDArray[np.float64],
    group: Sequence[str] | NDArray[np.str_],
    title: str,
    name: str,
    shown: Sequence[str] | None = None,
    ordered: bool = False,
) -> str:
    """Points [n, 2], each with its group's colour and mark, and at each group's mean its letter in the legend.

    Args:
        shown: the groups in the order of the legend, whoever is in none of them grey; None: all by name.
        ordered: the groups are steps of one quantity: colours from light to dark.
    """
    names, told = np.asarray(group), sorted(set(group)) if shown is None else shown
    colours = STEPS[-len(told) :] if ordered and len(told) <= len(STEPS) else COLOURS

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        others = ~np.isin(names, told)
        if others.any():
            axes.plot(*points[others].T, "o", color=OTHER, markersize=1.6, alpha=0.5, markeredgewidth=0)
        for k, g in enumerate(told):
            x, y = points[names == g].T
            label = f"{LETTERS[k % 26]}  {textwrap.shorten(g, 34, placeholder='…')} ({len(x):,})"
            axes.plot(x, y, MARKS[k % len(MARKS)], color=colours[k % len(colours)], markersize=2.6, alpha=0.6,
                      markeredgewidth=0, label=label)  # fmt: skip
        for k, g in enumerate(told):
            x, y = points[names == g].mean(0)
            axes.text(x, y, LETTERS[k % 26], ha="center", va="center", fontsize=8.5,
                      fontweight="bold", bbox=AROUND)  # fmt: skip
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second")
        axes.set_title(title, loc="left", fontsize=9)
        axes.tick_params(length=0)
        figure.legend(frameon=False, fontsize=8.5, markerscale=2.5, loc="outside lower left", handletextpad=0.2,
                      ncols=1 if max(map(len, told)) > 20 else 2)  # fmt: skip

    rows = len(told) if max(map(len, told)) > 20 else -(-len(told) // 2)
    return draw(3.2 + 0.17 * rows, paint, name)


def heat(axes: "Axes", table: NDArray[np.float64], most: float, numbers: bool = True) -> None:
    """Cells whose shade is their number, which stands in them too."""
    from matplotlib.patches import Rectangle

    for (i, j), value in np.ndenumerate(table):
        axes.add_patch(
            Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=COLOURS[0], alpha=value / (most or 1), linewidth=0)
        )
        if numbers:
            dark = value > 0.55 * most
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
    axes.set_xlim(-0.5, table.shape[1] - 0.5)
    axes.set_ylim(-0.5, table.shape[0] - 0.5)
    axes.tick_params(length=0, labelcolor=INK)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def by_epoch(axes: "Axes", more: str = "") -> None:
    """Whole numbers along the lower axis, also where there is one alone; `more` is said there too."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(f"epoch{more}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def clean(axes: "Axes", along: Any = "y") -> None:
    """Grid lines across one axis and no ticks."""
    axes.grid(axis=along)
    axes.tick_params(length=0)
