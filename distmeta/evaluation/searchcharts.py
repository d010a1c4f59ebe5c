"""Pictures of a hyperparameter search: what its trials came to, by number, epoch, parameter and time.

Each gives None where there is nothing to draw. In all of them a darker mark is a better trial, the best has a colour of
its own, and what lies above `searchrows.ceiling` stands at the upper edge.
"""

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distmeta.evaluation.charts import INK, METHOD, OTHER, SOFT, draw, finite
from distmeta.evaluation.groupcharts import COLOURS, STEPS, by_epoch, clean
from distmeta.evaluation.searchrows import (
    COMPLETE,
    FAILED,
    PRUNED,
    STATES,
    Axis,
    Search,
    Trial,
    Value,
    ceiling,
    front,
    so_far,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEST = COLOURS[1]
ABSENT = 1.12
"""Where on a parameter's axis, whose upper end is 1, lines go by that have no value of it."""
ACROSS = 2
"""Slices beside one another."""


def history(found: Search) -> str | None:
    """Each trial's value against its number, and the best so far."""
    shown = sorted(_ranked(found.trials), key=lambda t: t.number)
    if not shown:
        return None
    failed = [t for t in found.trials if t.state == FAILED or (t.state == COMPLETE and not finite(t.value))]

    def paint(figure: "Figure") -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        top = _limit(axes, [t.value for t in shown if t.value is not None])
        done = [t for t in shown if t.state == COMPLETE]
        cut = [t for t in shown if t.state == PRUNED]
        _marks(axes, cut, lambda t: t.number, top, "pruned", color="white", edgecolor=SOFT, s=13)
        _marks(axes, done, lambda t: t.number, top, "completed", color=METHOD, s=17)
        if failed:
            axes.plot([t.number for t in failed], [0.02] * len(failed), "x", color=SOFT, markersize=4.5,
                      transform=axes.get_xaxis_transform(), label="failed", clip_on=False)  # fmt: skip
        steps = so_far(found.trials)
        if steps:
            x, y = [n for n, _ in steps], [v for _, v in steps]
            x, y = [*x, found.trials[-1].number], [*y, y[-1]]
            axes.step(x, y, where="post", color=BEST, linewidth=1.6, label="best so far", zorder=1.5)
        named = [t for t in shown if t.source and not t.default]
        ring: Any = {"color": "none", "edgecolor": INK, "linewidth": 1.2}
        _marks(axes, [t for t in shown if t.default], lambda t: t.number, top, "defaults", marker="o", s=85, **ring)
        _marks(axes, named, lambda t: t.number, top, "papers", marker="s", s=70, **ring)
        axes.set_ylabel(found.objective)
        axes.set_xlabel("trial")
        axes.margins(x=0.04)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        clean(axes)
        _legend(axes)

    return _draw(3.2, paint, "history")


def curves(found: Search) -> str | None:
    """What each trial told, by epoch."""
    told = [(t, [(e, v) for e, v in sorted(t.curve.items()) if finite(v)]) for t in found.trials]
    told = [(t, points) for t, points in told if points]
    if not any(len(points) > 1 for _, points in told):
        return None

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        top = _limit(axes, [v for _, points in told for _, v in points])
        for state, width, colour in ((FAILED, 0.5, OTHER), (PRUNED, 0.5, SOFT), (COMPLETE, 1.0, METHOD)):
            _lines(axes, [points for t, points in told if t.state == state], state, width, colour)
        ends = [points[-1] for t, points in told if t.state == PRUNED]
        if ends:
            x, y = zip(*ends, strict=True)
            axes.scatter(x, np.minimum(y, top or math.inf), s=5, color=SOFT, linewidth=0)
        best = next((points for t, points in told if t is found.best), None)
        if best:
            axes.plot(*zip(*best, strict=True), color=BEST, linewidth=2.6, label="best", marker="o", markersize=3)
        axes.set_ylabel(found.objective)
        by_epoch(axes)
        clean(axes)
        _legend(axes)

    return _draw(3.2, paint, "curves")


def _lines(axes: "Axes", lines: Sequence[Sequence[tuple[int, float]]], state: str, width: float, colour: str) -> None:
    from matplotlib.collections import LineCollection

    if lines:
        axes.add_collection(
            LineCollection(list(lines), linewidths=width * _fine(len(lines)), colors=colour, label=STATES[state])
        )
        # one point alone is no line
        single = [points[0] for points in lines if len(points) == 1]
        axes.plot(*zip(*single, strict=True), ".", color=colour, markersize=3) if single else None
        axes.autoscale_view()


def parallel(found: Search) -> str | None:
    """A row a parameter, the lowest the value, and a line a trial from row to row."""
    trials = [t for t in reversed(_ranked(found.trials)) if t.params]
    if len(trials) < 2:
        return None
    values = [t.value for t in trials if t.value is not None]
    top = ceiling(values)
    scale = Axis(found.objective, min(values), top if top is not None else max(values))
    ends = [(0.0, f"{scale.low:.4f}"), (1.0, f"{scale.high:.4f}" + " or more" * (top is not None))]
    across = [_crossings(t, found.axes, 1 - (k + 0.5) / len(trials)) for k, t in enumerate(trials)]
    across = np.column_stack([across, [min(scale.at(v), 1.0) for v in values]])
    absent = bool((across == ABSENT).any())

    def paint(figure: "Figure") -> None:
        from matplotlib.collections import LineCollection

        axes = figure.subplots()
        lines = np.stack([across, np.broadcast_to(np.arange(across.shape[1]), across.shape)], 2)
        wide = [2.4 if t is found.best else 0.8 * _fine(len(trials)) for t in trials]
        axes.add_collection(LineCollection(list(lines), colors=_shades(trials, found.best), linewidths=wide))
        for row, axis in enumerate([*found.axes, scale]):
            axes.plot([0, 1], [row, row], color=INK, linewidth=0.9)
            for at, text in ends if axis is scale else axis.ticks():
                axes.plot([at, at], [row, row + 0.12], color=INK, linewidth=0.9)
                place: Any = {0.0: "left", 1.0: "right"}.get(at, "center")
                axes.text(at, row + 0.17, text, ha=place, va="top", fontsize=7.5, color=INK, bbox=_PLAIN)
        for row in np.flatnonzero((across == ABSENT).any(0)):
            axes.text(ABSENT, row + 0.17, "none", ha="center", va="top", fontsize=7.5, color=SOFT, bbox=_PLAIN)
        names = [axis.name for axis in [*found.axes, scale]]
        axes.set_yticks(range(len(names)), [textwrap.fill(name, 12, break_long_words=False) for name in names])
        axes.get_yticklabels()[-1].set(fontweight="bold")
        axes.tick_params(length=0, labelcolor=INK, labelsize=8.5, labelbottom=False)
        axes.set_xlim(-0.03, ABSENT + 0.06 if absent else 1.03)
        axes.set_ylim(across.shape[1] - 0.4, -0.4)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)

    return _draw(0.55 * across.shape[1] + 0.2, paint, "parallel")


_PLAIN: Any = {"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.85, "linewidth": 0}


def _crossings(trial: Trial, axes: Sequence[Axis], rank: float) -> list[float]:
    return [_beside(axis, trial.params[axis.name], rank) if axis.name in trial.params else ABSENT for axis in axes]


def _beside(axis: Axis, value: Value, rank: float) -> float:
    """Where a value lies; of choices the trials lie beside one another, better ones (of a lower `rank`) left."""
    return axis.at(value) + (0.6 * (rank - 0.5) / len(axis.choices) if axis.choices else 0.0)


def slices(found: Search) -> str | None:
    """A panel a parameter: each trial's value against the parameter's."""
    trials = list(reversed(_ranked(found.trials)))
    shown = [axis for axis in found.axes if any(axis.name in t.params for t in trials)]
    if not shown:
        return None
    down = -(-len(shown) // ACROSS)

    def paint(figure: "Figure") -> None:
        panels = figure.subplots(down, ACROSS, sharey=True, squeeze=False).ravel()
        top = _limit(panels[0], [t.value for t in trials if t.value is not None])
        for axes, axis in zip(panels, shown, strict=False):
            _slice(axes, axis, trials, found.best, top)
        for axes in panels[len(shown) :]:
            axes.axis("off")
        figure.supylabel(found.objective, fontsize=9, color=SOFT)

    return _draw(1.35 * down + 0.2, paint, "slices")


def _slice(axes: "Axes", axis: Axis, trials: Sequence[Trial], best: Trial | None, top: float | None) -> None:
    mine = [(k, t) for k, t in enumerate(trials) if axis.name in t.params]
    ranks = {t.number: 1 - (k + 0.5) / len(trials) for k, t in mine}
    shades = dict(zip((t.number for t in trials), _shades(trials, best), strict=True))
    for state in (PRUNED, COMPLETE):
        group = [t for _, t in mine if t.state == state]
        colours = [shades[t.number] for t in group]
        look: Any = {"color": "white", "edgecolor": colours, "s": 10} if state == PRUNED else {"c": colours, "s": 15}
        _marks(axes, group, lambda t: _beside(axis, t.params[axis.name], ranks[t.number]), top, "", **look)
    if best and best.value is not None and axis.name in best.params:
        at = _beside(axis, best.params[axis.name], ranks[best.number])
        axes.scatter([at], [best.value], s=70, color="none", edgecolor=BEST, linewidth=1.6)
    ticks = axis.ticks()
    crowded = sum(len(text) + 1 for _, text in ticks) > 26
    labels = ["\n".join(text.split()) if crowded else text for _, text in ticks]
    axes.set_xticks([at for at, _ in ticks], labels, fontsize=7.5)
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set_xlim(-0.1, 1.1)
    axes.set_title(axis.name, loc="left", fontsize=8.5, fontweight="bold")
    clean(axes)


def importance(shares: Mapping[str, float]) -> str | None:
    """A bar a parameter, the most important first."""
    rows = sorted(shares.items(), key=lambda each: -each[1])
    if not rows:
        return None

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        _bars(axes, [(name, 100 * share, f"{100 * share:.0f} %", METHOD) for name, share in rows])
        axes.set_xlabel("% of what the parameters explain")

    return _draw(0.24 * len(rows) + 0.6, paint, "importance")


def pareto(found: Search) -> str | None:
    """Value against seconds of training, of complete trials, and those on the front."""
    able = [(t, t.seconds, t.value) for t in found.judged() if finite(t.seconds) and finite(t.value)]
    if not able:
        return None
    took = {t.number: seconds for t, seconds, _ in able}
    best = front(found.trials)

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        top = _limit(axes, [value for *_, value in able])
        fastest, slowest = min(took.values()), max(took.values())
        axes.set_xscale("log" if slowest > 20 * fastest > 0 else "linear")
        _marks(axes, [t for t, *_ in able], lambda t: took[t.number], top, "completed", color=OTHER, s=16)
        x, y = zip(*((t.seconds, t.value) for t in best if finite(t.seconds) and finite(t.value)), strict=True)
        axes.step(x, y, where="post", color=METHOD, linewidth=1.2, zorder=1.5)
        axes.scatter(x, y, s=30, color=METHOD, label="front", zorder=3)
        _marks(axes, [t for t, *_ in able if t.default], lambda t: took[t.number], top, "defaults", marker="o", s=85,
               color="none", edgecolor=INK, linewidth=1.2)  # fmt: skip
        _named(axes, best)
        axes.set_ylabel(found.objective)
        axes.set_xlabel("seconds of training")
        _plain_numbers(axes)
        axes.margins(x=0.1)
        clean(axes, "both")
        _legend(axes)

    return _draw(3.2, paint, "pareto")


def _named(axes: "Axes", on_front: Sequence[Trial]) -> None:
    """Each trial's run below its mark on the left, where a front leaves room; those that are too close go unnamed."""
    low, high = axes.get_ylim()
    last = -math.inf
    for t in reversed(on_front):
        if t.value is not None and t.seconds is not None and t.value - last > 0.06 * (high - low):
            last = t.value
            axes.annotate(t.run, (t.seconds, t.value), (-3, -3), textcoords="offset points", ha="right", va="top",
                          fontsize=7.5)  # fmt: skip


def times(found: Search) -> str | None:
    """How long trials of each state were trained, and what went by beside training."""
    rows = [
        (f"{STATES[s]} ({found.counts()[s]})", v, METHOD if s == COMPLETE else SOFT) for s, v in found.times().items()
    ]
    rows += [("not ended", found.unfinished, SOFT)] if found.unfinished else []
    beside = found.beside()
    rows += [("beside training", beside, OTHER)] if beside is not None else []
    total = math.fsum(v for _, v, _ in rows)
    if not total > 0:
        return None

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        _bars(axes, [(name, v, f"{_amount(v)} s, {100 * v / total:.0f} %", colour) for name, v, colour in rows])
        axes.set_xlabel("seconds")

    return _draw(0.26 * len(rows) + 0.6, paint, "times")


def winners(rows: Sequence[tuple[str, float | None, float | None]], objective: str) -> str | None:
    """Of each method its best trial's value and that of its defaults."""
    known = [(name, best, default) for name, best, default in rows if finite(best)]
    if not known:
        return None

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        both = [(at, best, default) for at, (_, best, default) in enumerate(known) if finite(default)]
        for at, best, default in both:
            axes.plot([best, default], [at, at], color=OTHER, linewidth=2.5, zorder=1)
        if both:
            axes.plot([d for *_, d in both], [at for at, *_ in both], "o", color=INK, markerfacecolor="white",
                      markersize=7, label="defaults")  # fmt: skip
        axes.plot([best for _, best, _ in known], range(len(known)), "o", color=BEST, markersize=6, label="best")
        axes.set_yticks(range(len(known)), [name for name, _, _ in known])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(known) - 0.5, -0.5)
        axes.set_xlabel(objective)
        axes.margins(x=0.1)
        clean(axes, "x")
        _legend(axes)

    return _draw(0.32 * len(known) + 0.9, paint, "winners")


def _draw(height: float, paint: Callable[["Figure"], None], name: str) -> str:
    """`draw` with two decimals of a point: there may be thousands of marks."""
    svg = re.sub(r"<!--.*?-->\s*", "", draw(height, paint, name), flags=re.DOTALL)
    return re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag.group()), svg)


def _amount(seconds: float) -> str:
    return f"{seconds:.1f}" if 0 < seconds < 10 else f"{seconds:,.0f}"


def _bars(axes: "Axes", rows: Sequence[tuple[str, float, str, str]]) -> None:
    """Rows of name, length, what stands behind the bar, colour."""
    longest = max(value for _, value, *_ in rows) or 1.0
    for at, (_, value, text, colour) in enumerate(rows):
        axes.barh(at, value, height=0.7, color=colour)
        axes.text(value + 0.012 * longest, at, text, va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [textwrap.shorten(name, 30, placeholder="…") for name, *_ in rows])
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlim(0, longest * 1.3)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines["bottom"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)
    _plain_numbers(axes)


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Trials with a value that have not failed, the best first; complete ones before pruned ones of the same value."""
    able = [t for t in trials if finite(t.value) and t.state != FAILED]
    return sorted(able, key=lambda t: (t.value, t.state != COMPLETE, t.number))


def _shades(worst_first: Sequence[Trial], best: Trial | None) -> list[Any]:
    """A colour each, darker for better ones: by rank, so that a few that went astray do not make the others alike."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("", STEPS)
    n = max(len(worst_first) - 1, 1)
    return [BEST if t is best else scale((k / n) ** 2) for k, t in enumerate(worst_first)]


def _fine(n: int) -> float:
    """What to multiply the width of lines with where there are many."""
    return min(1.0, math.sqrt(60 / n))


def _limit(axes: "Axes", values: Sequence[float]) -> float | None:
    """Set the ends of the upright axis; gives the upper one where values lie beyond it."""
    top = ceiling(values)
    low, high = min(values), top if top is not None else max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - 1.5 * room, high + room)
    return top


def _marks(
    axes: "Axes", trials: Sequence[Trial], at: Callable[[Trial], float], top: float | None, label: str, **look: Any
) -> None:
    """A mark each at its value, at `top` where it lies beyond."""
    if trials:
        y = [min(t.value if t.value is not None else math.inf, math.inf if top is None else top) for t in trials]
        # nothing lies outside, and clipping takes much room in a file
        look = {"linewidth": 0.8, "clip_on": False, **look}
        axes.scatter([at(t) for t in trials], y, label=label or None, zorder=2.5, **look)


def _plain_numbers(axes: "Axes") -> None:
    """Numbers along the lower axis as people write them, also on a log scale."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1),
                borderaxespad=0.1, handletextpad=0.4, columnspacing=1.2)  # fmt: skip
