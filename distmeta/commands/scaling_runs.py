"""Trainings that `benchmark scaling` runs and measures, each in processes of its own."""

import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distmeta import config as config_module
from distmeta.config import Config
from distmeta.errors import RunError, UserError
from distmeta.storage import Location

_LOOK = 0.1
"""Seconds between looks at a run's metrics."""
_END_S = 60
"""Seconds within which a process must end that was told to."""
_SECONDS = ("input", "adapt", "backward", "exchange", "optimizer", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Run:
    """A training that was measured."""

    lines: list[dict[str, Any]]
    """Of its metrics.jsonl, an epoch each."""
    began: float
    """When the process was started, in seconds since 1970; so is `ended`."""
    ended: float
    """When the last epoch was."""
    parameters: str = ""
    """sha256 of those it ended with."""

    def ends(self) -> list[float]:
        """When each epoch ended. Between epochs there are some milliseconds that no line counts."""
        after = [sum(line["seconds"] for line in self.lines[k + 1 :]) for k in range(len(self.lines))]
        return [self.ended - s for s in after]

    def start(self) -> float:
        """Seconds from the start of the process to its first step."""
        return self.ends()[0] - self.lines[0]["seconds"] - self.began


def train(config: Config, folder: Path, workers: Sequence[str], cluster: Mapping[str, str] | None = None) -> list[Run]:
    """Train with each of these --workers at the same time. Each is ended when its last epoch is: the evaluation
    that would follow is measured elsewhere.

    Args:
        cluster: the environment of who is to train on a cluster that there is.
    """
    file = folder / "config.yaml"
    file.write_text(config_module.to_yaml(config))
    with contextlib.ExitStack() as stack:
        runs = []
        for w in workers:
            run = Path(tempfile.mkdtemp(dir=folder))
            argv = ["-m", "jobs.train", "--config", str(file), "--run", str(run / "run"), "--workers", w]
            began = time.time()
            runs.append((run, began, stack.enter_context(process(argv, run / "output", cluster))))
        found: dict[Path, Run] = {}
        while len(found) < len(runs):
            time.sleep(_LOOK)
            for run, began, training in runs:
                if run not in found and (done := _done(run / "run", config.train.epochs)):
                    found[run] = Run(done[0], began, (run / "run" / "metrics.jsonl").stat().st_mtime, done[1])
                    training.terminate()
                elif run not in found and training.poll() is not None:
                    raise failed(run / "output", training.returncode)
        return [found[run] for run, _, _ in runs]


def _done(run: Path, epochs: int) -> tuple[list[dict[str, Any]], str] | None:
    """The lines of the run's metrics and the digest of its parameters; None before all epochs are kept."""
    from distmeta.parallel import checkpoint
    from distmeta.parallel.validation import read_metrics

    lines = read_metrics(Location.of(run))
    if len(lines) < epochs:
        return None
    last = checkpoint.newest(Location.of(run))
    if last is None or last.step < lines[-1]["step"]:
        return None
    return lines, "".join(f["sha256"] for name, f in last.files.items() if name.startswith("params-"))


def bare(workers: int, folder: Path) -> float:
    """Seconds from the start of a process to the first line of its workers, which a bare `fit()` started."""
    place = Path(tempfile.mkdtemp(dir=folder))
    code = f"from distmeta.parallel import bare; bare.fit({workers}, {str(place)!r})"
    began = time.time()
    with process(["-c", code], place / "output") as running:
        await_file(place / "started", running)
    return (place / "started").stat().st_mtime - began


def await_file(file: Path, running: subprocess.Popen[bytes]) -> None:
    """Wait for a file that a process makes, whose output is beside it."""
    while not file.exists():
        if running.poll() is not None:
            raise failed(file.parent / "output", running.returncode)
        time.sleep(_LOOK)


@contextlib.contextmanager
def process(
    argv: Sequence[str], output: Path, cluster: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Python with `argv`, ended with this block; its cluster is its own and on this machine, where none is given."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_USAGE_STATS_ENABLED": "0"}
    with open(output, "wb") as out:
        begun = subprocess.Popen(
            [sys.executable, *argv], stdout=out, stderr=subprocess.STDOUT, env={**env, **(cluster or {})}
        )
    try:
        yield begun
    finally:
        begun.terminate()
        try:
            begun.wait(_END_S)
        except subprocess.TimeoutExpired:
            begun.kill()
            begun.wait()


def failed(output: Path, code: int) -> UserError | RunError:
    lines = output.read_text(errors="replace").strip().splitlines() or [f"a training ended with status {code}"]
    text = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])
    return (UserError if code == 2 else RunError)(text)


def speed(runs: Sequence[Run]) -> float:
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


def steps(runs: Sequence[Run]) -> dict[str, Any]:
    """Where the epochs after the first spent their time: mean over steps, workers and runs.

    step_ms: what a step takes in all, and in it `compute` (adaptation and backward), `exchange` (as long as the last
    worker to come took), `wait` (for that worker), `input`, `optimizer` (with the check that all is finite) and
    `checkpoint`. checkpoint_share: of rank 0's time, who alone writes them (the others then wait).
    """
    lines = [line for run in runs for line in run.lines[1:]]
    n = sum(run.lines[-1]["step"] - run.lines[0]["step"] for run in runs)
    spent = {p: 1000 * sum(line["mean_s"][p] for line in lines) / n for p in _SECONDS}
    wait = 1000 * sum(line["exchange_wait_s"] for line in lines) / n
    rank_0 = sum(line[f"{p}_s"] for line in lines for p in _SECONDS)
    step_ms = {
        "all": sum(spent.values()),
        "compute": spent["adapt"] + spent["backward"],
        "exchange": spent["exchange"] - wait,
        "wait": wait,
        **{p: spent[p] for p in ("input", "optimizer", "checkpoint")},
    }
    return {"step_ms": step_ms, "checkpoint_share": sum(line["checkpoint_s"] for line in lines) / rank_0}
