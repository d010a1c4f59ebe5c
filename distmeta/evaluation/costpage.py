"""What training costs, method by method (paper 002, Figure 2): a picture, a page and a table for a README."""

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from distmeta.evaluation.charts import INK, METHOD, OTHER, draw
from distmeta.evaluation.report import figure
from distmeta.evaluation.reproduction_page import grid, table
from distmeta.evaluation.style import PAGE, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (
    ("s_per_1000", "CPU seconds for 1,000 training users", "{:.2f}"),
    ("peak_mb", "peak memory of an update, MB", "{:.0f}"),
)
_NOTE = (
    "CPU seconds of one thread, whole meta-updates (gradients and optimizer), batches made beforehand; median of rounds"
    " that take turns. Memory: how far the process's resident set rises above what it was before its first whole batch,"
    " which is the graph and the gradients of a batch; libraries, parameters and the optimizer's moments were there"
    " before; largest of the rounds. Each row is measured in a process of its own."
)

Found = Mapping[str, Any]
"""What `reproduce_costs.run` has measured."""


def markdown(found: Found) -> str:
    """The figure's numbers to paste into a README."""
    heads, rows = _rows(found)
    return "\n\n".join([f"### {found['title']}", _said(found), grid(heads, rows), _NOTE]) + "\n"


def page(found: Found) -> str:
    """The whole page."""
    return PAGE.format(title=escape(found["title"]), style=STYLE, body=body(found))


def body(found: Found) -> str:
    """What stands on the page: picture, numbers, how they were measured."""
    heads, rows = _rows(found)
    cells = [(name, [(c, False) for c in rest]) for name, *rest in rows]
    return (
        f'<header><p class="kicker">protocol {escape(found["protocol"])}</p><h1>{escape(found["title"])}</h1>'
        f'<p class="lead">{escape(_said(found))}</p></header>'
        f'<section><div class="figures">{figure(_picture(found), "Time and memory of training", "Shorter is better.")}'
        f"</div>{table(heads, cells)}</section>"
        f"<section><h2>How to read it</h2><ul><li>{escape(_NOTE)}</li></ul></section>"
    )


def sheet(found: Found) -> str:
    """The picture as a file of its own."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + _picture(found).replace(' aria-hidden="true"', "", 1)


def _picture(found: Found) -> str:
    rows = found["rows"]

    def paint(figure: "Figure") -> None:
        parts: Any = figure.subplots(len(_PANELS), 1)
        for axes, (key, label, shown) in zip(parts, _PANELS, strict=True):
            longest = max(r[key] for r in rows) or 1.0
            for at, r in enumerate(rows):
                mine = r["method"].startswith("cmml")
                axes.barh(at, r[key], height=0.72, color=METHOD if mine else OTHER)
                axes.text(r[key] + 0.012 * longest, at, shown.format(r[key]), va="center", fontsize=8.5)
            axes.set_yticks(range(len(rows)), [r["label"] for r in rows])
            for tick in axes.get_yticklabels():
                tick.set_color(INK)
            axes.set_xlim(0, longest * 1.16)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_xlabel(label)
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(length=0)

    return draw(2 * (0.25 * len(rows) + 0.6), paint, found["name"])


def _rows(found: Found) -> tuple[list[str], list[list[str]]]:
    """Heads and rows; each row's time and memory beside the first's."""
    first = found["rows"][0]
    heads = ["", "s per 1,000 users", "× the first", "users/s", "peak MB", "× the first"]
    return heads, [_cells(r, first) for r in found["rows"]]


def _cells(row: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    seconds, peak = row["s_per_1000"], row["peak_mb"]
    times = f"{seconds / first['s_per_1000']:.2f}", f"{peak / first['peak_mb']:.2f}" if first["peak_mb"] else "–"
    return [row["label"], f"{seconds:.3f}", times[0], f"{1000 / seconds:,.0f}", f"{peak:.1f}", times[1]]


def _said(found: Found) -> str:
    return (
        f"{found['dataset']}, protocol {found['protocol']} ({found['rows_a_user']:.0f} rows a user in the data, at most"
        f" 100 in an episode), batches of {found['batch_size']} users, one thread, {found['rounds']} rounds of"
        f" {found['batches']} batches. Paper: {found['paper']}"
    )
