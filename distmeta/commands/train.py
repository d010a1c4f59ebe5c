"""`train`: meta-train a method, evaluate its best checkpoint against the floors, write the report."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from distmeta import config as config_module
from distmeta.cli import Parser
from distmeta.config import Config, DataOptions, TrainOptions
from distmeta.errors import UserError
from distmeta.fields import add_flags, build
from distmeta.methods import FLOORS, METHODS, entry
from distmeta.parallel import rundir, submitted
from distmeta.storage import Location

if TYPE_CHECKING:
    from distmeta.data.schema import Dataset
    from distmeta.data.tasktable import TaskTable

SMALL = "runs/data/synthetic-small"
"""Where the dataset of a run without --data lies."""
SMALL_DEFAULTS = {"batch_size": 8, "item_ids": True}
"""What suits 432 training tasks better than the defaults; flags and --config win."""

_EPILOG = """\
methods: {methods}
`train METHOD --help` shows a method's own options.

examples:
  python -m jobs.train
  python -m jobs.train melu --data data/ml-1m --protocol melu --run runs/first --epochs 20
  python -m jobs.train --config runs/first/config.yaml --seed 1 --run runs/second
  python -m jobs.train --run runs/first --resume
  python -m jobs.train melu --data /mnt/store/ml-1m --run /mnt/store/runs/first --retried
"""


def main(argv: Sequence[str]) -> int:
    """Run `train`; 0 when the report is there.

    Raises:
        UserError: usage or bad input. RunError: the run failed.
    """
    config = parse(argv)
    submitted.check("--run", config.train.run)
    submitted.check("--data", config.data.data)
    from distmeta import process

    run = Location.of(config.train.run) if config.train.run else None
    if run and not config.train.resume:
        rundir.check_new(run)
    place = Location.of(config.data.data) if config.data.data else small()
    dataset, table = opened(config, place)
    run = run or rundir.default(config.method, dataset.name)
    config = _settled(config, run, place)
    process.prepare(config.train.threads)
    run.make_dir()
    with rundir.lock(run) as fence:
        if not config.train.resume:
            rundir.check_new(run)
        return _drive(config, run, place, dataset, table, fence)


def opened(config: Config, place: Location) -> tuple["Dataset", "TaskTable"]:
    """The dataset at `place` as its tasks are seen, and the task table that `config` asks for, made on first use.

    Raises:
        UserError: there is none, or it is damaged; the method does not learn what it holds.
    """
    from distmeta.data import protocols, tasktable
    from distmeta.data.schema import Dataset

    dataset = Dataset.open(place)
    if dataset.label.kind not in FLOORS:
        learned = " and ".join(FLOORS)
        raise UserError(
            f"{place}: its labels are of kind {dataset.label.kind}; the methods here learn {learned} labels"
        )
    table = tasktable.make(place, config.data.protocol, config.data.split_seed, protocols.protocol_options(config.data))
    if table.scenarios and not entry(config.method).scenarios:
        raise UserError(
            f"{config.method} learns users and the tasks of protocol {table.protocol} are scenarios; choose a protocol"
            f" of users, or a method that learns scenarios: {' '.join(n for n, e in METHODS.items() if e.scenarios)}"
        )
    if not table.scenarios and not entry(config.method).users:
        raise UserError(
            f"{config.method} learns scenarios and the tasks of protocol {table.protocol} are users; give --protocol"
            " cmml-scenario"
        )
    dataset = table.seen(dataset)
    dataset.without(config.data.leave_out)  # names a field that it has not before there is a run
    return dataset, table


def parse(argv: Sequence[str]) -> Config:
    """The config that `train`'s arguments ask for; a resumed run's own config stands in for the defaults.

    With --retried, `train.resume` of the result says whether there is a run to go on with.

    Raises:
        UserError: usage; or --resume and no run there, or one started with other settings.
    """
    argv = list(argv)
    method = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if method:
        entry(method)
    early, file = _early(argv)
    base = _base(early)
    name = method or (config_module.read_yaml(file).get("method") if file else None)
    name = str(name or (base.method if base else "melu"))
    bare = not (method or file or base)
    parser = _parser(name, shown=not (bare and {"-h", "--help"} & set(argv)))
    flags = vars(parser.parse(argv))
    flags.pop("config", None)
    config = config_module.load(file, method, flags, base)
    if not config.data.data and not file:
        known = {f.name for c in (config.train, config.method_options) for f in dataclasses.fields(c)}
        small = {k: v for k, v in SMALL_DEFAULTS.items() if k in known}
        config = config_module.load(None, method, {**small, **flags}, base)
    if base:
        rundir.check_same(Location.of(early["run"]), config)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, resume=base is not None, retried=False))


def _early(argv: Sequence[str]) -> tuple[dict[str, Any], Location | None]:
    """--run, --resume and --retried, as flags or in the file of --config, and that file: they say which method's flags
    the rest may be."""
    parser = Parser(prog="train", add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config")
    parser.add_argument("--run")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    parser.add_argument("--retried", action=argparse.BooleanOptionalAction)
    flags = vars(parser.parse_known_args(argv)[0])
    file = Location.of(flags["config"]) if flags.get("config") else None
    kept = config_module.read_yaml(file).get("train", {}) if file else {}
    return {**vars(build(TrainOptions, kept, f"{file}, section train")), **flags}, file


def _base(early: dict[str, Any]) -> Config | None:
    """The config of the run to go on with, where that is asked for and, with --retried, there is one."""
    asked = next((name for name in ("resume", "retried") if early.get(name)), None)
    if not asked:
        return None
    if not early.get("run"):
        raise UserError(f"train: --{asked} needs --run RUN, the directory of the run to go on with")
    submitted.check("--run", early["run"])
    run = Location.of(early["run"])
    return rundir.stored(run) if asked == "resume" or rundir.begun(run) else None


def _parser(method: str, shown: bool) -> Parser:
    """The flags of `train METHOD`, the method's own among them where they are `shown`."""
    chosen = entry(method)
    parser = Parser(
        prog=f"train {method}" if shown else "train",
        usage=f"train {method if shown else '[METHOD]'} [--config FILE] [flags]",
        description="Meta-train a method, evaluate its best checkpoint on unseen tasks against the floors,\n"
        "and write the report. Without arguments: MeLU on a small synthetic dataset.",
        epilog=_EPILOG.format(methods=" ".join(METHODS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML with the sections method, data, train, method_options (a RUN/config.yaml, say); flags win",
    )
    add_flags(parser, DataOptions, "data")
    add_flags(parser, TrainOptions, "training")
    if shown:
        add_flags(parser, chosen.options, f"{method}: {(chosen.options.__doc__ or '').strip().rstrip('.')}")
    return parser


def _settled(config: Config, run: Location, place: Location) -> Config:
    """The config as the run keeps it: where everything lies, and how many threads it computes with."""
    from distmeta.process import cores

    threads = config.train.threads or _threads(config.train.workers)
    if config.train.workers == "0" and threads > cores():
        print(
            f"{threads} threads on {cores()} cores: slower, but the same to the last bit as where there are as many;"
            f" --threads {cores()} suits this machine"
        )
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data=str(place)),
        train=dataclasses.replace(config.train, run=str(run), threads=threads),
    )


def _threads(workers: str) -> int:
    """CPU threads of each worker where --threads leaves them open."""
    from distmeta.process import cores

    if workers == "0":
        return cores()
    return 1 if os.environ.get("RAY_ADDRESS") else max(1, cores() // int(workers.split(":")[-1]))


def small() -> Location:
    """The small synthetic dataset, made where it does not exist yet."""
    from distmeta.data.sources import synthetic

    where = Location.of(SMALL)
    if (where / "dataset.json").exists():
        print(f"no --data: the small synthetic dataset at {SMALL}")
    else:
        made = synthetic.generate(where)
        print(f"no --data: made a small synthetic dataset, {made.users:,} users, at {SMALL}")
    return where


def _drive(
    config: Config, run: Location, place: Location, dataset: "Dataset", table: Any, fence: Callable[[], None]
) -> int:
    """Train, evaluate and finish the run that this process holds.

    Args:
        fence: raises where it does so no longer.
    """
    from distmeta.commands import evaluate
    from distmeta.parallel import assessment, checkpoint, launch, trainer

    before = checkpoint.newest(run)
    if before:
        checkpoint.check_origin(run, before, config, table.split_hash)
    elif config.train.resume:
        print(f"{run}: has no complete checkpoint yet; starting from the beginning")
    finish = run / "run.json"
    summary = finish.read_json("delete it and go on with --resume") if finish.exists() else None
    finish.remove()
    (run / "config.yaml").write_bytes(
        config_module.to_yaml(
            dataclasses.replace(config, train=dataclasses.replace(config.train, resume=False))
        ).encode()
    )
    print(f"{config.method} on {dataset.name}, {table.protocol}, split {table.split_hash[:12]} -> {run}")
    found = None
    if config.train.workers == "0":
        outcome = trainer.train(config, run, dataset, place, table, fence=fence)
    else:
        outcome, found = launch.run_workers(config, run, table)
        assert outcome
        fence()
    if summary and before and before.step == outcome.steps:
        finish.write_json(summary)
        print(f"{run}: was finished already (best step {outcome.best_step}); report: {run / 'report.html'}")
        return 0
    evaluate.write(config, run, dataset, table, found or assessment.assess(config, run, dataset, place, table))
    summary = {
        "status": "finished",
        "method": config.method,
        **dataclasses.asdict(outcome),
        "split_hash": table.split_hash,
        "dataset": {
            "name": dataset.name,
            "location": str(place),
            "users": dataset.users,
            "items": dataset.items,
            "interactions": dataset.interactions,
        },
        "versions": checkpoint.versions(),
    }
    finish.write_json(summary)
    return 0
