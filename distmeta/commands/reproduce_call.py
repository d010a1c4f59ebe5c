"""What a call of `reproduce` asks for: flags, tables and studies, the data at hand, how many runs at once."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distmeta import process
from distmeta.cli import Parser
from distmeta.commands.reproduce_costs import COSTS, Costs
from distmeta.errors import UserError
from distmeta.evaluation.papertables import HEADS, PREPARE, RARE, TABLES, PaperTable
from distmeta.evaluation.studies import STUDIES, Study
from distmeta.evaluation.style import FIRST, LAST
from distmeta.fields import nearest
from distmeta.parallel import submitted
from distmeta.storage import Location

ALL = "all"
NOWHERE = "none"
"""In place of a data set or a folder: without it."""
TAKEN = ("data", "protocol", "split-seed", "run", "resume", "retried", "workers", "threads", "epochs")
"""Flags of `train` that the command itself sets."""
RUN_BYTES = 3 << 29
"""Memory that a run may take. Measured on MovieLens-1M: at most .81 GB with users as tasks, .98 GB with scenarios."""
_EPILOG = """\
tables: {tables}
all: each of them that has data
studies: {studies}
costs of training: {costs} (trains nothing to its end: some minutes)
which: another command, which method suits a data set; `reproduce which --help` explains it

Tables and studies know their settings. --set FLAG[=VALUE] gives every method that has it another flag of `train`;
WHERE:FLAG[=VALUE] only the method, the data set, or DATASET/METHOD that WHERE names. Commas part the values of a list.

Results are kept in --results (RESULTS/runs/RUN.json, RESULTS/TABLE.json): small, without data of users or paths of
this machine. --report makes of them RESULTS/report.md, report.html and pictures, without training or data, and with
--readme FILE what stands in FILE between these two lines:
  {first}
  {last}

examples:
  python -m jobs.reproduce all --data movielens-1m=data/ml-1m bookcrossing=data/bookcrossing
  python -m jobs.reproduce all --data movielens-1m=data/ml-1m --seeds 1 --out runs/quick --results runs/quick/results
  python -m jobs.reproduce paml-3 --data movielens-1m=data/ml-1m --set reg-paml:lr=1e-3 hidden=64,64 --results none
  python -m jobs.reproduce paml-2 --data movielens-1m=data/ml-1m bookcrossing=none --methods melu transfer
  python -m jobs.reproduce mamo-fig2 mamo-fig5 --data movielens-1m=data/ml-1m --panels tau beta
  python -m jobs.reproduce --report --readme README.md
"""

Asked = PaperTable | Study | Costs


@dataclass(frozen=True)
class Wanted:
    """What a call is to make."""

    asked: Sequence[Asked]
    methods: Sequence[str]
    places: Mapping[str, Location]
    """Data set -> where it lies, without those left out."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of `reproduce`; UserError on usage."""
    parser = Parser(
        prog="reproduce",
        usage="reproduce TABLE|STUDY|all [...] --data NAME=DATASET [...] [flags]\n"
        "       reproduce --report [--results DIR] [--readme FILE]\n"
        "       reproduce which --data NAME=DATASET [flags]",
        description="Train what a paper's table compares, or each value of a study's parameters, on several split\n"
        "seeds, and write OUT/NAME.html, .md and .json (a study also .svg): the paper's rows and ours side\n"
        "by side, or our curves, floors included. Runs lie in OUT/runs; those that have finished are not\n"
        "trained again, so that the same command goes on after a kill, and tables share them.",
        epilog=_EPILOG.format(
            tables=" ".join(TABLES), studies=" ".join(STUDIES), costs=" ".join(COSTS), first=FIRST, last=LAST
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE|STUDY", help=" ".join([ALL, *TABLES, *STUDIES, *COSTS]))
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=DATASET",
        help="where each data set lies, made by `prepare`; NAME=none leaves its columns out, as not to name one of"
        f" {', '.join(RARE)} does, and with `all` any",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="split seeds 0 to N-1 [5 for tables of scenarios, 2 for studies, else 3]"
    )
    parser.add_argument("--out", default="runs/reproduce", metavar="DIR", help="where to write [runs/reproduce]")
    parser.add_argument(
        "--results", default="jobs/results", metavar="DIR",
        help="where to keep what came out; none: nowhere [jobs/results]",
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="only these rows of ours [all]")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="[WHERE:]FLAG[=VALUE]", help="flags of train; see below"
    )
    parser.add_argument(
        "--panels", nargs="+", default=[], metavar="PANEL",
        help=f"of a study with several, only these: {' '.join(p.name for p in STUDIES['mamo-fig2'].panels)} [all]",
    )  # fmt: skip
    parser.add_argument("--epochs", metavar="N", help="--epochs of train, for all methods [each table's own]")
    parser.add_argument("--workers", metavar="N", help="--workers of train")
    parser.add_argument("--threads", metavar="N", help="--threads of train")
    add_jobs(parser)
    parser.add_argument("--report", action="store_true", help="make the report of what --results holds; trains nothing")
    parser.add_argument("--readme", metavar="FILE", help="with --report: the page whose marked part to make anew")
    args = parser.parse(argv)
    if args.report and args.tables:
        raise UserError(f"reproduce: --report is made of all results; leave out {' '.join(args.tables)}")
    if args.readme and not args.report:
        raise UserError("reproduce: --readme goes with --report; add it")
    if not args.report and not args.tables:
        parser.error("the following arguments are required: TABLE|STUDY")
    return args


def add_jobs(parser: Parser) -> None:
    """--jobs, of each command that trains several runs."""
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N",
        help="train N runs at a time, each a process with one thread (or --threads) that logs to RUN.log; 1: in this"
        " process; 0: as many as the machine has cores and memory for [0]",
    )  # fmt: skip


def wanted(args: argparse.Namespace) -> Wanted:
    """What the arguments ask for; of `all` what has data, with a line about the rest.

    Raises:
        UserError: a name is none, data is missing, or there is nothing left to make.
    """
    asked, of_all = _asked(args.tables)
    if args.seeds is not None and args.seeds < 1:
        raise UserError(f"reproduce: --seeds must be at least 1, not {args.seeds}")
    methods = _methods(args.methods, asked, of_all)
    _check_panels(args.panels, [a for a in asked if isinstance(a, Study)])
    places = _places(args.data, asked, of_all)
    kept = []
    for one in asked:
        why = ""
        if not set(one.datasets) & set(places):
            why = f"give at least one of {' '.join(one.datasets)}"
        elif not {o.method for o in one.ours} & set(methods):
            why = f"--methods leaves no row; it has {' '.join(dict.fromkeys(o.method for o in one.ours))}"
        if why and one.name not in of_all:
            raise UserError(f"reproduce: {one.name} has no data set left; {why}")
        if why:
            print(f"{one.name}: passed over; {why}")
        else:
            kept.append(one)
    if not kept:
        raise UserError(f"reproduce {ALL}: no table is left; give one of {' '.join(PREPARE)} with --data NAME=DATASET")
    return Wanted(kept, methods, places)


def _asked(names: Sequence[str]) -> tuple[list[Asked], set[str]]:
    """What is named, each once, and the names of that of which `all` alone speaks."""
    known: dict[str, Asked] = {**TABLES, **STUDIES, **COSTS}
    for name in names:
        if name not in known and name != ALL:
            raise UserError(
                f"reproduce: unknown table or study {name!r}{nearest(name, [*known, ALL])}; tables: {' '.join(TABLES)};"
                f" studies: {' '.join(STUDIES)}; costs: {' '.join(COSTS)}"
            )
    every = [n for name in names for n in (TABLES if name == ALL else [name])]
    return [known[n] for n in dict.fromkeys(every)], set(TABLES) - set(names) if ALL in names else set()


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


def _methods(given: Sequence[str], tables: Sequence[Asked], of_all: set[str]) -> list[str]:
    """The methods to run; UserError where one is in no table."""
    known = list(dict.fromkeys(o.method for t in tables for o in t.ours))
    for name in given:
        if name not in known:
            raise UserError(
                f"reproduce: --methods {name}: no row of {' '.join(t.name for t in tables)}{nearest(name, known)};"
                f" rows of ours: {' '.join(known)}"
            )
    chosen = list(given) or known
    for table in tables:
        if table.name not in of_all and not {o.method for o in table.ours} & set(chosen):
            mine = " ".join(dict.fromkeys(o.method for o in table.ours))
            raise UserError(f"reproduce: --methods leaves nothing of {table.name}; give {mine}, or leave it out")
    return chosen


def _places(given: Sequence[str], tables: Sequence[Asked], of_all: set[str]) -> dict[str, Location]:
    """Data set -> where it lies, without those left out; UserError where one is missing or none of the tables'."""
    needed = list(dict.fromkeys(name for t in tables for name in t.datasets))
    said = named(given, "reproduce")
    for name, place in said.items():
        if name not in needed:
            raise UserError(
                f"reproduce: --data {name}={place}: these tables have no data set {name!r}{nearest(name, needed)};"
                f" names: {' '.join(needed)}"
            )
    for name in needed:
        askers = [t.name for t in tables if name in t.datasets and t.name not in of_all]
        if name not in said and name not in RARE and askers:
            raise UserError(
                f"reproduce: {askers[0]} needs {HEADS.get(name, name)}; make it with `{PREPARE[name]}`, then give"
                f" --data {name}=DATASET, or leave its columns out with --data {name}={NOWHERE}"
            )
    return {name: Location.of(place) for name, place in said.items() if place != NOWHERE}


def named(given: Sequence[str], command: str) -> dict[str, str]:
    """--data's words, name -> place; UserError for what is no NAME=DATASET, and for a name given twice."""
    said: dict[str, str] = {}
    for text in given:
        name, _, place = text.partition("=")
        if not place or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{command}: --data {text!r} is not NAME=DATASET; say movielens-1m=data/ml-1m")
        if name in said:
            raise UserError(f"{command}: --data gives {name} twice; give it once")
        if place != NOWHERE:
            submitted.check(f"--data {name}=", place)
        said[name] = place
    return said


def at_once(jobs: int, workers: str | None, threads: str | None) -> int:
    """How many runs are trained at a time: `jobs`, or for 0 as many as there are cores and memory for.

    Raises:
        UserError: so many runs cannot be trained at once.
    """
    if jobs < 0:
        raise UserError(f"reproduce: --jobs must be at least 0, not {jobs}")
    if jobs > 1 and workers not in (None, "0"):
        raise UserError(f"reproduce: --jobs {jobs} is for runs without Ray; leave out --workers {workers}, or --jobs")
    if jobs:
        return jobs
    if workers not in (None, "0"):
        return 1
    each = int(threads) if threads and threads.isdigit() and threads != "0" else 1
    free = process.free_memory()
    return max(1, min(process.cores() // each, process.cores() if free is None else free // RUN_BYTES))
