"""`reproduce`: a paper's tables and parameter studies, and ours, from runs that are trained where they are missing."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distmeta.cli import Parser
from distmeta.commands import reproduce_costs
from distmeta.commands.reproduce_costs import COSTS, Costs
from distmeta.commands.settings import Setting, flags_of
from distmeta.errors import RunError, UserError
from distmeta.evaluation.papertables import HEADS, PREPARE, RARE, TABLES, PaperTable
from distmeta.evaluation.studies import STUDIES, Study
from distmeta.fields import nearest
from distmeta.methods import METHODS
from distmeta.parallel import submitted
from distmeta.storage import Location

if TYPE_CHECKING:
    from distmeta.commands.reproduce_runs import Run
    from distmeta.data.schema import Dataset
    from distmeta.evaluation.measured import Measured
    from distmeta.evaluation.study import Curves

_TAKEN = ("data", "protocol", "split-seed", "run", "resume", "retried", "workers", "threads", "epochs")
"""Flags of `train` that the command itself sets."""
_EPILOG = """\
tables: {tables}
studies: {studies}
costs of training: {costs} (trains nothing to its end: some minutes)

--set FLAG[=VALUE] gives every method that has it a flag of `train`; WHERE:FLAG[=VALUE] only the method, the data
set, or DATASET/METHOD that WHERE names. Commas part the values of a list.

examples:
  python -m jobs.reproduce paml-2 paml-3 paml-4 hml-2 --data movielens-1m=data/ml-1m bookcrossing=data/bookcrossing
  python -m jobs.reproduce paml-3 --data movielens-1m=data/ml-1m --set item-ids reg-paml:lr=1e-3 hidden=64,64
  python -m jobs.reproduce paml-2 --data movielens-1m=data/ml-1m bookcrossing=none --methods melu transfer
  python -m jobs.reproduce cmml-2 cmml-4 cmml-5 --data movielens-1m=data/ml-1m movielens-20m=data/ml-20m --jobs 2
  python -m jobs.reproduce mamo-fig2 mamo-fig5 --data movielens-1m=data/ml-1m --panels tau beta --seeds 2
"""


def main(argv: Sequence[str]) -> int:
    """Run `reproduce`; 0 when the tables are there.

    Raises:
        UserError: usage or bad input. RunError: a run failed; the same command goes on.
    """
    args = _parse(argv)
    asked = [_asked(name) for name in dict.fromkeys(args.tables)]
    if args.seeds is not None and args.seeds < 1:
        raise UserError(f"reproduce: --seeds must be at least 1, not {args.seeds}")
    methods = _methods(args.methods, asked)
    _check_panels(args.panels, [a for a in asked if isinstance(a, Study)])
    places = _places(args.data, asked)
    submitted.check("--out", args.out)
    from distmeta.commands import reproduce_runs as runs
    from distmeta.commands import reproduce_studies as studies
    from distmeta.commands.reproduce_jobs import train_missing

    common = [w for f in ("workers", "threads", "epochs") if getattr(args, f) for w in (f"--{f}", getattr(args, f))]
    _check_jobs(args.jobs, args.workers)
    settings = [Setting.of(text, "reproduce", _TAKEN) for text in args.set]
    call = runs.Call(args.seeds, Location.of(args.out), methods, settings, common)
    datasets = {name: runs.dataset_at(name, place) for name, place in places.items()}
    tables = [(t, runs.plan(t, places, call)) for t in asked if isinstance(t, PaperTable)]
    planned = [(s, studies.plan(s, args.panels, places[s.dataset], call)) for s in asked if isinstance(s, Study)]
    needed = [r for _, found in tables for r in found] + [r for _, found in planned for p in found for r in p.runs()]
    every = _distinct(needed)
    _check_settings(settings, every)
    for run in every:
        runs.check(run)
    failed = train_missing(every, args.jobs)
    _check_tables(tables, failed)
    given = " ".join([*args.set, *(f"epochs={n}" for n in [args.epochs] if n)])
    for table, found in tables:
        more = _said(table, args.seeds or table.seeds, given, datasets, places)
        _write(table, found, places, datasets, call.out, more)
    for study, found in planned:
        points = studies.gather(study, found, places[study.dataset], datasets[study.dataset], failed)
        _write_study(study, points, call.out, _said(study, args.seeds or study.seeds, given, datasets, places))
    for costs in (a for a in asked if isinstance(a, Costs)):
        reproduce_costs.run(costs, places[costs.dataset], call.out, methods)
    if failed:
        raise RunError(f"{len(failed)} runs diverged, which the pages say: {', '.join(failed)}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="reproduce",
        usage="reproduce TABLE|STUDY [...] --data NAME=DATASET [...] [flags]",
        description="Train what a paper's table compares, or each value of a study's parameters, on several split\n"
        "seeds, and write OUT/NAME.html, .md and .json (a study also .svg): the paper's rows and ours side\n"
        "by side, or our curves, floors included. Runs lie in OUT/runs; those that have finished are not\n"
        "trained again, so that the same command goes on after a kill.",
        epilog=_EPILOG.format(tables=" ".join(TABLES), studies=" ".join(STUDIES), costs=" ".join(COSTS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE|STUDY", help=" ".join([*TABLES, *STUDIES, *COSTS]))
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=DATASET",
        help="where each data set lies, made by `prepare`; NAME=none leaves its columns out, as not to name one of"
        f" {', '.join(RARE)} does",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="split seeds 0 to N-1 [5 for tables of scenarios, else 3]"
    )
    parser.add_argument("--out", default="runs/reproduce", metavar="DIR", help="where to write [runs/reproduce]")
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="only these rows of ours [all]")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="[WHERE:]FLAG[=VALUE]", help="flags of train; see below"
    )
    parser.add_argument(
        "--panels", nargs="+", default=[], metavar="PANEL",
        help=f"of a study with several, only these: {' '.join(p.name for p in STUDIES['mamo-fig2'].panels)} [all]",
    )  # fmt: skip
    parser.add_argument("--epochs", metavar="N", help="--epochs of train, for all methods")
    parser.add_argument("--workers", metavar="N", help="--workers of train")
    parser.add_argument("--threads", metavar="N", help="--threads of train")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="train N runs at a time, each a process with one thread (or --threads) that logs to RUN.log [1]",
    )  # fmt: skip
    return parser.parse(argv)


def _asked(name: str) -> PaperTable | Study | Costs:
    known = {**TABLES, **STUDIES, **COSTS}
    if name not in known:
        raise UserError(
            f"reproduce: unknown table or study {name!r}{nearest(name, known)}; tables: {' '.join(TABLES)}; studies:"
            f" {' '.join(STUDIES)}; costs: {' '.join(COSTS)}"
        )
    return known[name]


def _check_panels(given: Sequence[str], studies: Sequence[Study]) -> None:
    """UserError where a panel is no study's, or is given without a study."""
    if given and not studies:
        raise UserError(f"reproduce: --panels is for studies; name one of {' '.join(STUDIES)}, or leave --panels out")
    known = list(dict.fromkeys(p.name for s in studies for p in s.panels))
    for name in given:
        if name not in known:
            raise UserError(
                f"reproduce: --panels {name}: no panel of {' '.join(s.name for s in studies)}{nearest(name, known)};"
                f" panels: {' '.join(known)}"
            )


def _methods(given: Sequence[str], tables: Sequence[PaperTable | Study | Costs]) -> list[str]:
    """The methods to run; UserError where one is in no table, or not in the registry."""
    known = list(dict.fromkeys(o.method for t in tables for o in t.ours))
    for name in given:
        if name not in known:
            raise UserError(
                f"reproduce: --methods {name}: no row of {' '.join(t.name for t in tables)}{nearest(name, known)};"
                f" rows of ours: {' '.join(known)}"
            )
    chosen = list(given) or known
    for table in tables:
        if not {o.method for o in table.ours} & set(chosen):
            mine = " ".join(dict.fromkeys(o.method for o in table.ours))
            raise UserError(f"reproduce: --methods leaves nothing of {table.name}; give {mine}, or leave it out")
    missing = [name for name in chosen if name not in METHODS]
    if missing:
        raise UserError(
            f"reproduce: method {missing[0]} is not installed here; leave it out with --methods"
            f" {' '.join(name for name in chosen if name in METHODS)}"
        )
    return chosen


def _places(given: Sequence[str], tables: Sequence[PaperTable | Study | Costs]) -> dict[str, Location]:
    """Data set -> where it lies, without those left out; UserError where one is missing or none of the tables'."""
    needed = list(dict.fromkeys(name for t in tables for name in t.datasets))
    said: dict[str, str] = {}
    for text in given:
        name, _, place = text.partition("=")
        if not place:
            raise UserError(f"reproduce: --data {text!r} is not NAME=DATASET; names: {' '.join(needed)}")
        if name not in needed:
            raise UserError(
                f"reproduce: --data {text}: these tables have no data set {name!r}{nearest(name, needed)}; names:"
                f" {' '.join(needed)}"
            )
        if name in said:
            raise UserError(f"reproduce: --data gives {name} twice; give it once")
        said[name] = place
    for name in needed:
        if name not in said and name not in RARE:
            table = next(t.name for t in tables if name in t.datasets)
            raise UserError(
                f"reproduce: {table} needs {HEADS.get(name, name)}; make it with `{PREPARE[name]}`, then give --data"
                f" {name}=DATASET, or leave its columns out with --data {name}=none"
            )
    places = {name: Location.of(place) for name, place in said.items() if place != "none"}
    for table in tables:
        if not set(table.datasets) & set(places):
            raise UserError(
                f"reproduce: {table.name} has no data set left; give at least one of {' '.join(table.datasets)}"
            )
    for name in places:
        submitted.check(f"--data {name}=", said[name])
    return places


def _check_jobs(jobs: int, workers: str | None) -> None:
    """UserError where so many runs cannot be trained at once."""
    if jobs < 1:
        raise UserError(f"reproduce: --jobs must be at least 1, not {jobs}")
    if jobs > 1 and workers not in (None, "0"):
        raise UserError(f"reproduce: --jobs {jobs} is for runs without Ray; leave out --workers {workers}, or --jobs")


def _check_tables(tables: Sequence[tuple[PaperTable, Sequence["Run"]]], failed: Mapping[str, str]) -> None:
    """RunError where a run of a table diverged: it has no row without its numbers."""
    for table, found in tables:
        for run in found:
            if said := failed.get(str(run.where)):
                raise RunError(f"{table.name}: {run.where}: {said}; give it other settings with --set")


def _check_settings(settings: Sequence[Any], runs: Sequence["Run"]) -> None:
    """UserError for a --set that reaches no run: a word of it is misspelt."""
    pairs = {(run.dataset, run.config.method) for run in runs}
    for s in settings:
        if any(s.meant_for(*pair) for pair in pairs):
            continue
        known = sorted({word for pair in pairs for word in pair})
        for word in s.where:
            if word not in known:
                raise UserError(
                    f"reproduce: --set {s.text}: no run of {word!r}{nearest(word, known)}; there are {' '.join(known)}"
                )
        flags = sorted({f for _, method in pairs for f in flags_of(method)})
        raise UserError(f"reproduce: --set {s.text}: no method here has --{s.flag}{nearest(s.flag, flags)}")


def _distinct(runs: Sequence["Run"]) -> list["Run"]:
    """Each once, split by split, so that a call that is cut short has finished the first splits."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(str(run.where), run)
    return sorted(found.values(), key=lambda run: run.seed)


def _said(
    one: PaperTable | Study,
    seeds: int,
    settings: str,
    datasets: Mapping[str, "Dataset"],
    places: Mapping[str, Location],
) -> dict[str, Any]:
    """What a page says of the call that made it."""
    described = {name: _described(datasets.get(name), places.get(name)) for name in one.datasets}
    return {"seeds": seeds, "datasets": described, "settings": settings}


def _described(dataset: "Dataset | None", place: Location | None) -> dict[str, Any] | None:
    if dataset is None:
        return None
    counts = {"users": dataset.users, "items": dataset.items, "interactions": dataset.interactions}
    return {"name": dataset.name, "location": str(place), **counts}


def _write(
    table: PaperTable,
    planned: Sequence["Run"],
    places: Mapping[str, Location],
    datasets: Mapping[str, "Dataset"],
    out: Location,
    more: Mapping[str, Any],
) -> None:
    """OUT/TABLE.html, .md and, last, .json."""
    from distmeta.commands import reproduce_pictures as pictures
    from distmeta.commands import reproduce_runs as runs
    from distmeta.evaluation import evaluate as evaluation
    from distmeta.evaluation import reproduction, reproduction_page

    ours: dict[str, dict[str, list[Measured]]] = {}
    floors: dict[str, dict[str, list[Measured]]] = {}
    tables = {}
    for run in planned:
        place = places[run.dataset]
        if (run.dataset, run.seed) not in tables:
            tables[run.dataset, run.seed] = task_table = runs.tasks(run, place)
            found = evaluation.floors(task_table, task_table.seen(datasets[run.dataset]), place, [*table.floors])
            for name, one in found.items():
                floors.setdefault(run.dataset, {}).setdefault(name, []).append(one)
        ours.setdefault(run.dataset, {}).setdefault(run.label, []).append(
            runs.measured(run, tables[run.dataset, run.seed])
        )
    compared = next(iter(tables.values())).compared
    hashes = {f"{dataset} {seed}": t.split_hash for (dataset, seed), t in tables.items()}
    found = {**reproduction.assemble(table, ours, floors, compared), **more, "split_hashes": hashes}
    figures = pictures.figures(table, planned, places, datasets, ours, floors, tables)
    text = reproduction_page.markdown(found)
    (out / f"{table.name}.html").write_bytes(reproduction_page.page(found, figures).encode())
    (out / f"{table.name}.md").write_bytes(text.encode())
    (out / f"{table.name}.json").write_json(found)
    print(f"\n{text}\n{out / table.name}.html, .md and .json")


def _write_study(study: Study, measured: Mapping[str, "Curves"], out: Location, more: Mapping[str, Any]) -> None:
    """OUT/STUDY.svg, .html, .md and, last, .json."""
    from distmeta.evaluation import study as assembly
    from distmeta.evaluation import study_page, studycharts

    found = assembly.assemble(study, measured)
    there = [p["name"] for p in found["panels"]]
    found |= {**more, "left_out": [p.name for p in study.panels if p.name not in there]}
    text = study_page.markdown(found)
    heads = {split: study_page.SPLITS[split] for split in study.splits}
    (out / f"{study.name}.svg").write_bytes(studycharts.sheet(found["panels"], heads, study.name).encode())
    (out / f"{study.name}.html").write_bytes(study_page.page(found).encode())
    (out / f"{study.name}.md").write_bytes(text.encode())
    (out / f"{study.name}.json").write_json(found)
    print(f"\n{text}\n{out / study.name}.html, .svg, .md and .json")
