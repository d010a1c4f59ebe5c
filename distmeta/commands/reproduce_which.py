"""`reproduce which`: which method suits a data set, by quality, cost of training, latency and memory."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distmeta.cli import Parser
from distmeta.commands import reproduce_call, reproduce_results
from distmeta.commands.settings import Setting, of_flags, told
from distmeta.errors import RunError, UserError
from distmeta.evaluation.papertables import S2META, Ours, PaperTable
from distmeta.fields import nearest
from distmeta.methods import FLOORS, METHODS, entry
from distmeta.parallel import submitted
from distmeta.storage import Location

if TYPE_CHECKING:
    from distmeta.commands.reproduce_runs import Run
    from distmeta.data.schema import Dataset
    from distmeta.evaluation.measured import Measured

NEW_USERS = {"cmml-user": "C-W", "melu": "user-cold", "mamo": "C-W", "paml": "all", "hml": "ne"}
"""Protocol -> the cohort of its new users."""
_WIDE = ("--embedding", "64")
TUNED: dict[str, tuple[str, ...]] = {
    "*": ("--epochs", "12", "--lr-decay", "0", "--query-rows", "30", "--item-ids"),
    "melu": ("--wide", *_WIDE),
    **dict.fromkeys((name for name in METHODS if name.startswith("cmml-")), _WIDE),
    **dict.fromkeys(("widedeep", "deepfm"), ("--user-ids", "--steps", "20")),
    "dcn-f": ("--user-ids",),
    "s2meta": S2META,
}
"""Settings that did well on MovieLens-1M (README, Results), keyed as a table's flags."""
_RATINGS = ("--query-loss", "absolute")
"""And of ratings, whose quality is MAE."""
MANY = 0.1
"""Fields of users with more values than this share of the users are left out, as they are nearly the user's id."""


def main(argv: Sequence[str]) -> int:
    """Run `reproduce which`; 0 when the page is there.

    Raises:
        UserError: usage or bad input. RunError: a run failed; the same command goes on.
    """
    args = _parse(argv)
    said = reproduce_call.named(args.data, "reproduce which")
    if len(said) != 1 or reproduce_call.NOWHERE in (*said.values(), args.results):
        raise UserError("reproduce which: give one --data NAME=DATASET, and a folder for --results")
    for flag in ("out", "results"):
        submitted.check(f"--{flag}", getattr(args, flag))
    from distmeta.commands import reproduce_runs as runs
    from distmeta.commands.reproduce_jobs import train_missing
    from distmeta.data.schema import Dataset

    ((name, where),) = said.items()
    place, results = Location.of(where), Location.of(args.results)
    dataset = Dataset.open(place)
    methods = _methods(args.methods, dataset)
    asker = _asker(f"which-{name}", args.protocol, dataset, methods)
    settings = [Setting.of(text, "reproduce which", reproduce_call.TAKEN[:-1]) for text in args.set]
    for s in settings:
        if not any(s.meant_for("", m) for m in methods):
            raise UserError(f"reproduce which: --set {s.text}: none of {' '.join(methods)} has that flag")
    jobs = reproduce_call.at_once(args.jobs, None, "1")
    call = runs.Call(1, Location.of(args.out), methods, settings, ["--threads", "1"])
    planned = [runs.make(asker, asker.name, place, ours, 0, call) for ours in asker.ours]
    for run in planned:
        runs.check(run)
    failed = train_missing(
        planned, jobs, after=lambda run: reproduce_results.keep_run(results, run, [f"{asker.name}: {run.label}"])
    )
    for run in planned:
        if str(run.where) in failed:
            print(f"{run.label}: left out, it diverged; give it other settings with --set {run.label}:FLAG=VALUE")
    there = [run for run in planned if str(run.where) not in failed]
    if not there:
        raise RunError(f"{asker.name}: all runs diverged; give them other settings with --set")
    made = _made(asker, there, place, dataset, [*of_flags(asker.flags), *settings])
    words = _command(name, where, args)
    reproduce_results.keep(results, "which", made, words, there)
    _write(results, asker.name)
    return 0


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="reproduce which",
        description="Train each method that suits a data set (of ratings or clicks, prepared by any source), and write"
        " RESULTS/which-NAME.html, .md, .svg and .json: quality beside the floors, the cost of training, the latency of"
        " one user, memory, what each works on, the Pareto fronts, and what follows from them in words.",
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DATASET", help="one data set and its name")
    parser.add_argument(
        "--methods", nargs="+", default=[], metavar="METHOD", help="only these [all that suit the data]"
    )
    parser.add_argument("--protocol", default="cmml-user", choices=[*NEW_USERS], help="what becomes a task [cmml-user]")
    parser.add_argument("--set", nargs="+", default=[], metavar="[METHOD:]FLAG[=VALUE]", help="flags of train")
    parser.add_argument("--out", default="runs/reproduce", metavar="DIR", help="where runs lie [runs/reproduce]")
    parser.add_argument("--results", default="jobs/results", metavar="DIR", help="where to write [jobs/results]")
    reproduce_call.add_jobs(parser)
    return parser.parse(argv)


def suited(kind: str) -> list[str]:
    """The methods that learn users' labels of this kind (`rating` or `click`)."""
    if kind not in FLOORS:
        raise UserError(
            f"reproduce which: the labels are of kind {kind}; the methods here learn {' and '.join(FLOORS)}"
        )
    others = {floor for floors in FLOORS.values() for floor in floors} - {*FLOORS[kind]}
    return [
        name for name, e in METHODS.items() if e.users and name not in others and (kind == "click" or not e.clicks_only)
    ]


def _methods(given: Sequence[str], dataset: "Dataset") -> list[str]:
    able = suited(dataset.label.kind)
    for name in given:
        if name not in able:
            raise UserError(
                f"reproduce which: --methods {name}: is none that learns users' {dataset.label.kind}s"
                f"{nearest(name, able)}; there are {' '.join(able)}"
            )
    return list(dict.fromkeys(given)) or able


def _asker(name: str, protocol: str, dataset: "Dataset", methods: Sequence[str]) -> PaperTable:
    """The comparison as a table of the house: a row a method, with the settings of TUNED."""
    flags = dict(TUNED)
    if dataset.label.kind == "rating":
        flags["*"] += _RATINGS
    near_ids = [f.name for f in dataset.user_fields if f.size > MANY * dataset.users]
    if near_ids:
        flags["*"] += ("--leave-out", *near_ids)
        print(f"{', '.join(near_ids)}: left out, nearly as many values as users; --set leave-out=FIELD says otherwise")
    title = f"Which method for {name.removeprefix('which-')}?"
    rows = tuple(Ours(method, method) for method in methods)
    return PaperTable(name, title, protocol, (), (), rows, (), flags=flags)


def _made(
    asker: PaperTable, planned: Sequence["Run"], place: Location, dataset: "Dataset", settings: Sequence[Setting]
) -> dict[str, Any]:
    """What the page is made of."""
    from distmeta.commands import reproduce_runs as runs
    from distmeta.commands import which_measures as measures
    from distmeta.evaluation import evaluate as evaluation
    from distmeta.evaluation.cohorts import cohorts

    table = runs.tasks(planned[0], place)
    metric = "mae" if dataset.label.kind == "rating" else "auc"
    cohort = NEW_USERS[asker.protocol]
    floors = evaluation.floors(table, table.seen(dataset), place, FLOORS[dataset.label.kind])
    found = {run.label: runs.measured(run, table) for run in planned}
    quality = {name: _quality(m, cohort, metric) for name, m in (found | floors).items()}
    sign = -1 if metric == "auc" else 1
    best = min(found, key=lambda name: sign * quality[name])
    costs = measures.of(planned, table, dataset, place)
    rows = []
    for run in planned:
        pairs = evaluation.pooled([(found[run.label], floors | {"": found[best]})])[cohort]
        e = entry(run.label)
        mine = [dataclasses.replace(s, where=()) for s in settings if s.meant_for("", run.label)]
        rows.append(
            {
                "method": run.label,
                "settings": " ".join(told(mine)),
                "quality": quality[run.label],
                "paired": {floor: None if floor == run.label else pairs[floor][metric] for floor in floors},
                "to_best": None if run.label == best else pairs[""][metric],
                "ratings": not e.clicks_only and run.label not in set(FLOORS["click"]) - set(FLOORS["rating"]),
                "clicks": run.label in suited("click"),
                "scenarios": e.scenarios,
                "gradient": e.inner_steps,
                **costs[run.label],
            }
        )
    counts = {"users": dataset.users, "items": dataset.items, "interactions": dataset.interactions}
    return {
        "name": asker.name,
        "title": asker.title,
        "protocol": asker.protocol,
        "dataset": {"name": dataset.name, **counts},
        "cohort": cohort,
        "metric": metric,
        "tasks": cohorts(found[best])[cohort].summary["n_tasks"],
        "floor": min(floors, key=lambda name: sign * quality[name]),
        "requests": rows[0]["requests"],
        "candidates": measures.CANDIDATES,
        "split_hash": table.split_hash,
        "rows": rows,
    }


def _quality(measured: "Measured", cohort: str, metric: str) -> float:
    from distmeta.evaluation.cohorts import cohorts

    found = cohorts(measured).get(cohort)
    value = found.summary.get(metric) if found else None
    if value is None:
        raise UserError(f"reproduce which: nobody is in the cohort {cohort} of this split; choose another --protocol")
    return value


def _command(name: str, where: str, args: Any) -> str:
    """The words that make the page again."""
    words = [f"python -m jobs.reproduce which --data {name}=data/{Location.of(where).name}"]
    words += [f"--protocol {args.protocol}"] if args.protocol != "cmml-user" else []
    words += [f"--methods {' '.join(args.methods)}"] if args.methods else []
    words += [f"--set {' '.join(args.set)}"] if args.set else []
    return " ".join(words)


def _write(results: Location, name: str) -> None:
    """RESULTS/which-NAME.svg, .html and .md, of its .json, which is there."""
    from distmeta.evaluation import whichpage

    made: Mapping[str, Any] = (results / f"{name}.json").read_json()
    text = whichpage.markdown(made)
    (results / f"{name}.svg").write_bytes(whichpage.sheet(made).encode())
    (results / f"{name}.html").write_bytes(whichpage.page(made).encode())
    (results / f"{name}.md").write_bytes(text.encode())
    print(f"\n{text}\n{results / name}.html, .svg, .md and .json")
