"""Pictures of contexts on a plane and of routes between modules (paper 002, Figures 3 and 4)."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from distmeta.evaluation import groupcharts
from distmeta.evaluation.charts import GRID, INK, SOFT, WIDTH, draw, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 8
"""Groups that a picture tells apart; of more, so many evenly from among them, and the others are grey."""
DRAWN = 2
"""Groupings that are drawn: of users those with the highest silhouettes; the others are told."""
ABOVE, BENEATH, LEFT = 0.5, 0.4, 0.36
"""Inches around a map of routes."""


def contexts(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(svg, title, caption) of each grouping that is drawn.

    Args:
        found: `contexts.summary`'s entry "contexts".
    """
    points = np.asarray(found["points"]).reshape(-1, 2)
    ranked = list(found["groups"].items())
    if found["supports"] == 1:
        ranked.sort(key=lambda of: -of[1]["silhouette"])
    for i, (what, of) in enumerate(ranked[:DRAWN]):
        names = np.asarray(of["names"], str)
        shown = (
            np.arange(len(names)) if len(names) <= NAMED else np.linspace(0, len(names) - 1, NAMED).round().astype(int)
        )
        svg = groupcharts.plane(
            points, names[of["index"]], f"by {what}", f"contexts {i}", names[shown].tolist(), of["rank"] is not None
        )
        caption = _seen(found) if not i else "As the picture before."
        caption += f" Coloured by {escape(what)}{_chosen(len(names))}. {_apart(what, of, found)}"
        if not i and ranked[1:]:
            others = ", ".join(f"{escape(w)} {_number(o['silhouette'])}" for w, o in ranked[1:])
            caption += f" By other groupings: {others}."
        yield svg, f"Contexts by {escape(what)}", caption


def _seen(found: Mapping[str, Any]) -> str:
    """What the points are, and what their place is."""
    each = "a test task’s support"
    if found["supports"] > 1:
        each = f"one support of a test scenario, of {found['supports']:,} drawn from it as in training"
    share = 100 * sum(found["shares"])
    return (
        f"Each point is the context that the encoder makes of {each}: {len(found['points']):,} of {found['tasks']:,}"
        f" {'scenarios' if found['supports'] > 1 else 'tasks'}, in the plane of their first two principal components,"
        f" which hold {share:.0f} % of the variance in {found['width']} dimensions (CMML’s Figure 3)."
    )


def _chosen(groups: int) -> str:
    return "" if groups <= NAMED else f", {NAMED} of {groups:,} groups evenly in their order; the others are grey"


def _apart(what: str, of: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    told = (
        f"Silhouette of the groups {_number(of['silhouette'])} in all dimensions, {_number(of['silhouette_plane'])} in"
        " the plane (1: far apart; 0: mixed; below 0: a point is nearer to another group than to its own)."
    )
    if of["rank"] is not None:
        told += (
            f" The first component follows the {escape(what)}: rank correlation {of['rank']:.2f} (1: in its order, 0:"
            " not at all)."
        )
    return told


def routes(found: Mapping[str, Any]) -> tuple[str, str, str]:
    """(svg, title, caption): heat maps of two tasks' routes and of all tasks' mean, a row each.

    Args:
        found: `contexts.summary`'s entry "routes".
    """
    rows = [*found["shown"]]
    if len(rows) > 1:
        rows.append({"name": "mean of all tasks", "layers": found["layers"]})
    m, layers = found["modules"], len(found["layers"])
    cell = min(0.3, ((WIDTH - LEFT * layers) / (m * layers)))
    svg = draw(len(rows) * (cell * m + ABOVE + BENEATH), lambda figure: _heat(figure, rows, cell), "routes")
    entropy = ", ".join(f"{h:.2f} {where}" for h, where in zip(found["entropy"], _names(layers), strict=True))
    caption = (
        "How much each module takes from each module of the layer before it, in %; a row adds up to 100. Darker: more;"
        " the last map is what the output takes (CMML’s Figure 4). Mean over the query rows of a task, whose user and"
        " item have a part in the routes but with --hybrid none"
        + (f"; above the two test tasks whose routes differ most. {_differ(found['distance'])}" if rows[1:] else ".")
        + f" Entropy of a task’s routes: {entropy} (1: from all modules alike; 0: from one alone)."
    )
    return svg, "Routes through the modules", caption


def _differ(distance: Mapping[str, Any]) -> str:
    told = (
        f"Two tasks’ routes differ by {100 * distance['mean']:.1f} % on average, these by"
        f" {100 * distance['most']:.1f} % (total variation: the share that goes another way; 0: nothing adapts)"
    )
    if distance["same"] is not None:
        told += f"; two supports of one scenario by {100 * distance['same']:.1f} %"
    return f"{told}."


def _names(layers: int) -> list[str]:
    """What the routes lead to, by layer: the first layer of modules has none to itself."""
    return [*(f"to layer {i}" for i in range(2, layers + 1)), "to the output"]


def _heat(figure: "Figure", rows: Sequence[Mapping[str, Any]], cell: float) -> None:
    """A line of maps for each row, their cells `cell` inches wide and high."""
    figure.set_layout_engine("none")
    width, height = figure.get_size_inches()
    names, m = _names(len(rows[0]["layers"])), len(rows[0]["layers"][0][0])
    for r, row in enumerate(rows):
        top = height - r * (cell * m + ABOVE + BENEATH) - ABOVE
        figure.text(0, (top + 0.24) / height, row["name"], fontsize=9, color=INK, fontweight="bold")
        for k, (table, name) in enumerate(zip(row["layers"], names, strict=True)):
            left, high = LEFT + k * (cell * m + LEFT), cell * len(table)
            axes = figure.add_axes((left / width, (top - high) / height, cell * m / width, high / height))
            groupcharts.heat(axes, 100 * np.asarray(table), 100.0, numbers=cell > 0.2)
            axes.invert_yaxis()
            axes.set_xticks(range(m), [str(j + 1) for j in range(m)])
            axes.set_yticks(range(len(table)), [str(i + 1) for i in range(len(table))] if len(table) > 1 else [""])
            axes.tick_params(labelsize=7.5, labelcolor=SOFT, pad=1)
            axes.set_xlabel("from module", fontsize=8, labelpad=1)
            axes.set_ylabel("to module" if len(table) > 1 else "", fontsize=8, labelpad=1)
            axes.set_title(name, fontsize=8, color=SOFT, pad=2)
            for spine in axes.spines.values():
                spine.set(visible=True, color=GRID)


def _number(value: float) -> str:
    return signed(value, 2).lstrip("+")
