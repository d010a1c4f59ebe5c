"""`benchmark scaling`: what Ray workers on this machine gain, against as many independent processes."""

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distmeta.cli import Parser
from distmeta.commands import scaling_nodes
from distmeta.commands.scaling_runs import bare, speed, steps, train
from distmeta.commands.settings import inner_steps, told_steps
from distmeta.config import Config, DataOptions, load
from distmeta.errors import UserError
from distmeta.fields import add_flags, build
from distmeta.storage import Location

_FLAGS = {
    "steps": (1, 1, "inner steps, of a method that has any"),
    "batch_size": (512, 1, "tasks a meta-update of a process by itself"),
    "epochs": (12, 4, "epochs of each training"),
    "turns": (3, 1, "how often each variant is run; they alternate"),
    "workers": (2, 1, "Ray workers, and independent processes, of one thread each"),
    "nodes": (1, 1, "instead: the workers spread over N nodes of this machine, against all of them on one"),
}
"""Default, least and meaning."""


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure, print a table, and give its rows (design §8).

    Raises:
        UserError: usage, no dataset at --data, too few cores. RunError: a training failed, or was too short.
    """
    parser = Parser(
        prog="benchmark scaling",
        description="Runs `jobs.train` with one thread a process: one alone, --workers that are independent of each"
        " other and run at the same time, and --workers Ray workers on a cluster of their own on this machine: with as"
        " many tasks of each batch for a worker as a process by itself has, and (`one batch`) sharing a batch of as"
        " many. Gives users a second (the median epoch after the first, validation left out; independent"
        " ones: the sum, of epochs in which all of them trained), where the seconds of a step go, and what a start"
        " takes beside that of a bare TorchTrainer.fit(). With --nodes N instead: what they lose when they are spread"
        " over a cluster of N nodes, all on this machine, and whether they come to the same parameters.",
    )
    add_flags(parser, DataOptions, "data")
    group = parser.add_argument_group("measurement")
    group.add_argument("--method", default="melu", metavar="METHOD", help="[melu]")
    for name, (default, _, text) in _FLAGS.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} [{default}]")
    args = vars(parser.parse(argv))
    for name, (_, least, _) in _FLAGS.items():
        if args[name] < least:
            raise UserError(f"benchmark scaling: --{name.replace('_', '-')} must be at least {least}")
    if args["workers"] % args["nodes"]:
        raise UserError(
            f"benchmark scaling: --workers {args['workers']} are not as many on each of {args['nodes']} nodes"
        )
    if not args.get("data"):
        raise UserError("benchmark scaling: give --data DATASET, made by `python -m jobs.prepare`")
    inner = {"steps": args["steps"]} if inner_steps(args["method"], "benchmark scaling") else {}
    names = {f.name for f in dataclasses.fields(DataOptions)}
    data = build(DataOptions, {k: v for k, v in args.items() if k in names}, "benchmark scaling", flags=True)
    flags = {"patience": 0, "threads": 1, **inner, **{k: args[k] for k in ("epochs", "batch_size")}}
    config = dataclasses.replace(load(None, args["method"], flags), data=data)
    case = _case(config)
    if args["nodes"] > 1:
        return scaling_nodes.rows(case, config, args["nodes"], args["workers"], args["turns"])
    rows = _rows(case, config, args["workers"], args["turns"])
    _show(rows)
    return rows


def _case(config: Config) -> str:
    """What is trained on; its task table is made, not by all trainings at once."""
    from distmeta.data import protocols, tasktable
    from distmeta.data.schema import Dataset

    place = Location.of(config.data.data)
    dataset = Dataset.open(place)
    options = protocols.protocol_options(config.data)
    train = tasktable.make(place, config.data.protocol, config.data.split_seed, options).counts["train"]
    return (
        f"{dataset.name} {config.data.protocol} {train['rows'] / train['tasks']:.0f} rows, {config.method}"
        f" {told_steps(config)}, {config.train.batch_size} tasks a batch"
    )


def _rows(case: str, config: Config, workers: int, turns: int) -> list[dict[str, Any]]:
    found = []
    for turn in range(turns):
        print(f"turn {turn + 1} of {turns}", flush=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            found.append(_turn(config, workers, Path(folder)))
    return [*_speeds(case, workers, found), *_starts(workers, found)]


def _turn(config: Config, workers: int, folder: Path) -> dict[str, Any]:
    """Runs of each variant, and the seconds of a bare `fit()` as `bare`."""
    larger = dataclasses.replace(config.train, batch_size=workers * config.train.batch_size)
    return {
        "one": train(config, folder, ["0"]),
        "independent": train(config, folder, ["0"] * workers),
        "workers": train(dataclasses.replace(config, train=larger), folder, [str(workers)]),
        "one batch": train(config, folder, [str(workers)]),
        "bare": bare(workers, folder),
    }


def _speeds(case: str, workers: int, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of the turns; a ratio is the median of the turns' ratios, as the machine's speed drifts."""
    runs = {variant: [t[variant] for t in turns] for variant in ("one", "independent", "workers", "one batch")}
    speeds = {variant: list(map(speed, several)) for variant, several in runs.items()}
    rows = []
    for variant, mine in speeds.items():
        others = {"one": [], "independent": ["one"]}.get(variant, ["one", "independent"])
        rows.append(
            {
                "benchmark": "scaling",
                "case": case,
                "variant": variant,
                "value": statistics.median(mine),
                "unit": "tasks/s",
                "ratio_to": {o: statistics.median(a / b for a, b in zip(mine, speeds[o], strict=True)) for o in others},
                "processes": 1 if variant == "one" else workers,
                **steps([run for several in runs[variant] for run in several]),
            }
        )
    return rows


def _starts(workers: int, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds from a command's start: of training to its first step, of a bare `fit()` to its workers' first line.

    `added_s` so counts all that is ours: reading the tasks, handing them out, the model, signs of life.
    """
    ours, bare = [t["workers"][0].start() for t in turns], [t["bare"] for t in turns]
    row = {"benchmark": "scaling", "case": f"start of {workers} workers", "unit": "s"}
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    added = statistics.median(a - b for a, b in zip(ours, bare, strict=True))
    return [
        {**row, "variant": "bare", "value": statistics.median(bare), "ratio_to": {}},
        {**row, "variant": "workers", "value": statistics.median(ours), "ratio_to": {"bare": ratio}, "added_s": added},
    ]


def _show(rows: Sequence[dict[str, Any]]) -> None:
    *speeds, bare, start = rows
    print(f"\n{speeds[0]['case']}\n{'':<16} {'tasks/s':>10} {'x one':>7} {'x independent':>14}")
    for r in speeds:
        ratios = [f"{r['ratio_to'][o]:.2f}" if o in r["ratio_to"] else "" for o in ("one", "independent")]
        name = r["variant"] if r["processes"] == 1 else f"{r['processes']} {r['variant']}"
        print(f"{name:<16} {r['value']:>10,.0f} {ratios[0]:>7} {ratios[1]:>14}".rstrip())
    print(f"\n{'ms of a step':<16}" + "".join(f"{p:>12}" for p in speeds[0]["step_ms"]))
    for r in speeds:
        print(f"{r['variant']:<16}" + "".join(f"{ms:>12.2f}" for ms in r["step_ms"].values()))
        if r["ratio_to"].get("independent"):
            print(f"{'':<16}" + "".join(f"{v / r['step_ms']['all']:>12.1%}" for v in r["step_ms"].values()))
    print(f"checkpoints: {speeds[2]['checkpoint_share']:.1%} of the training time of the worker that writes them")
    added = f"{start['value']:.1f} s after the start; of a bare fit() {bare['value']:.1f} s: {start['added_s']:+.1f} s"
    print(f"first step {added}")
