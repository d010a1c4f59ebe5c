"""The report's pictures: matplotlib figures as inline SVG whose text stays text.

Figures are as wide as a phone, so that their letters stay readable there; the page sets two side by side
where it can. Colours are Okabe & Ito's, which people with the usual kinds of colour blindness tell apart;
nothing is said by colour alone.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distmeta.evaluation.evaluate import ErrorHistogram

METHOD, OTHER, BETTER, WORSE = "#0072B2", "#B4BAC2", "#00704F", "#B34700"
INK, SOFT, GRID = "#1D232B", "#5B6572", "#E3E6EA"
WIDTH = 4.4
"""Inches."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],  # each text names them all
    "text.parse_math": False,
    "axes.labelsize": 9,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
}


def draw(height: float, paint: Callable[["Figure"], None], name: str, width: float = WIDTH) -> str:
    """An <svg> element, `width` by `height` inches, of what `paint` puts on the figure.

    `name` keeps the element ids of several pictures on one page apart.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    return re.sub(
        r'\bid="((?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|legend|\w*Collection)[^"]*)"', "", svg
    )


def curves(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Train loss and validation MAE by epoch, each on its own axes; None where there is no curve of either."""
    series = [
        (title, [(m["epoch"], m[key]) for m in metrics if finite(m.get(key))], colour)
        for key, title, colour in (
            ("train_loss", "training loss", SOFT),
            ("valid_mae", "validation MAE", METHOD),
            ("valid_recall@10", "validation Recall@10", METHOD),
        )
    ]
    series = [(title, points, colour) for title, points, colour in series if len(points) > 1]
    if not series:
        return None

    def paint(figure: "Figure") -> None:
        from matplotlib.ticker import MaxNLocator

        column = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, points, colour) in zip(column, series, strict=True):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=2.5)
            axes.set_title(title, loc="left", fontsize=9, color=colour, fontweight="bold")
            axes.grid(axis="y")
            axes.tick_params(length=0)
            axes.margins(y=0.15)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            if title != "training loss":
                best = (min if title == "validation MAE" else max)(points, key=lambda p: p[1])
                axes.plot(*best, marker="o", markersize=9, markerfacecolor="none", markeredgecolor=INK)
                axes.set_title(f"best {best[1]:.4f} at epoch {best[0]}", loc="right", fontsize=8.5)
        column[-1].set_xlabel("epoch")

    return draw(1.75 * len(series) + 0.3, paint, "curves")


def bars(values: Mapping[str, Mapping[str, float | None]], method: str) -> str:
    """MAE of the method and of each floor, a group a cohort: bars from 0 with their values beside them.

    Args:
        values: cohort -> name -> MAE, the method first.
    """
    rows: list[tuple[float, str, float | None]] = []
    heads: list[tuple[float, str]] = []
    y = 0.0
    for cohort, group in values.items():
        heads.append((y, cohort))
        rows += [(y + 0.85 + k, name, value) for k, (name, value) in enumerate(group.items())]
        y += len(group) + 1.25

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        longest = max((v for *_, v in rows if finite(v)), default=1.0) or 1.0
        for at, name, value in rows:
            mine = name == method
            if finite(value):
                axes.barh(at, value, height=0.72, color=METHOD if mine else OTHER)
            text = f"{value:.4f}" if finite(value) else "–"
            axes.text((value if finite(value) else 0) + 0.012 * longest, at, text, va="center", fontsize=8.5,
                      fontweight="bold" if mine else "normal")  # fmt: skip
        for at, cohort in heads:
            axes.text(0, at, cohort, va="center", fontsize=9, fontweight="bold")
        axes.set_yticks([at for at, *_ in rows], [name for _, name, _ in rows])
        for label, (_, name, _) in zip(axes.get_yticklabels(), rows, strict=True):
            label.set(color=INK, fontweight="bold" if name == method else "normal")
        axes.set_xlim(0, longest * 1.16)
        axes.set_ylim(y - 0.6, -0.6)
        axes.set_xlabel("mean absolute error (smaller is better)")
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)

    return draw(0.21 * y + 0.55, paint, "bars")


def forest(intervals: Mapping[str, Mapping[str, Sequence[float | None]]], method: str) -> str:
    """Paired differences in MAE, method − floor, with their intervals, a group a cohort.

    Args:
        intervals: cohort -> floor -> [difference, low, high].
    """
    rows: list[tuple[float, str, list[float]]] = []
    heads: list[tuple[float, str]] = []
    y = 0.0
    for cohort, group in intervals.items():
        known = {n: [float(v) for v in d if v is not None] for n, d in group.items()}
        known = {n: d for n, d in known.items() if d}
        if known:
            heads.append((y, cohort))
            rows += [(y + 0.9 + k, f"− {name}", d) for k, (name, d) in enumerate(known.items())]
            y += len(known) + 1.3

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        beside = axes.get_yaxis_transform()  # x: fraction of the axes, y: row
        axes.axvline(0, color=SOFT, linewidth=1)
        for at, _, d in rows:
            colour, face = _verdict_colours(d)
            if len(d) == 3:
                axes.plot(d[1:], [at, at], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(d[0], at, marker="o", markersize=6, color=colour, markerfacecolor=face)
            axes.text(1.03, at, signed(d[0]), va="center", fontsize=8.5, transform=beside)
        ends = [0.0, *(v for *_, d in rows for v in d)]
        reach = max(map(abs, ends)) or 0.01
        axes.set_xlim(min(min(ends) - 0.08 * reach, -0.35 * reach), max(max(ends) + 0.08 * reach, 0.35 * reach))
        for at, cohort in heads:
            axes.text(0, at, cohort, va="center", fontsize=9, fontweight="bold", transform=beside)
        for text, side, gap in (("← better", "right", -4), ("worse →", "left", 4)):
            axes.annotate(
                text, (0, 1), (gap, 2), axes.get_xaxis_transform(), "offset points", ha=side, fontsize=8.5, color=SOFT
            )
        axes.set_yticks([at for at, *_ in rows], [name for _, name, _ in rows])
        axes.set_ylim(y - 0.6, -0.6)
        axes.grid(axis="x")
        axes.tick_params(length=0, axis="y", labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"MAE of {method} minus MAE of the floor")
        axes.locator_params(axis="x", nbins=5)

    return draw(0.22 * y + 0.85, paint, "forest")


def errors(histogram: "ErrorHistogram") -> str | None:
    """How the signed errors are distributed; None where there are none."""
    total = int(histogram.counts.sum())
    if not total:
        return None
    centres = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    mean = float((centres * histogram.counts).sum() / total)

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.stairs(100 * histogram.counts / total, histogram.edges, fill=True, color=METHOD, alpha=0.75)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("prediction minus label (left of 0: too low)")
        axes.set_ylabel("% of ratings")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.set_title(f"mean error {signed(mean, 3)}", loc="left", fontsize=9, color=SOFT)

    return draw(2.6, paint, "errors")


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, a true minus, and no −0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _verdict_colours(d: Sequence[float]) -> tuple[str, str]:
    """Line and fill of a difference: filled where the interval excludes 0."""
    if len(d) < 3 or d[1] <= 0 <= d[2]:
        return SOFT, "white"
    colour = BETTER if d[0] < 0 else WORSE
    return colour, colour


def finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a number, and neither None nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)
