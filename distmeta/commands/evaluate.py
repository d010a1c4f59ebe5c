"""`evaluate`: the best checkpoint of a run on tasks it has not seen, beside the floors; evaluation.json and report."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distmeta import config as config_module
from distmeta import process
from distmeta.cli import Parser
from distmeta.config import Config, TrainOptions
from distmeta.data import protocols, tasktable
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError
from distmeta.fields import add_share, build
from distmeta.parallel import rundir, submitted
from distmeta.storage import Location

if TYPE_CHECKING:
    from distmeta.evaluation.measured import Measured
    from distmeta.parallel.assessment import Assessment

    Found = tuple[Measured, dict[str, Measured]]

MEASURED = "measured.arrow"
"""In a run's directory: what `Measured.from_ipc` reads."""

_TOLD = {"mae": "MAE", "recall@10": "Recall@10"}
_SHOWN = ("mae", "mse", "rmse", "ndcg@1", "ndcg@3", "ndcg@5", "auc", "nel", "recall@10", "recall@20", "recall@50")
"""Metrics of the table on the terminal; evaluation.json has more."""


def main(argv: Sequence[str]) -> int:
    """Run `evaluate`; 0 when evaluation.json and the report are there.

    Raises:
        UserError: usage, no run, no checkpoint, other data than it was trained on. RunError: predictions not finite.
    """
    parser = Parser(
        prog="evaluate",
        description="Evaluate the best checkpoint of a run on the tasks of its test split, and write\n"
        "RUN/evaluation.json, RUN/measured.arrow (the same, task by task) and RUN/report.html.\n"
        "Several runs, of several split seeds say, are also judged together: the paired differences of\n"
        "all their tasks, by cohort.",
        epilog="examples:\n  python -m jobs.evaluate --run runs/first\n"
        "  python -m jobs.evaluate --run runs/split-0 runs/split-1 runs/split-2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run", required=True, nargs="+", metavar="RUN", help="run directories or URIs, made by `train`"
    )
    parser.add_argument("--data", metavar="DATASET", help="where the runs' dataset lies now, if it was moved")
    parser.add_argument("--workers", metavar="N", default="0", help="Ray workers, as of train [0]")
    add_share(parser, "gpu", 1.0, "compute on a GPU, or not, as of train [as the run was trained]")
    args = parser.parse(argv)
    found: list[Found] = []
    for run in args.run:
        submitted.check("--run", run)
    if args.data:
        submitted.check("--data", args.data)
    runs = [Location.of(run) for run in args.run]
    configs = [rundir.stored(run) for run in runs]
    places = [Location.of(args.data or config.data.data) for config in configs]
    _check_alike(runs, configs, places)
    for run, config, place in zip(runs, configs, places, strict=True):
        config = _here(config, run, place, {k: v for k, v in vars(args).items() if k in ("workers", "gpu")})
        dataset = Dataset.open(place)
        options = protocols.protocol_options(config.data)
        table = tasktable.make(place, config.data.protocol, config.data.split_seed, options)
        dataset = table.seen(dataset)
        process.prepare(config.train.threads)
        if len(runs) > 1:
            print(f"\n{run}")
        found.append(evaluate(config, run, place, dataset, table))
    if len(found) > 1:
        print(f"\nall {len(found)} runs together\n{pooled_table(found)}")
    return 0


def _here(config: Config, run: Location, place: Location, flags: Mapping[str, Any]) -> Config:
    """The run's config with where things lie now, and --workers and --gpu as given; UserError for a wrong number."""
    given = {**dataclasses.asdict(config.train), "run": str(run), **flags, "floors": True}
    train = build(TrainOptions, given, "evaluate", flags=True)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data=str(place)), train=train)


def _check_alike(runs: Sequence[Location], configs: Sequence[Config], places: Sequence[Location]) -> None:
    """UserError where runs cannot be judged together: their tasks, pooled, would answer no question."""
    first = configs[0]
    manifest = Dataset.open(places[0])
    for i, (run, config, place) in enumerate(zip(runs, configs, places, strict=True)):
        other = Dataset.open(place)
        if run in runs[:i]:
            raise UserError(f"{run}: is named twice; name each run once")
        for what, mine, theirs in (
            ("method", config.method, first.method),
            ("protocol", config.data.protocol, first.data.protocol),
            ("dataset", other.name, manifest.name),
            ("number of interactions", other.interactions, manifest.interactions),
            ("set of protocol options", *(protocols.protocol_options(c.data) for c in (config, first))),
        ):
            if mine != theirs:
                raise UserError(
                    f"{run}: its {what} is {mine}, that of {runs[0]} is {theirs}; only runs of one method on one"
                    " dataset and protocol can be judged together, so evaluate these one by one"
                )


def evaluate(config: Config, run: Location, place: Location, dataset: Dataset, table: TaskTable) -> "Found":
    """Write RUN/evaluation.json and RUN/report.html from the run's best checkpoint, and print a table.

    Args:
        place: where `dataset` lies. table: its tasks, as the run was trained on.

    Returns:
        What the method measures, and each floor by name.

    Raises:
        UserError: there is no checkpoint, it is damaged, or of another split. RunError: a prediction is not finite.
    """
    from distmeta.parallel import assessment, launch

    if config.train.workers == "0":
        found = assessment.assess(config, run, dataset, place, table)
    else:
        _, found = launch.run_workers(config, run, table, learn=False)
    return write(config, run, dataset, table, found)


def write(config: Config, run: Location, dataset: Dataset, table: TaskTable, given: "Assessment") -> "Found":
    """Write RUN/evaluation.json, measured.arrow and report.html from what was measured, and print a table."""
    from distmeta.evaluation import contexts, facts, report
    from distmeta.evaluation import evaluate as evaluation
    from distmeta.parallel.validation import read_metrics

    measured, floors = given.method, given.floors
    (run / MEASURED).write_bytes(measured.to_ipc())
    found = evaluation.assemble(config.method, table, config.train.seed, measured, floors)
    place = Location.of(config.data.data)
    told = facts.summary(measured, table, dataset, place)
    if told := told | contexts.summary(measured.traits, table, dataset, place):
        found["facts"] = told
    (run / "evaluation.json").write_json(found)
    report.write(run, found, read_metrics(run), config_module.to_yaml(config), dataset, measured.errors)
    print(f"\nbest checkpoint: step {given.step}")
    print(terminal_table(found))
    if bayes := dataset.extra.get("bayes"):
        best = ", ".join(f"{metric} {value:.4f}" for metric, value in bayes.items())
        print(f"\nbest possible on this dataset, for one who knows every noise-free score: {best}")
    print(f"\nreport   {run / 'report.html'}")
    return measured, floors


def terminal_table(found: Mapping[str, Any]) -> str:
    """Metrics of the method and the floors, and the paired differences in MAE by cohort.

    Metrics are of the cohort `all`; where the protocol has cohorts of rows, also MAE and NDCG@3 of these; where it
    compares groups of users, also their errors and the t-test.
    """
    everyone = found["cohorts"]["all"]
    names = [m for m in _SHOWN if everyone.get(m) is not None]
    methods = {found["method"]: found["cohorts"], **found["floors"]}
    cells = [[name, *(_number(c["all"].get(m)) for m in names)] for name, c in methods.items()]
    ranked = f", {everyone['n_lists']:,} lists" if "n_lists" in everyone else ""
    lines = [f"{everyone['n_tasks']:,} unseen tasks{ranked}", *_aligned([["", *names], *cells])]
    by_row = [c for c, summary in found["cohorts"].items() if "n_rows" in summary]
    for metric in ("mae", "ndcg@3") if by_row else ():
        cells = [[name, *(_number(c.get(cohort, {}).get(metric)) for cohort in by_row)] for name, c in methods.items()]
        lines += ["", *_aligned([[f"{metric} of rows", *by_row], *cells])]
    for pair, mine in found.get("groups", {}).items():
        tests = {found["method"]: mine, **{floor: g[pair] for floor, g in found["floor_groups"].items()}}
        heads = [f"{pair}, MSE", *(f"{g} ({n:,})" for g, n in zip(pair.split("-"), mine["n"], strict=True)), "t", "p"]
        cells = [[name, *map(_number, (*test["mse"], test["t"], test["p"]))] for name, test in tests.items()]
        lines += ["", *_aligned([heads, *cells])]
    against, lead = list(found["paired"]), leading(found["cohorts"]["all"])
    if not against:
        return "\n".join(lines)
    rows = [[f"{_TOLD[lead]} minus that of", *against]]
    for cohort in found["cohorts"]:
        intervals = [found["paired"][floor].get(cohort, {}).get(lead) for floor in against]
        rows.append([cohort, *map(_interval, intervals)])
    return "\n".join([*lines, "", *_aligned(rows)])


def pooled_table(found: Sequence["Found"]) -> str:
    """Paired differences in MAE (or Recall@10) of several runs' tasks together, by cohort, to each floor."""
    from distmeta.evaluation.evaluate import pooled

    floors = found[0][1]
    together = pooled(found)
    lead = "mae" if all("mae" in metrics for metrics in together["all"].values()) else "recall@10"
    rows = [[f"{_TOLD[lead]} minus that of", *floors]]
    for cohort, differences in together.items():
        rows.append([cohort, *(_interval(differences[floor].get(lead)) for floor in floors)])
    return "\n".join(_aligned(rows))


def leading(summary: Mapping[str, Any]) -> str:
    """The metric that is told first: of scenarios Recall@10, else the MAE."""
    return "mae" if "mae" in summary else "recall@10"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _interval(values: Sequence[float | None] | None) -> str:
    """A difference with its interval, which a single task does not have."""
    shown = ["–" if v is None else f"{v:+.4f}" for v in values or (None,)]
    return shown[0] if len(shown) == 1 or shown[1] == "–" else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
