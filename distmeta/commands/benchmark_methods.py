"""`benchmark methods`: users a second that each method trains end to end, input and meta-update included."""

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from distmeta.cli import Parser
from distmeta.config import Config, DataOptions, load
from distmeta.errors import UserError
from distmeta.fields import add_flags, build
from distmeta.methods import METHODS, entry
from distmeta.storage import Location


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure, print a table, and give its rows (design §8).

    Raises:
        UserError: usage, or no dataset at --data.
    """
    parser = Parser(
        prog="benchmark methods",
        description="Trains each method for some epochs with the real loop (prefetch, meta-update, validation,"
        " checkpoints) and gives the median users a second of the epochs after the first, validation and checkpoints"
        " left out, and the share of that time spent waiting for input.",
    )
    add_flags(parser, DataOptions, "data")
    group = parser.add_argument_group("measurement")
    group.add_argument("--methods", nargs="+", default=["melu", "metacs"], metavar="METHOD", help="[melu metacs]")
    group.add_argument("--steps", type=int, nargs="+", default=[1, 5], metavar="K", help="inner steps [1 5]")
    group.add_argument("--epochs", type=int, default=4, metavar="N", help="epochs of each, at least 2 [4]")
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="tasks a meta-update [64]")
    group.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads [1]")
    args = vars(parser.parse(argv))
    if args["epochs"] < 2 or args["threads"] < 1 or args["batch_size"] < 1:
        raise UserError("benchmark methods: --epochs must be at least 2, --threads and --batch-size at least 1")
    if not args.get("data"):
        raise UserError("benchmark methods: give --data DATASET, made by `python -m jobs.prepare`")
    names = {f.name for f in dataclasses.fields(DataOptions)}
    data = build(DataOptions, {k: v for k, v in args.items() if k in names}, "benchmark methods", flags=True)
    rows = []
    for method in args["methods"]:
        if not hasattr(entry(method).options, "steps"):
            learned = " ".join(m for m, e in METHODS.items() if hasattr(e.options, "steps"))
            raise UserError(f"benchmark methods: {method} has no inner steps; methods that have: {learned}")
        for steps in args["steps"]:
            flags = {"steps": steps, "patience": 0, **{k: args[k] for k in ("epochs", "batch_size", "threads")}}
            rows.append(_measure(dataclasses.replace(load(None, method, flags), data=data)))
            r = rows[-1]
            print(f"{r['case']:<40} {r['variant']:<8} {r['value']:>8,.0f} {r['unit']}  input {r['input_share']:.1%}")
    return rows


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
    train, steps = table.counts["train"], config.method_options.steps
    return {
        "benchmark": "methods",
        "case": f"{dataset.name} {config.data.protocol} {train['rows'] / train['tasks']:.0f} rows, {steps} steps",
        "variant": config.method,
        "value": statistics.median(line["tasks_per_s"] for line in lines),
        "unit": "tasks/s",
        "ratio_to": {},
        "batch_size": config.train.batch_size,
        "input_share": statistics.median(_input_share(line) for line in lines),
    }


def _input_share(line: dict[str, Any]) -> float:
    return line["input_s"] / sum(line[f"{p}_s"] for p in ("input", "adapt", "backward", "exchange", "optimizer"))
