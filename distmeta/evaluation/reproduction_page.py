"""OUT/TABLE.md and OUT/TABLE.html: a reproduced table for a README, and a page with its pictures."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from distmeta.evaluation import reproduction
from distmeta.evaluation.charts import signed
from distmeta.evaluation.papertables import HEADS
from distmeta.evaluation.style import PAGE, STYLE

LATER = "later issue"
"""Ours, where the paper has a method that we have not yet."""
_PAIRED_NOTE = (
    "Paired differences, a row minus a floor or another row on the same users, all split seeds together; in brackets"
    " the 95 % percentile interval of 10,000 bootstrap resamples of the users. Bold: better, and the interval excludes"
    " 0."
)

Table = Mapping[str, Any]
"""What `reproduction.assemble` gives, with "seeds", "datasets" and "settings" added (commands/reproduce.py)."""


def markdown(found: Table) -> str:
    """The table to paste into a README: paper and ours side by side, paired differences, notes."""
    parts = [f"### {found['title']}", _said(found)]
    for section in found["sections"]:
        heads, body = _numbers(found, section)
        parts += [f"**{section['title']}**"] if section["title"] else []
        parts += [said] if (said := _counted(section)) else []
        parts.append(grid(heads, [[name, *map(bold, cells)] for name, cells in body]))
        heads, body = _paired(found, section)
        if body:
            parts.append(grid(heads, [[name, *map(bold, cells)] for name, cells in body]))
    parts += [_PAIRED_NOTE, "\n".join(f"- {note}" for note in found["notes"])]
    return "\n\n".join(parts) + "\n"


def page(found: Table, figures: Sequence[str]) -> str:
    """The whole page.

    Args:
        figures: <figure> elements, put after the tables.
    """
    body = [
        f'<header><p class="kicker">protocol {escape(found["protocol"])}</p><h1>{escape(found["title"])}</h1>'
        f'<p class="lead">{escape(_said(found))}</p></header>'
    ]
    for section in found["sections"]:
        title = escape(section["title"] or "Paper and ours")
        body.append(f"<section><h2>{title}</h2>")
        if said := _counted(section):
            body.append(f'<p class="note">{escape(said)}</p>')
        body.append(table(*_numbers(found, section)))
        heads, rows = _paired(found, section)
        if rows:
            body.append(f'<h3>Paired differences</h3>{table(heads, rows)}<p class="note">{_PAIRED_NOTE}</p>')
        body.append("</section>")
    if figures:
        body.append('<section><h2>Users</h2><div class="figures">' + "".join(figures) + "</div></section>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in found["notes"])
    body.append(f"<section><h2>How to read it</h2><ul>{notes}</ul></section>")
    return PAGE.format(title=escape(found["title"]), style=STYLE, body="\n".join(body))


def _said(found: Table) -> str:
    """What the numbers are of, in words."""
    sets = "; ".join(
        f"{d['name']} ({d['interactions']:,} interactions)" if d else f"{titled(name)} left out"
        for name, d in found["datasets"].items()
    )
    n = found["seeds"]
    given = f" Settings besides each method's own defaults: {found['settings']}." if found["settings"] else ""
    return (
        f"Ours: {'mean ± sd over' if n > 1 else ''} {n} split seed{'s' * (n > 1)}, protocol {found['protocol']}, on"
        f" {sets}.{given} Bold: the best of the paper's rows, and of ours."
    ).replace("  ", " ")


def _counted(section: Mapping[str, Any]) -> str:
    """Users, rows and clips behind the numbers of a section, by data set and split seed; "" where nobody is in it."""
    words = {"n_tasks": "users", "n_rows": "rows", "n_clips": "clips"}
    parts = []
    for dataset, seeds in section["counts"].items():
        by_kind = {key: [s[key] for s in seeds if key in s] for key in words}
        told = [f"{' / '.join(f'{n:,}' for n in ns)} {words[key]}" for key, ns in by_kind.items() if any(ns)]
        if told:
            parts.append(f"{titled(dataset)}: {'; '.join(told)}")
    return f"By split seed, of ours. {' · '.join(parts)}." if parts else ""


Cell = tuple[str, bool]
"""Text, and whether it stands out."""


def _numbers(found: Table, section: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Heads and rows of a section: two cells a column, the paper's and ours."""
    rows, columns = section["rows"], found["columns"]
    several = len({c["dataset"] for c in columns}) > 1
    heads = [""]
    for c in columns:
        head = f"{titled(c['dataset'])} {c['head']}" if several else c["head"]
        heads += [f"{head}: paper", "ours"]
    top = {
        (side, i): reproduction.best(rows, i, c["metric"], side)
        for side in ("paper", "ours")
        for i, c in enumerate(columns)
    }
    body = []
    for r, row in enumerate(rows):
        cells: list[Cell] = []
        for i, c in enumerate(columns):
            digits = found["digits"]
            cells.append((_paper(row["paper"][i], digits), r in top["paper", i]))
            cells.append((_ours(row, i, c, digits), r in top["ours", i]))
        body.append((row["label"], cells))
    return heads, body


def titled(dataset: str) -> str:
    return HEADS.get(dataset, dataset)


def _paper(cell: Sequence[float | None] | None, digits: int) -> str:
    return "–" if cell is None else spread(cell[0], cell[1], digits)


def _ours(row: Mapping[str, Any], i: int, column: Mapping[str, Any], digits: int) -> str:
    cell = row["ours"][i]
    if row["method"] is None:
        return LATER
    if cell is None:
        return "–"
    if column["metric"] == reproduction.P:
        return ", ".join("–" if p is None else f"{p:.3f}" for p in cell["seeds"])
    return spread(cell["mean"], cell["sd"], digits)


def spread(mean: float | None, sd: float | None, digits: int) -> str:
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def _paired(found: Table, section: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Heads and rows of a section's paired differences; columns without any are left out."""
    columns = found["columns"]
    kept = [i for i in range(len(columns)) if any(row["differences"][i] for row in section["paired"])]
    several = len({c["dataset"] for c in columns}) > 1
    heads = [""]
    for i in kept:
        c = columns[i]
        what = str({"mae_ratings": "MAE by user", "rmse": "MSE by user"}.get(c["metric"], c["head"]))
        heads.append(f"{titled(c['dataset'])} {what}" if several else what)
    body = []
    for row in section["paired"]:
        cells = [interval(row["differences"][i], columns[i]["metric"]) for i in kept]
        body.append((f"{row['label']} − {row['against']}", cells))
    return heads, body


def interval(found: Sequence[float | None] | None, metric: str) -> Cell:
    difference, low, high = found or (None, None, None)
    if difference is None:
        return "–", False
    if low is None or high is None:
        return signed(difference), False
    better = low > 0 if metric.startswith(reproduction.HIGHER) else high < 0
    return f"{signed(difference)} [{signed(low)}, {signed(high)}]", better


def bold(cell: Cell) -> str:
    return f"**{cell[0]}**" if cell[1] else cell[0]


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    safe = [[c.replace("|", "\\|") for c in row] for row in (heads, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in safe]
    return "\n".join([lines[0], "|" + "---|" + "---:|" * (len(heads) - 1), *lines[1:]])


def table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td><b>{_narrow(t)}</b></td>" if bold else f"<td>{_narrow(t)}</td>" for t, bold in cells)
        + "</tr>"
        for name, cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _narrow(text: str) -> str:
    """A cell's HTML, an interval on a line of its own."""
    value, bracket, rest = escape(text).partition(" [")
    return f"{value}<small>[{rest}</small>" if bracket else value
