"""`benchmark methods`: users a second that each method trains end to end, input and meta-update included."""

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distmeta.cli import Parser
from distmeta.commands import train
from distmeta.commands.settings import Setting, inner_steps, told_steps
from distmeta.config import Config, DataOptions
from distmeta.errors import UserError
from distmeta.fields import add_flags, build
from distmeta.methods import entry
from distmeta.storage import Location

if TYPE_CHECKING:
    from distmeta.data.schema import Dataset
    from distmeta.data.tasktable import TaskTable

_TAKEN = ("data", "steps", "patience", "epochs", "batch-size", "threads", "run", "resume", "retried", "workers")
"""Flags of `train` that the benchmark itself sets."""

Turns = Sequence[dict[str, Any]]
"""What each round measured of one case."""


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure, print a table, and give its rows (design §8).

    Raises:
        UserError: usage, or no dataset at --data.
    """
    parser = Parser(
        prog="benchmark methods",
        description="Trains each method for some epochs with the real loop (prefetch, meta-update, validation,"
        " checkpoints) and gives the median tasks a second (and their rows, of support and query) of the epochs after"
        " the first, validation and checkpoints left out, and the share of that time spent waiting for input. With"
        " --rounds the methods take turns, and each is compared with the first of them by the median of the rounds'"
        " ratios. A feed-forward method, which has no inner steps, is measured once whatever --steps says, and compared"
        " with the first at each of them.",
    )
    add_flags(parser, DataOptions, "data")
    group = parser.add_argument_group("measurement")
    group.add_argument("--methods", nargs="+", default=["melu", "metacs"], metavar="METHOD", help="[melu metacs]")
    group.add_argument("--steps", type=int, nargs="+", default=[1, 5], metavar="K", help="inner steps [1 5]")
    group.add_argument("--epochs", type=int, default=4, metavar="N", help="epochs of each, at least 2 [4]")
    group.add_argument("--rounds", type=int, default=1, metavar="N", help="turns of each method [1]")
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="tasks a meta-update [64]")
    group.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads [1]")
    group.add_argument(
        "--set", nargs="+", default=[], metavar="[METHOD:]FLAG[=VALUE]", help="flags of train: metacs:hidden=200,100"
    )
    args = vars(parser.parse(argv))
    if args["epochs"] < 2 or min(args[k] for k in ("threads", "batch_size", "rounds")) < 1:
        raise UserError(
            "benchmark methods: --epochs must be at least 2, --threads, --batch-size and --rounds at least 1"
        )
    if not args.get("data"):
        raise UserError("benchmark methods: give --data DATASET, made by `python -m jobs.prepare`")
    cases = _cases(args)
    rounds = [[_measure(config) for config in cases] for _ in range(args["rounds"])]
    turns = list(zip(*rounds, strict=True))
    return [_show(_median(mine, _firsts(mine[0], turns))) for mine in turns]


def _cases(args: Mapping[str, Any]) -> list[Config]:
    """What takes turns: each method with each number of steps, a feed-forward one once."""
    names = {f.name for f in dataclasses.fields(DataOptions)}
    data = build(DataOptions, {k: v for k, v in args.items() if k in names}, "benchmark methods", flags=True)
    methods = args["methods"]
    inner = {m: inner_steps(m, "benchmark methods") for m in methods}
    settings = [Setting.of(text, "benchmark methods", _TAKEN) for text in args["set"]]
    for s in settings:
        if not any(s.meant_for("", m) for m in methods):
            raise UserError(f"benchmark methods: --set {s.text}: none of {' '.join(methods)} has that flag")
    configs = []
    for i, steps in enumerate(args["steps"]):
        for m in methods if i == 0 else [m for m in methods if inner[m]]:
            flags = {"patience": 0, **{k: args[k] for k in ("epochs", "batch_size", "threads")}}
            flags |= {"steps": steps} if inner[m] else {}
            words = [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", str(v))]
            chosen = [w for s in settings if s.meant_for("", m) for w in s.argv()]
            config = train.parse([m, "--data", data.data, *words, *_own(m), *chosen])
            configs.append(dataclasses.replace(config, data=data))
    return configs


def _own(method: str) -> list[str]:
    """hml: the first epoch, which is not counted, is the common start's, the others the clusters'."""
    return ["--warm-epochs", "1"] if hasattr(entry(method).options, "warm_epochs") else []


def _firsts(mine: dict[str, Any], turns: Sequence[Turns]) -> dict[str, Turns]:
    """What a case is compared with: the first method's with as many steps, or of a feed-forward one with each."""
    first = [t for t in turns if t[0]["variant"] == turns[0][0]["variant"]]
    if mine["variant"] == first[0][0]["variant"]:
        return {}
    alike = [t for t in first if t[0]["case"] == mine["case"]] or first
    return {t[0]["variant"] if len(alike) == 1 else f"{t[0]['variant']} {t[0]['steps']}": t for t in alike}


def _median(turns: Turns, others: Mapping[str, Turns]) -> dict[str, Any]:
    """One row of a case's rounds, beside the same rounds of others."""
    middle = {k: statistics.median(turn[k] for turn in turns) for k in ("value", "rows_per_s", "input_share")}
    ratios = {
        name: statistics.median(mine["value"] / other["value"] for mine, other in zip(turns, theirs, strict=True))
        for name, theirs in others.items()
    }
    return {**turns[0], **middle, "ratio_to": ratios}


def _show(r: dict[str, Any]) -> dict[str, Any]:
    ratio = "".join(f"  {value:.2f} of {other}" for other, value in r["ratio_to"].items())
    speed = f"{r['value']:>8,.0f} {r['unit']} {r['rows_per_s']:>9,.0f} rows/s"
    print(f"{r['case']:<44} {r['variant']:<12} {speed}  input {r['input_share']:.1%}{ratio}")
    return r


def _measure(config: Config) -> dict[str, Any]:
    from distmeta.data import protocols, tasktable
    from distmeta.data.schema import Dataset
    from distmeta.parallel import trainer
    from distmeta.parallel.validation import read_metrics

    place = Location.of(config.data.data)
    dataset = Dataset.open(place)
    options = protocols.protocol_options(config.data)
    table = tasktable.make(place, config.data.protocol, config.data.split_seed, options)
    with tempfile.TemporaryDirectory() as folder:
        run = Location.of(folder)
        trainer.train(config, run, dataset, place, table, log=lambda line: None)
        lines = read_metrics(run)[1:]
    train, steps = table.counts["train"], told_steps(config)
    speed = statistics.median(line["tasks_per_s"] for line in lines)
    return {
        "benchmark": "methods",
        "case": f"{dataset.name} {config.data.protocol} {train['rows'] / train['tasks']:.0f} rows, {steps}",
        "variant": config.method,
        "steps": steps,
        "value": speed,
        "unit": "tasks/s",
        "rows_per_s": speed * _rows_a_task(config, table, dataset),
        "ratio_to": {},
        "batch_size": config.train.batch_size,
        "input_share": statistics.median(_input_share(line) for line in lines),
    }


def _rows_a_task(config: Config, table: "TaskTable", dataset: "Dataset") -> float:
    """Support and query rows that training sees of a task in an epoch: the mean over tasks."""
    from distmeta.data.loader import Loader

    o, rows, seen = config.train, 0, 0
    drawn = dataclasses.replace(table, query_rows=o.query_rows or table.query_rows)
    tasks = Loader(drawn, dataset, "train", o.batch_size, redraw=o.redraw_query)
    for batch in tasks.epoch(0):
        seen += len(batch)
        rows += sum(int(side.mask.sum()) for block in batch for side in (block.support, block.query))
    return rows / seen


def _input_share(line: dict[str, Any]) -> float:
    return line["input_s"] / sum(line[f"{p}_s"] for p in ("input", "adapt", "backward", "exchange", "optimizer"))
