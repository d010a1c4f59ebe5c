"""`reproduce --jobs`: runs in processes of their own, which fail alone and never outlive the one that began them."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distmeta.commands import reproduce_jobs
from distmeta.commands.reproduce_runs import Call, Run, make
from distmeta.errors import UserError
from distmeta.evaluation.papertables import Ours
from distmeta.evaluation.studies import Study
from distmeta.storage import Location

STUDY = Study("tiny", "Tiny", "synthetic", "mamo", (), (), ())
_LONG = """
import sys
sys.path.insert(0, {tests!r})
from distmeta import cli
from distmeta.commands.reproduce_jobs import train_missing
from distmeta.storage import Location
from test_reproduce_jobs import runs
wanted = runs(Location.of({small!r}), Location.of({out!r}), "100000", 2)
sys.exit(cli.guarded(lambda: train_missing(wanted, 2) and 0))
"""


def runs(small: Location, out: Location, epochs: str, seeds: int, *flags: str) -> list[Run]:
    ours = Ours("MeLU", "melu", ("--embedding", "4", "--hidden", "8", "--steps", "1", "--patience", "0", *flags))
    call = Call(seeds, out, ["melu"], [], ["--epochs", epochs])
    return [make(STUDY, "synthetic", small, ours, seed, call) for seed in range(seeds)]


def test_the_same_runs_and_what_diverges(small: Location, tmp_path: Path) -> None:
    """One process or several: the same numbers. A run that diverges is told, and the others are trained."""
    told: list[str] = []
    one, many = Location.of(tmp_path / "one"), Location.of(tmp_path / "many")
    wild = runs(small, many, "1", 1, "--local-lr", "1e30")
    assert reproduce_jobs.train_missing(runs(small, one, "1", 1), log=told.append) == {}
    failed = reproduce_jobs.train_missing([*wild, *runs(small, many, "1", 1)], 2, told.append)
    assert failed.keys() == {str(wild[0].where)}
    assert "2 runs, 0 finished, 2 to train, 2 at a time" in told
    assert any("is not finite" in line for line in told)
    a, b = (runs(small, out, "1", 1)[0] for out in (one, many))
    files = [json.loads((r.where / "evaluation.json").read_bytes()) for r in (a, b)]
    assert files[0] == files[1]
    assert "report" in Path(f"{b.where}.log").read_text()
    assert reproduce_jobs.train_missing(wild, log=told.append).keys() == {str(wild[0].where)}, "in this process too"


def test_a_failure_ends_the_others(small: Location, tmp_path: Path) -> None:
    out = Location.of(tmp_path)
    taken, long = runs(small, out, "1", 1)[0], runs(small, out, "100000", 2)[1]
    (Path(str(taken.where)) / "checkpoints").mkdir(parents=True)
    before = children()  # of other tests' clusters
    with pytest.raises(UserError, match=r"holds other things \(checkpoints\).*\.log has all it said"):
        reproduce_jobs.train_missing([long, taken], 2, log=lambda _: None)
    assert children() <= before


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_one_that_began_it(small: Location, tmp_path: Path, how: signal.Signals) -> None:
    script = _LONG.format(tests=str(Path(__file__).parent), small=str(small), out=str(tmp_path))
    wanted = runs(small, Location.of(tmp_path), "100000", 2)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, start_new_session=True) as parent:
        try:
            until(lambda: all((r.where / "metrics.jsonl").exists() for r in wanted), 60)
            trainers = [holder(r) for r in wanted]
            assert all(map(alive, trainers))
            assert parent.pid not in trainers
        finally:
            parent.send_signal(how)
        parent.wait(30)
    until(lambda: not any(map(alive, trainers)), 10)


def holder(run: Run) -> int:
    """The process that drives a run, or did; 0 for none so far."""
    try:
        return json.loads((run.where / ".lock").read_bytes())["pid"]
    except (OSError, ValueError):
        return 0


def alive(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    try:
        return bool(pid) and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(done: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.05)
