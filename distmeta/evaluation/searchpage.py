"""OUT/METHOD/report.html: what a hyperparameter search of one method found; OUT/index.html: its methods side by side.

One file each, without network or scripts.
"""

from collections.abc import Iterable, Sequence
from html import escape

from distmeta.evaluation import searchcharts
from distmeta.evaluation.charts import finite, signed
from distmeta.evaluation.report import figure, tiled
from distmeta.evaluation.reproduction_page import Cell, table
from distmeta.evaluation.searchrows import COMPLETE, FAILED, PRUNED, STATES, Search, Trial, ceiling, shown
from distmeta.evaluation.style import PAGE, STYLE
from distmeta.storage import Location

TOP = 10
"""Trials in the table."""
REASONS = 20
"""Reasons of failures that are told one by one."""


def write(search: Search, where: Location) -> None:
    """WHERE/report.html.

    Raises:
        UserError, RunError: it cannot be written.
    """
    (where / "report.html").write_bytes(page(search).encode())


def write_index(searches: Sequence[Search], out: Location) -> None:
    """OUT/index.html, which leads to each method's OUT/METHOD/report.html.

    Raises:
        UserError, RunError: it cannot be written.
    """
    (out / "index.html").write_bytes(index(searches).encode())


def page(search: Search) -> str:
    """The whole page of one method."""
    title = f"Search: {search.method} on {search.dataset}"
    figures, missing = [], []
    for drawn, name, caption in _pictures(search):
        if drawn:
            figures.append(figure(drawn, name, caption))
        else:
            missing.append(f"<li>{name}: {caption}</li>")
    notes = f'<p class="note">Not drawn:</p><ul class="note">{"".join(missing)}</ul>' if missing else ""
    body = [
        _header(search.dataset, search.protocol, title, _said(search)),
        _tiles(search),
        f'<div class="figures">{"".join(figures)}</div>{notes}',
        _best(search),
        _failures(search),
        _reading(search),
    ]
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))


def index(searches: Sequence[Search]) -> str:
    """The page that compares methods."""
    first = searches[0]
    title = f"Search of {len(searches)} methods on {first.dataset}"
    ahead = min((s for s in searches if s.best), key=lambda s: (_value(s.best), s.method), default=None)
    said = "No trial was completed."
    if ahead and ahead.best:
        said = (
            f"Of {len(searches)} methods <b>{escape(ahead.method)}</b> has the lowest {escape(first.objective)},"
            f" <b>{_value(ahead.best):.4f}</b>. That is by validation, on which each was chosen; the reports of the"
            " winners’ runs have the test."
        )
    rows = [(s.method, _value(s.best), _value(s.default) if _done(s.default) else None) for s in searches]
    drawn = searchcharts.winners(rows, first.objective)
    caption = "Filled: the best trial of each method; open: its defaults. Smaller is better."
    heads = ["", f"best {first.objective}", "its defaults", "difference", "trials", *STATES.values(), "s of training"]
    numbers = table(heads, [_compared(s, s is ahead) for s in searches])
    for name in (escape(s.method) for s in searches):  # a name leads to its report
        numbers = numbers.replace(f">{name}</th>", f'><a href="{name}/report.html">{name}</a></th>')
    body = [
        _header(first.dataset, first.protocol, title, said),
        f'<section><div class="figures">{figure(drawn, "Best and defaults", caption)}</div></section>' if drawn else "",
        f"<section><h2>Methods</h2>{numbers}</section>",
    ]
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))


def _header(dataset: str, protocol: str, title: str, said: str) -> str:
    return (
        f'<header><p class="kicker">{escape(dataset)} · protocol {escape(protocol)}</p>'
        f'<h1>{escape(title)}</h1><p class="lead">{said}</p></header>'
    )


def _compared(search: Search, stands_out: bool) -> tuple[str, list[Cell]]:
    """A method's row in the index."""
    best, default = search.best, search.default
    gain = "–"
    if best and default and _done(default):
        gain = signed(_value(best) - _value(default))
    cells = [
        _number(best),
        _number(default) if _done(default) else _without(default),
        gain,
        f"{len(search.trials):,}",
        *(f"{n:,}" for n in search.counts().values()),
        f"{search.trained():,.0f}",
    ]
    return search.method, [(text, stands_out and k == 0) for k, text in enumerate(cells)]


# --- what it says
# --------------------------------------------------------------------------------------------------------


def _said(search: Search) -> str:
    """Best value, against the defaults, trials by state, seconds."""
    counts, spent = search.counts(), search.trained()
    told = [f"{counts[s]:,} {'was' if counts[s] == 1 else 'were'} {name}" for s, name in STATES.items() if s != FAILED]
    told.append(f"{counts[FAILED]:,} failed")
    n = len(search.trials)
    ended = f"Of {n:,} trial{'s' * (n != 1)} {', '.join(told[:-1])} and {told[-1]}, in {spent:,.0f} s of training."
    best = search.best
    if best is None:
        return f"No trial was completed, so there is no best one. {ended if n else 'None has ended.'}"
    unsure = f" (standard deviation over seeds {best.deviation:.4f})" if finite(best.deviation) else ""
    first = f"The best trial, {escape(best.run)}, has a {escape(search.objective)} of <b>{_value(best):.4f}</b>{unsure}"
    return f"{first}{_against(search, best)}. {ended}"


def _against(search: Search, best: Trial) -> str:
    default = search.default
    if default is None:
        return "; the method’s defaults were not tried"
    if default is best:
        return ": those are the method’s defaults, and nothing that was tried is better"
    if not _done(default):
        return f"; the method’s defaults have no result to compare it with: {escape(_without(default))}"
    return f", {_value(default) - _value(best):.4f} lower than the method’s defaults ({_value(default):.4f})"


def _tiles(search: Search) -> str:
    best, default = search.best, search.default
    wall = sum(x.seconds for x in search.launches)
    tiles = [
        ("best", _number(best), escape(search.objective)),
        ("defaults", _number(default) if _done(default) else "–", escape(_without(default))),
        ("trials", f"{len(search.trials):,}", f"{search.counts()[COMPLETE]:,} completed"),
        ("training", f"{search.trained():,.0f} s", f"in {wall:,.0f} s" if wall else ""),
    ]
    return tiled(tiles)


# --- what it shows
# -------------------------------------------------------------------------------------------------------


def _pictures(search: Search) -> Iterable[tuple[str | None, str, str]]:
    """Picture, its title, and its caption; without a picture why there is none."""
    nothing = "no trial has a value."
    edge = " What lies far above stands at the upper edge." * _beyond([t.value for t in search.trials])
    cut = " Lines that begin far above are cut off." * _beyond([v for t in search.trials for v in t.curve.values()])
    first = ", of the first seed" * any(finite(t.deviation) for t in search.trials)
    yield _drawn(
        searchcharts.history(search), "History",
        f"Each trial by its number: completed ones, pruned ones at what they told last, failed ones below. Ring: the"
        f" method’s defaults; square: what papers say.{edge}", nothing,
    )  # fmt: skip
    yield _drawn(
        searchcharts.curves(search), "Learning curves",
        f"Of the best epoch so far{first}. A dot: pruned there.{cut}",
        "of two objectives Optuna keeps none." if search.several else "no trial told more than one value.",
    )  # fmt: skip
    yield _drawn(
        searchcharts.parallel(search), "Parameters together",
        "A line a trial, from its parameters down to its value; darker: better, the best in orange. A parameter that"
        " has nothing to choose is passed on the right. Choices: better trials on the left.",
        "it takes two trials with a value.",
    )  # fmt: skip
    yield _drawn(
        searchcharts.slices(search), "Parameters one by one",
        f"Each trial’s value against one parameter. Open: pruned. Ring: the best.{edge}", nothing,
    )  # fmt: skip
    yield _drawn(
        searchcharts.importance(search.importance), "Importance of parameters",
        "How much the completed trials that are among the best differ in a parameter from all completed trials"
        " (PED-ANOVA). Few trials make it rough.", escape(search.unknown),
    )  # fmt: skip
    yield _drawn(
        searchcharts.pareto(search), "Quality against training time",
        "Completed trials; on the front are those that no other beats in both. "
        + ("The search sought both." if search.several else "The search sought quality alone."),
        "no completed trial told its seconds.",
    )  # fmt: skip
    yield _drawn(
        searchcharts.times(search), "Time by state",
        "Seconds in which trials were trained"
        + ("." if search.beside() is None else ", and beside that: what there was room for, less training: starting,"
           " proposing, waiting for the last trial, epochs that a kill undid."),
        "no trial told its seconds.",
    )  # fmt: skip


def _drawn(svg: str | None, name: str, caption: str, why_not: str) -> tuple[str | None, str, str]:
    return svg, name, caption if svg else why_not


def _beyond(values: Iterable[float | None]) -> bool:
    """Whether some lie so far above the others that a picture leaves them out."""
    return ceiling([v for v in values if finite(v)]) is not None


def _best(search: Search) -> str:
    """The best trials, a column each, the defaults behind them."""
    top = search.judged()[:TOP]
    if not top:
        return ""
    default = search.default
    told = [*top, default] if default and default not in top else top
    best = [k == 0 for k in range(len(told))]
    facts = {
        search.objective: [_number(t) for t in told],
        "epochs": [f"{t.epochs:,}" for t in told],
        "s of training": [f"{t.seconds:,.0f}" if finite(t.seconds) else "–" for t in told],
        "from": [_origin(t) for t in told],
    }
    params = {a.name: [shown(t.params[a.name]) if a.name in t.params else "–" for t in told] for a in search.axes}
    rows = [(name, list(zip(cells, best, strict=True))) for name, cells in {**facts, **params}.items()]
    papers = "".join(f"<li>{escape(t.run)}: {escape(t.source)}</li>" for t in search.trials if t.source)
    first = (
        f'<p class="note">Trials that were asked for before the sampler had a say:</p><ul class="note">{papers}</ul>'
    )
    return (
        f"<section><h2>The best {len(top):,} trials</h2>{table(['trial', *(t.run for t in told)], rows)}"
        f"{first if papers else ''}</section>"
    )


def _origin(trial: Trial) -> str:
    """Who asked for it, and how it ended where it was not completed."""
    asked = "defaults" if trial.default else "paper" if trial.source else "sampler"
    return asked if trial.state == COMPLETE else f"{asked}, {STATES[trial.state]}"


def _failures(search: Search) -> str:
    """What failed, by reason."""
    reasons: dict[str, list[str]] = {}
    for t in search.trials:
        if t.state == FAILED:
            reasons.setdefault(t.failure or "no reason was recorded", []).append(t.run)
    if not reasons:
        return ""
    told = sorted(reasons.items(), key=lambda each: -len(each[1]))
    listed = "".join(f"<dt>{_listed(runs)}</dt><dd>{escape(why)}</dd>" for why, runs in told[:REASONS])
    more = f'<p class="note">{len(told) - REASONS} more reasons are in trials.parquet.</p>' if told[REASONS:] else ""
    return f'<section class="provenance"><h2>What failed</h2><dl>{listed}</dl>{more}</section>'


def _listed(runs: Sequence[str]) -> str:
    shown = ", ".join(map(escape, runs[:3]))
    return f"{shown} and {len(runs) - 3:,} more" if runs[3:] else shown


def _reading(search: Search) -> str:
    notes = [
        "Trials are judged on validation tasks. The best of many is chosen by the number that it is shown with, which"
        " flatters it; the winner alone is evaluated on the test tasks, in its run’s own report.",
        "trials.parquet has all of this as a table, best.yaml the best trial’s config for train --config, and the"
        " journal one level up is an Optuna study.",
    ]
    if search.counts()[PRUNED]:
        notes.insert(1, "A pruned trial was stopped early because others were ahead of it at the same epoch.")
    return f"<section><h2>How to read it</h2><ul>{''.join(f'<li>{escape(n)}</li>' for n in notes)}</ul></section>"


def _done(trial: Trial | None) -> bool:
    return trial is not None and trial.state == COMPLETE and finite(trial.value)


def _without(trial: Trial | None) -> str:
    """Why there is no result of a trial; "" where there is one."""
    if trial is None:
        return "not tried"
    if _done(trial):
        return ""
    at = f" at {trial.value:.4f}" if trial.state == PRUNED and finite(trial.value) else ""
    return f"{STATES[trial.state]}{at}"


def _value(trial: Trial | None) -> float:
    return trial.value if trial and finite(trial.value) else float("nan")


def _number(trial: Trial | None) -> str:
    if trial is None or not finite(trial.value):
        return "–"
    return f"{trial.value:.4f} ± {trial.deviation:.4f}" if finite(trial.deviation) else f"{trial.value:.4f}"
