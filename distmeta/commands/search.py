"""`search`: tune methods on validation with Ray Tune; write the best config and a table of the trials."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distmeta import config as config_module
from distmeta.cli import Parser
from distmeta.commands import search_plan, train
from distmeta.commands.search_plan import DEFAULTS, Tuned
from distmeta.errors import UserError
from distmeta.fields import add_share
from distmeta.methods import entry
from distmeta.parallel import rundir, submitted
from distmeta.storage import Location

if TYPE_CHECKING:
    import optuna

    from distmeta.data.schema import Dataset
    from distmeta.data.tasktable import TaskTable

_EPILOG = """\
examples:
  python -m tune.search melu --data data/ml-1m --protocol melu --trials 40 --out searches/first
  python -m tune.search melu hml --data data/ml-1m --trials 20 --out searches/two --set batch-size=32
  python -m tune.search --out searches/first --resume
  python -m jobs.train --config searches/first/melu/best.yaml --run runs/tuned

What trials are stopped by is epochs. With --set epoch-tasks=N an epoch is N tasks: trials are judged by tasks seen,
then by epochs.

OUT/journal.log (of a URI: the parts in OUT/journal) is an Optuna journal with a study for each method.
"""
_NUMBERS = (
    ("trials", int, "trials of each method, failed ones among them"),
    ("epochs", int, "epochs of a trial, at most"),
    ("grace", int, "epochs of every trial before it may be stopped"),
    ("threads", int, "CPUs of a trial; as many trials run at a time as there is room for"),
    ("workers-per-trial", int, "Ray Train workers of a trial, of --threads CPUs each; 0: it is one process"),
    ("seed", int, "of the sampler, and of training"),
    ("seeds", int, "trainings of a trial that is not stopped, from --seed on; it is judged by their mean"),
    ("failures", float, "share of the trials that may fail; beyond it the search stops"),
    ("wait", int, "seconds to wait for a node that has room for a trial"),
)


def main(argv: Sequence[str]) -> int:
    """Run `search`; 0 when every method's best config is there.

    Raises:
        UserError: usage or bad input. RunError: more trials failed than may.
    """
    given = _parser().parse(argv)
    submitted.check("--out", given.out)
    out = Location.of(given.out)
    if "data" in given:
        submitted.check("--data", given.data)
    asked = search_plan.settle(vars(given), out)
    if not asked.data:
        submitted.check("--data", "")
    plans = [Tuned.of(method, asked) for method in asked.methods]
    if not asked.resume:
        _check_new(out)
    from distmeta.parallel import hosting

    hosting.check_room(asked.workers_per_trial, asked.threads, asked.gpu)
    place = Location.of(asked.data) if asked.data else train.small()
    searches = [_Search.of(plan, place, asked) for plan in plans]
    out.make_dir()
    with rundir.lock(out):
        if not asked.resume:
            _check_new(out)
        kept = {k: v for k, v in vars(asked).items() if k not in ("resume", "out")}
        (out / "search.json").write_json(kept)
        return _search(asked, out, searches)


def _parser() -> Parser:
    parser = Parser(
        prog="search",
        usage="search METHOD [METHOD ...] --out OUT [flags]",
        description="Find better settings of methods by their validation error, with Ray Tune and Optuna.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("methods", nargs="*", default=[], metavar="METHOD", help="methods to tune, one after the other")
    add("--out", required=True, metavar="OUT", help="folder of the search")
    add("--data", help="dataset; default: a small synthetic one")
    add("--protocol", help="what becomes a task, as of train [cmml-user]")
    for name, kind, text in _NUMBERS:
        add(f"--{name}", type=kind, help=f"{text} [{DEFAULTS[name.replace('-', '_')]}]")
    add("--metric", help="of validation, that trials are judged by: mae or mse, recall@10 or recall@50 of scenarios; of"
        " the epoch that training keeps, which is that of the best mae or recall@10 [the first of them]")  # fmt: skip
    add("--sampler", help=f"who proposes: {' '.join(search_plan.SAMPLERS)}; gp thinks for seconds a trial [tpe]")
    flag = argparse.BooleanOptionalAction
    add("--pruning", action=flag, help="stop trials that fall behind, by ASHA [all but --pareto]")
    add("--pareto", action=flag, help="two objectives: validation error, and seconds of training [False]")
    add_share(parser, "gpu", 1.0, "of a GPU for each trial (or worker of it): 0.25: four trials share one [0]")
    add("--set", action="append", metavar="[METHOD:]FLAG=VALUE",
        help="a flag of train for every trial; what it sets is not tuned")  # fmt: skip
    add("--resume", action="store_true", default=False, help="go on with the search in OUT; --trials may be more")
    add("--retried", action="store_true", help="for a job that may be started again: go on with the search in OUT where"
        " there is one (as --resume does), else begin it")  # fmt: skip
    return parser


def _check_new(out: Location) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, not a folder; choose another --out")
    if (out / "search.json").exists():
        raise UserError(f"{out}: a search exists here; add --resume to go on with it, or choose another --out")
    others = [c.name for c in out.children()] if out.exists() else []
    others = [n for n in others if n != ".lock" and not n.startswith("search.json.tmp-")]  # of one killed at its start
    if others:
        raise UserError(f"{out}: holds other things ({others[0]}); choose an --out that is empty or does not exist")


class _Search:
    """What one method is tuned on."""

    def __init__(self, plan: Tuned, place: Location, dataset: "Dataset", table: "TaskTable", metric: str) -> None:
        self.plan, self.place, self.dataset, self.table, self.metric = plan, place, dataset, table, metric

    @classmethod
    def of(cls, plan: Tuned, place: Location, asked: argparse.Namespace) -> "_Search":
        """UserError where the method, or what is asked, does not suit the dataset."""
        dataset, table = train.opened(plan.config({}, str(place)), place)
        if dataset.label.kind == "click":
            plan = plan.without({"query_loss"}, "a loss of its own that clicks have")
        elif entry(plan.method).clicks_only:
            raise UserError(f"{place}: {plan.method} counts clicks and the labels are ratings; leave it out")
        return cls(plan, place, dataset, table, search_plan.metric(asked, table.scenarios, table.protocol))


def _search(asked: argparse.Namespace, out: Location, searches: Sequence[_Search]) -> int:
    from distmeta.parallel import hosting

    winners: list[Location] = []
    (out / ".ray").remove()
    with hosting.connected(asked.threads, asked.gpu, asked.wait, asked.workers_per_trial):
        for search in searches:
            winners.append(_tune(asked, out, search))
    (out / ".ray").remove()
    for run in winners:  # trained to its end: what is left of it is the test, which no other trial sees
        words = ["--run", str(run), "--resume"]
        if asked.gpu and not asked.workers_per_trial:
            words.append("--no-gpu")  # it is measured in this process, which has none of its own
        train.main(words)
    return 0


def _tune(asked: argparse.Namespace, out: Location, search: _Search) -> Location:
    """Search for one method; the run of its best trial."""
    from distmeta.commands import search_pages, search_study
    from distmeta.parallel import hosting, tally, trials

    plan, method = search.plan, search.plan.method
    study = search_study.opened(
        out, method, asked.sampler, asked.seed, plan.first(), pareto=asked.pareto, tasks=search.table.split_hash
    )
    where = (out / method).make_dir()
    print(f"{method} on {search.dataset.name}, {search.table.protocol}, {asked.trials} trials -> {where}")

    def ask(trial: "optuna.Trial") -> tuple[str, dict[str, Any]]:
        name = f"{trial.number:04d}"
        config = plan.config(search_study.suggest(trial, plan.space), str(search.place), str(where / name))
        return name, config_module.plain(config)

    shared = hosting.share(search.table, search.dataset, plan.config({}, str(search.place)))
    wanted = trials.Plan(
        method, asked.trials, asked.epochs, asked.failures, asked.pruning, asked.grace, asked.threads,
        shared, asked.gpu, search.metric, asked.seeds, asked.workers_per_trial,
    )  # fmt: skip
    cpus = asked.threads * max(asked.workers_per_trial, 1)
    try:
        trials.search(study, wanted, ask, (out / ".ray").make_dir())
    finally:
        search_study.write_trials(study, where)
        search_pages.write(study, out, asked.methods, search.dataset.name, search.table.protocol, cpus)
    best = search_study.write_best(study, where, f"{search.dataset.name}, protocol {search.table.protocol}")
    print(f"{tally.summary(study, cpus)}\n{method}: best config {where / 'best.yaml'}")
    return where / best.user_attrs["run"]
