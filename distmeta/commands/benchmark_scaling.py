"""`benchmark scaling`: what Ray workers on this machine gain, against as many independent processes."""

import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distmeta import config as config_module
from distmeta.cli import Parser
from distmeta.commands.settings import inner_steps, told_steps
from distmeta.config import Config, DataOptions, load
from distmeta.errors import RunError, UserError
from distmeta.fields import add_flags, build
from distmeta.storage import Location

_LOOK = 0.1
"""Seconds between looks at a run's metrics."""
_END_S = 60
"""Seconds within which a process must end that was told to."""
_SECONDS = ("input", "adapt", "backward", "exchange", "optimizer", "checkpoint")
_FLAGS = {
    "steps": (1, 1, "inner steps, of a method that has any"),
    "batch_size": (512, 1, "tasks a meta-update of a process by itself"),
    "epochs": (12, 4, "epochs of each training"),
    "turns": (3, 1, "how often each variant is run; they alternate"),
    "workers": (2, 1, "Ray workers, and independent processes, of one thread each"),
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
        " takes beside that of a bare TorchTrainer.fit().",
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
    if not args.get("data"):
        raise UserError("benchmark scaling: give --data DATASET, made by `python -m jobs.prepare`")
    inner = {"steps": args["steps"]} if inner_steps(args["method"], "benchmark scaling") else {}
    names = {f.name for f in dataclasses.fields(DataOptions)}
    data = build(DataOptions, {k: v for k, v in args.items() if k in names}, "benchmark scaling", flags=True)
    flags = {"patience": 0, "threads": 1, **inner, **{k: args[k] for k in ("epochs", "batch_size")}}
    config = dataclasses.replace(load(None, args["method"], flags), data=data)
    rows = _rows(config, args["workers"], args["turns"])
    _show(rows)
    return rows


def _rows(config: Config, workers: int, turns: int) -> list[dict[str, Any]]:
    from distmeta.data import protocols, tasktable
    from distmeta.data.schema import Dataset

    place = Location.of(config.data.data)
    dataset = Dataset.open(place)
    options = protocols.protocol_options(config.data)
    table = tasktable.make(place, config.data.protocol, config.data.split_seed, options)  # not by all at once
    found = []
    for turn in range(turns):
        print(f"turn {turn + 1} of {turns}", flush=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            found.append(_turn(config, workers, Path(folder)))
    train = table.counts["train"]
    case = (
        f"{dataset.name} {config.data.protocol} {train['rows'] / train['tasks']:.0f} rows, {config.method}"
        f" {told_steps(config)}, {config.train.batch_size} tasks a batch"
    )
    return [*_speeds(case, workers, found), *_starts(workers, found)]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A training that was measured."""

    lines: list[dict[str, Any]]
    """Of its metrics.jsonl, an epoch each."""
    began: float
    """When the process was started, in seconds since 1970; so is `ended`."""
    ended: float
    """When the last epoch was."""

    def ends(self) -> list[float]:
        """When each epoch ended. Between epochs there are some milliseconds that no line counts."""
        after = [sum(line["seconds"] for line in self.lines[k + 1 :]) for k in range(len(self.lines))]
        return [self.ended - s for s in after]

    def start(self) -> float:
        """Seconds from the start of the process to its first step."""
        return self.ends()[0] - self.lines[0]["seconds"] - self.began


def _turn(config: Config, workers: int, folder: Path) -> dict[str, Any]:
    """Runs of each variant, and the seconds of a bare `fit()` as `bare`."""
    larger = dataclasses.replace(config.train, batch_size=workers * config.train.batch_size)
    return {
        "one": _train(config, folder, ["0"]),
        "independent": _train(config, folder, ["0"] * workers),
        "workers": _train(dataclasses.replace(config, train=larger), folder, [str(workers)]),
        "one batch": _train(config, folder, [str(workers)]),
        "bare": _bare(workers, folder),
    }


def _train(config: Config, folder: Path, workers: Sequence[str]) -> list[_Run]:
    """Train with each of these --workers at the same time. Each is ended when its last epoch is: the evaluation
    that would follow is measured elsewhere."""
    file = folder / "config.yaml"
    file.write_text(config_module.to_yaml(config))
    with contextlib.ExitStack() as stack:
        runs = []
        for w in workers:
            run = Path(tempfile.mkdtemp(dir=folder))
            argv = ["-m", "jobs.train", "--config", str(file), "--run", str(run / "run"), "--workers", w]
            began = time.time()
            runs.append((run, began, stack.enter_context(_process(argv, run / "output"))))
        found: dict[Path, _Run] = {}
        while len(found) < len(runs):
            time.sleep(_LOOK)
            for run, began, process in runs:
                if run not in found and (lines := _done(run / "run", config.train.epochs)):
                    found[run] = _Run(lines, began, (run / "run" / "metrics.jsonl").stat().st_mtime)
                    process.terminate()
                elif run not in found and process.poll() is not None:
                    raise _failed(run / "output", process.returncode)
        return [found[run] for run, _, _ in runs]


def _done(run: Path, epochs: int) -> list[dict[str, Any]]:
    """The lines of the run's metrics; none before all epochs are there."""
    from distmeta.parallel.validation import read_metrics

    lines = read_metrics(Location.of(run))
    return lines if len(lines) == epochs else []


def _bare(workers: int, folder: Path) -> float:
    """Seconds from the start of a process to the first line of its workers, which a bare `fit()` started."""
    place = Path(tempfile.mkdtemp(dir=folder))
    code = f"from distmeta.parallel import bare; bare.fit({workers}, {str(place)!r})"
    began = time.time()
    with _process(["-c", code], place / "output") as process:
        while not (place / "started").exists():
            if process.poll() is not None:
                raise _failed(place / "output", process.returncode)
            time.sleep(_LOOK)
    return (place / "started").stat().st_mtime - began


@contextlib.contextmanager
def _process(argv: Sequence[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Python with `argv`, ended with this block; clusters are of its own and on this machine."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_USAGE_STATS_ENABLED": "0"}
    with open(output, "wb") as out:
        process = subprocess.Popen([sys.executable, *argv], stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failed(output: Path, code: int) -> UserError | RunError:
    lines = output.read_text(errors="replace").strip().splitlines() or [f"a training ended with status {code}"]
    text = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])
    return (UserError if code == 2 else RunError)(text)


def _speed(runs: Sequence[_Run]) -> float:
    """Users a second: the median epoch after the first, where all trained; summed over runs at the same time.

    Raises:
        RunError: there is no such epoch.
    """
    since, until = max(run.ends()[0] for run in runs), min(run.ended for run in runs)
    total = 0.0
    for run in runs:
        ends = run.ends()
        spans = zip(ends, ends[1:], run.lines[1:], strict=False)
        rates = [line["tasks_per_s"] for begin, end, line in spans if since <= begin and end <= until]
        if not rates:
            raise RunError("benchmark scaling: no epoch in which all processes trained; use more --epochs")
        total += statistics.median(rates)
    return total


def _speeds(case: str, workers: int, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of the turns; a ratio is the median of the turns' ratios, as the machine's speed drifts."""
    runs = {variant: [t[variant] for t in turns] for variant in ("one", "independent", "workers", "one batch")}
    speeds = {variant: list(map(_speed, several)) for variant, several in runs.items()}
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
                **_steps([run for several in runs[variant] for run in several]),
            }
        )
    return rows


def _steps(runs: Sequence[_Run]) -> dict[str, Any]:
    """Where the epochs after the first spent their time: mean over steps, workers and runs.

    step_ms: what a step takes in all, and in it `compute` (adaptation and backward), `exchange` (as long as the last
    worker to come took), `wait` (for that worker), `input`, `optimizer` (with the check that all is finite) and
    `checkpoint`. checkpoint_share: of rank 0's time, who alone writes them (the others then wait).
    """
    lines = [line for run in runs for line in run.lines[1:]]
    steps = sum(run.lines[-1]["step"] - run.lines[0]["step"] for run in runs)
    spent = {p: 1000 * sum(line["mean_s"][p] for line in lines) / steps for p in _SECONDS}
    wait = 1000 * sum(line["exchange_wait_s"] for line in lines) / steps
    rank_0 = sum(line[f"{p}_s"] for line in lines for p in _SECONDS)
    step_ms = {
        "all": sum(spent.values()),
        "compute": spent["adapt"] + spent["backward"],
        "exchange": spent["exchange"] - wait,
        "wait": wait,
        **{p: spent[p] for p in ("input", "optimizer", "checkpoint")},
    }
    return {"step_ms": step_ms, "checkpoint_share": sum(line["checkpoint_s"] for line in lines) / rank_0}


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
