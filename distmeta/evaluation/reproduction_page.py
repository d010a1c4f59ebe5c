"""OUT/TABLE.md and OUT/TABLE.html: a reproduced table for a README, and a page with its pictures."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from distmeta.evaluation import reproduction
from distmeta.evaluation.charts import signed
from distmeta.evaluation.papertables import HEADS, PREPARE, RARE
from distmeta.evaluation.style import PAGE, STYLE

_PAIRED_NOTE = (
    "Paired differences, a row minus a floor or another row on the same {0}, all split seeds together; in brackets the"
    " 95 % percentile interval of 10,000 bootstrap resamples of the {0}. Bold: better, and the interval excludes 0."
)
NORMAL = 1.96
"""Half the width of a 95 % interval in standard errors, as paper 002 has it."""
MANY = 7
"""Cells of a row beyond which a page is too narrow to have what stands after ± beside its number."""

Table = Mapping[str, Any]
"""What `reproduction.assemble` gives, with "seeds", "datasets" and "settings" added (commands/reproduce.py)."""


def markdown(found: Table) -> str:
    """The table to paste into a README: paper and ours side by side, paired differences, notes."""
    parts = [f"### {found['title']}", _said(found)]
    for section in found["sections"]:
        parts += [f"**{section['title']}**"] if section["title"] else []
        parts += [said for said in (_counted(section), _missing(found, section)) if said]
        for heads, body in (_numbers(found, section), _paired(found, section)):
            if body:
                parts.append(grid(["", *map(flat, heads)], [[name, *map(bold, cells)] for name, cells in body]))
    parts += [_noted(found), "\n".join(f"- {note}" for note in found["notes"])]
    return "\n\n".join(parts) + "\n"


def page(found: Table, figures: Sequence[str]) -> str:
    """The whole page.

    Args:
        figures: <figure> elements, put after the tables.
    """
    return PAGE.format(title=escape(found["title"]), style=STYLE, body=body(found, figures))


def body(found: Table, figures: Sequence[str]) -> str:
    """What stands on the page: head, a <section> for each of the table's, `figures`, notes."""
    body = [
        f'<header><p class="kicker">protocol {escape(found["protocol"])}</p><h1>{escape(found["title"])}</h1>'
        f'<p class="lead">{escape(_said(found))}</p></header>'
    ]
    for section in found["sections"]:
        title = escape(section["title"] or ("Paper and ours" if _printed(found) else "Ours"))
        body.append(f"<section><h2>{title}</h2>")
        told = (_counted(section), _missing(found, section))
        body += [f'<p class="note">{_words(said)}</p>' for said in told if said]
        body.append(_grouped(*_numbers(found, section)))
        heads, rows = _paired(found, section)
        if rows:
            body.append(f'<h3>Paired differences</h3>{_grouped(heads, rows)}<p class="note">{_noted(found)}</p>')
        body.append("</section>")
    if figures:
        body.append('<section><h2>Users</h2><div class="figures">' + "".join(figures) + "</div></section>")
    notes = "".join(f"<li>{_words(note)}</li>" for note in found["notes"])
    body.append(f"<section><h2>How to read it</h2><ul>{notes}</ul></section>")
    return "\n".join(body)


def _noted(found: Table) -> str:
    """What the paired differences are."""
    scenarios = any("n_lists" in seed for s in found["sections"] for seeds in s["counts"].values() for seed in seeds)
    return _PAIRED_NOTE.format("scenarios" if scenarios else "users")


def _said(found: Table) -> str:
    """What the numbers are of, in words."""
    sets = "; ".join(
        f"{d['name']} ({d['interactions']:,} interactions)" if d else f"{titled(name)} left out"
        for name, d in found["datasets"].items()
        if d or name not in RARE
    )
    n = found["seeds"]
    spread = f"± 1.96 · sd / √{n} over" if found["confidence"] else "± sd over"
    of = f"{n} seed{'s' * (n > 1)} of split and training" if found["confidence"] else f"{n} split seed{'s' * (n > 1)}"
    given = f" Settings besides each method's own defaults: {found['settings']}." if found["settings"] else ""
    percent = " Shares are in %." if found["percent"] else ""
    best = "the best of the paper's rows, and of ours" if _printed(found) else "the best row"
    return (
        f"Ours: {f'mean {spread}' if n > 1 else ''} {of}, protocol {found['protocol']}, on {sets}.{given}{percent}"
        f" Bold: {best}."
    ).replace("  ", " ")


def _printed(found: Table) -> bool:
    """Whether the paper has any of it."""
    return any(any(row["paper"]) for section in found["sections"] for row in section["rows"])


def _counted(section: Mapping[str, Any]) -> str:
    """Users, rows and clips behind the numbers of a section, by data set and split seed; "" where nobody is in it."""
    parts = []
    for dataset, seeds in section["counts"].items():
        units = "scenarios" if any("n_lists" in s for s in seeds) else "users"
        words = {"n_tasks": units, "n_rows": "rows", "n_clips": "clips", "n_lists": "ranked lists"}
        by_kind = {key: [s[key] for s in seeds if key in s] for key in words}
        told = [f"{' / '.join(f'{n:,}' for n in ns)} {words[key]}" for key, ns in by_kind.items() if any(ns)]
        if told:
            parts.append(f"{titled(dataset)}: {'; '.join(told)}")
    return f"By split seed, of ours. {' · '.join(parts)}." if parts else ""


def _missing(found: Table, section: Mapping[str, Any]) -> str:
    """The data sets of a section that not everybody can have and this call had not, and how to have them; or ""."""
    wanted = dict.fromkeys(c["dataset"] for c in section["columns"] if c["ours"] and c["dataset"] in RARE)
    return " ".join(
        f"{titled(name)} is not at hand: its columns have the paper's numbers alone. `{PREPARE[name]}` makes it"
        f" from the official files, and `--data {name}=DATASET` adds ours."
        for name in wanted
        if not found["datasets"].get(name)
    )


Cell = tuple[str, bool]
"""Text, and whether it stands out."""


@dataclass(frozen=True)
class Head:
    """Of a column of cells."""

    text: str
    group: str = ""
    """What it has in common with those beside it, where that is not said elsewhere."""
    first: bool = True
    """Whether it is the first of its group."""


def flat(head: Head) -> str:
    """On one line; the group is said once."""
    return f"{head.group} {head.text}".strip() if head.first else head.text


def _numbers(found: Table, section: Mapping[str, Any]) -> tuple[list[Head], list[tuple[str, list[Cell]]]]:
    """Heads and rows of a section: of each column the paper's cells and ours, where it has any."""
    rows = section["rows"]
    shown = _shown(section)
    top = {(side, i): reproduction.best(rows, i, c["metric"], side) for i, c, _ in shown for side in ("paper", "ours")}
    body = []
    for r, row in enumerate(rows):
        cells: list[Cell] = []
        for i, c, sides in shown:
            for side in sides:
                text = _paper(row["paper"][i], found["digits"]) if side == "paper" else _ours(found, row, i, c)
                cells.append((text, r in top[side, i]))
        body.append((row["label"], cells))
    return _heads(shown), body


Shown = list[tuple[int, Mapping[str, Any], list[str]]]
"""Columns: position, description, and the sides of it that have numbers: `paper`, `ours`."""


def _shown(section: Mapping[str, Any]) -> Shown:
    found: Shown = []
    for i, c in enumerate(section["columns"]):
        sides = [side for side in ("paper", "ours") if any(row[side][i] for row in section["rows"])]
        found += [(i, c, sides)] if sides else []
    return found


def _heads(shown: Shown) -> list[Head]:
    groups = [
        (_group(key), list(of)) for key, of in groupby(shown, lambda each: (each[1]["dataset"], each[1]["table"]))
    ]
    heads: list[Head] = []
    papers = any("paper" in sides for _, _, sides in shown)
    alone = {"paper": " (paper)", "ours": " (ours, other data)" if papers else " (ours)"}
    for name, of in groups:
        group_sides = {side for _, _, sides in of for side in sides}
        one_sided = "" if len(group_sides) > 1 or (len(groups) == 1 and not papers) else alone[min(group_sides)]
        group = f"{name}{one_sided}" if one_sided or len(groups) > 1 else ""
        texts = [text for _, c, mine in of for text in _texts(c["head"], mine, len(group_sides) > 1)]
        heads += [Head(text, group, first=i == 0) for i, text in enumerate(texts)]
    return heads


def _texts(head: str, sides: Sequence[str], told: bool) -> list[str]:
    """What stands above the sides of a column; `told`: which side it is has to be said."""
    if len(sides) == 2:
        return [f"{head}: paper", "ours"]
    return [f"{head}: {sides[0]}" if told else head]


def _group(key: tuple[str, str]) -> str:
    return f"{titled(key[0])}, {key[1]}" if key[1] else titled(key[0])


def titled(dataset: str) -> str:
    return HEADS.get(dataset, dataset)


def _paper(cell: Sequence[float | None] | None, digits: int) -> str:
    return "–" if cell is None else spread(cell[0], cell[1], digits)


def _ours(found: Table, row: Mapping[str, Any], i: int, column: Mapping[str, Any]) -> str:
    cell = row["ours"][i]
    if cell is None:
        return "–"
    if column["metric"] == reproduction.P:
        return ", ".join("–" if p is None else f"{p:.3f}" for p in cell["seeds"])
    scale = column_scale(found, column["metric"])
    return spread(cell["mean"] * scale, plus_minus(found, cell, scale), found["digits"])


def plus_minus(found: Table, cell: Mapping[str, Any], scale: int) -> float | None:
    """What stands after ± of a cell of ours; None of one seed."""
    sd = cell["sd"]
    if found["confidence"] and sd is not None:
        sd *= NORMAL / math.sqrt(sum(v is not None for v in cell["seeds"]))
    return None if sd is None else scale * sd


def column_scale(found: Table, metric: str) -> int:
    """What a number is multiplied with where the paper prints shares in percent."""
    return 100 if found["percent"] and metric.startswith("recall") else 1


def spread(mean: float | None, sd: float | None, digits: int) -> str:
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def _paired(found: Table, section: Mapping[str, Any]) -> tuple[list[Head], list[tuple[str, list[Cell]]]]:
    """Heads and rows of a section's paired differences; columns without any are left out."""
    columns = section["columns"]
    kept = [i for i in range(len(columns)) if any(row["differences"][i] for row in section["paired"])]
    several = len({columns[i]["dataset"] for i in kept}) > 1
    heads: list[Head] = []
    for c in (columns[i] for i in kept):
        what = str({"mae_ratings": "MAE by user", "rmse": "MSE by user"}.get(c["metric"], c["head"]))
        group = titled(c["dataset"]) if several else ""
        heads.append(Head(what, group, first=not heads or heads[-1].group != group))
    body = []
    for row in section["paired"]:
        cells = [
            interval(row["differences"][i], columns[i]["metric"], column_scale(found, columns[i]["metric"]))
            for i in kept
        ]
        body.append((f"{row['label']} − {row['against']}", cells))
    return heads, body


def interval(found: Sequence[float | None] | None, metric: str, scale: int = 1) -> Cell:
    """A difference with its interval, multiplied with `scale`; it stands out where it is better for certain."""
    difference, low, high = found or (None, None, None)
    digits = 4 if scale == 1 else 2
    if difference is None:
        return "–", False
    if low is None or high is None:
        return signed(scale * difference, digits), False
    better = low > 0 if metric.startswith(reproduction.HIGHER) else high < 0
    ends = ", ".join(signed(scale * end, digits) for end in (low, high))
    return f"{signed(scale * difference, digits)} [{ends}]", better


def bold(cell: Cell) -> str:
    return f"**{cell[0]}**" if cell[1] else cell[0]


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    safe = [[c.replace("|", "\\|") for c in row] for row in (heads, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in safe]
    return "\n".join([lines[0], "|" + "---|" + "---:|" * (len(heads) - 1), *lines[1:]])


def table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """HTML; the first of `heads` stands over the rows' names."""
    return _html(f"<tr>{''.join(_th(h) for h in heads)}</tr>", [False] * (len(heads) - 1), rows)


def _grouped(heads: Sequence[Head], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """HTML with the groups of the columns above their heads, a gap between them."""
    groups = [(name, len(list(of))) for name, of in groupby(h.group for h in heads)]
    starts = [i == 0 for _, n in groups for i in range(n)] if len(groups) > 1 else [False] * len(heads)
    top = "".join(
        f'<th scope="colgroup" colspan="{n}"{_START * (len(groups) > 1)}>{escape(name)}</th>' for name, n in groups
    )
    above = f'<tr class="groups"><td></td>{top}</tr>' if any(name for name, _ in groups) else ""
    below = "".join(_th(h.text, _START * start) for h, start in zip(heads, starts, strict=True))
    return _html(f"{above}<tr>{_th('')}{below}</tr>", starts, rows)


_START = ' class="start"'


def _th(text: str, more: str = "") -> str:
    return f'<th scope="col"{more}>{escape(text).replace(": ", "<br>")}</th>'


def _words(text: str) -> str:
    """HTML of a sentence with `code` in it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _html(head: str, starts: Sequence[bool], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    tight = len(starts) > MANY
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f"<td{_START * start}>{f'<b>{_narrow(text, tight)}</b>' if stands_out else _narrow(text, tight)}</td>"
            for start, (text, stands_out) in zip(starts, cells, strict=True)
        )
        + "</tr>"
        for name, cells in rows
    )
    style = ' class="tight"' if tight else ""
    return f'<div class="wide"><table{style}><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _narrow(text: str, tight: bool) -> str:
    """A cell's HTML, an interval on a line of its own, where the table is `tight` also what stands after ±."""
    value, bracket, rest = escape(text).partition(" [")
    if tight and not bracket:
        value, plus_minus, spread = value.partition(" ± ")
        return f"{value}<small>± {spread}</small>" if plus_minus else value
    return f"{value}<small>[{rest}</small>" if bracket else value
