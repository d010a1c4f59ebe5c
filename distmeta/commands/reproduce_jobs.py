"""The runs that `reproduce` still needs, one after the other in this process or several at once, each in its own."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from distmeta import cli
from distmeta.commands import train
from distmeta.commands.reproduce_runs import Run, tasks
from distmeta.errors import Diverged, RunError, UserError
from distmeta.parallel import rundir
from distmeta.storage import Location

DIVERGED = 3
"""Exit status of a process whose run diverged."""
_POLL = 0.1
"""Seconds between two looks at the processes."""
_PATIENCE = 10.0
"""Seconds that they have to end when told to."""

Failed = dict[str, str]
"""Where a run lies that diverged -> the sentence about it."""


def train_missing(
    runs: Sequence[Run],
    jobs: int = 1,
    log: Callable[[str], None] = print,
    after: Callable[[Run], None] = lambda _: None,
) -> Failed:
    """Train the runs that have not finished, going on with those begun; each ends evaluated.

    Args:
        jobs: so many at a time. More than one: each a process with one thread, whose words go to RUN.log beside the
            run, and which ends when this process does, however that ends.
        after: called with each run that has finished, at once with those that had before.

    Returns:
        The runs that diverged: the others are trained all the same, as these would not do better another time.

    Raises:
        UserError, RunError: a run failed otherwise; what is finished stays, and a second call goes on from there.
    """
    missing = [run for run in runs if not rundir.finished(run.where)]
    more = f", {jobs} at a time" if jobs > 1 and missing else ""
    log(f"{len(runs)} runs, {len(runs) - len(missing)} finished, {len(missing)} to train{more}")
    for run in runs:
        if run not in missing:
            after(run)
    clock = _Clock(len(missing))
    return _in_turn(missing, clock, log, after) if jobs == 1 else _at_once(missing, jobs, clock, log, after)


class _Clock:
    """How far a call is and what it still takes."""

    def __init__(self, total: int) -> None:
        self.total, self.begun, self.ended, self.start = total, 0, 0, time.monotonic()

    def line(self, run: Run) -> str:
        """What to say of a run that begins now."""
        self.begun += 1
        left = ""
        if self.ended:
            each = (time.monotonic() - self.start) / self.ended
            left = f", {self.total - self.ended} left, about {each * (self.total - self.ended) / 60:.0f} min"
        return f"[{self.begun}/{self.total}{left}] {run.label} on {run.dataset}, split {run.seed} -> {run.where}"


def _argv(run: Run) -> list[str]:
    return [*run.argv, "--resume"] if rundir.exists(run.where) else list(run.argv)


def _in_turn(missing: Sequence[Run], clock: _Clock, log: Callable[[str], None], after: Callable[[Run], None]) -> Failed:
    failed: Failed = {}
    for run in missing:
        log(f"\n{clock.line(run)}")
        try:
            train.main(_argv(run))
            after(run)
        except Diverged as e:
            failed[str(run.where)] = str(e)
            log(f"{run.where}: {e}")
        except RunError as e:
            raise RunError(f"{run.where}: {e}; the {clock.ended} runs before it stand, the same command goes on") from e
        clock.ended += 1
    return failed


def _at_once(
    missing: Sequence[Run], jobs: int, clock: _Clock, log: Callable[[str], None], after: Callable[[Run], None]
) -> Failed:
    for run in missing:  # here, as two processes may want the same one
        tasks(run, Location.of(run.config.data.data))
    waiting, failed = list(missing), Failed()
    running: dict[subprocess.Popen[bytes], Run] = {}
    with tempfile.TemporaryDirectory() as folder, _ended(running, Path(folder)):
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                log(clock.line(run))
                running[_start(run, Path(folder))] = run
            time.sleep(_POLL)
            for process in [p for p in running if p.poll() is not None]:
                run = running.pop(process)
                _close(process, run, Path(folder))
                clock.ended += 1
                if process.returncode == DIVERGED:
                    failed[str(run.where)] = said = _last_words(run)
                    log(f"{run.where}: {said}")
                elif process.returncode:
                    raise _error(run, process.returncode)
                else:
                    after(run)
    return failed


def _log(run: Run) -> Location:
    """Beside the run, not in it: a run that has kept nothing yet may hold nothing else."""
    return run.where.parent / f"{run.where.name}.log"


def _words(run: Run, folder: Path) -> Path:
    """Where a process writes what it says: the log, or a file in `folder` that becomes it at the process's end."""
    return Path(_log(run).path) if run.where.is_local else folder / _log(run).path.replace("/", "_")


def _start(run: Run, folder: Path) -> subprocess.Popen[bytes]:
    run.where.make_dir()
    with open(_words(run, folder), "wb") as words:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, *_argv(run), *([] if "--threads" in run.argv else ["--threads", "1"])],
            stdin=subprocess.PIPE, stdout=words, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


@contextlib.contextmanager
def _ended(running: dict[subprocess.Popen[bytes], Run], folder: Path) -> Iterator[None]:
    """No process outlives the block: Ctrl-C and an error end them here, and they go on from their checkpoints."""
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        limit = time.monotonic() + _PATIENCE
        for process, run in running.items():
            try:
                process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close(process, run, folder)


def _close(process: subprocess.Popen[bytes], run: Run, folder: Path) -> None:
    """Let go of a process that has ended."""
    if process.stdin:
        process.stdin.close()
    if not run.where.is_local:
        _log(run).write_bytes(_words(run, folder).read_bytes())


def _error(run: Run, status: int) -> UserError | RunError:
    kind = UserError if status == 2 else RunError
    what = _last_words(run) if status > 0 else f"was ended by signal {-status}"
    return kind(f"{run.where}: {what} ({_log(run)} has all it said); the finished runs stand, the same command goes on")


def _last_words(run: Run) -> str:
    """The sentence that a run's process ended with, or the last line where it had none."""
    lines = [line for line in _log(run).read_bytes().decode(errors="replace").splitlines() if line.strip()]
    sentences = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return [*lines[-1:], *sentences[-1:]][-1] if lines else "said nothing"


def _follow() -> None:
    """End this process when the one that started it has, whose end of standard input closes then even on kill -9."""

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock the interpreter wants when it ends
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _child(argv: Sequence[str]) -> int:
    """`train`, for a process of its own."""
    _follow()

    def work() -> int:
        try:
            return train.main(argv)
        except Diverged as e:
            print(f"error: {e}")
            return DIVERGED

    return cli.guarded(work)


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1:]))
