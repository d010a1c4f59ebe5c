"""A big made world that cannot be finished: killed, no room, a writer lost; and how much memory it takes."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distmeta.data.schema import Dataset
from distmeta.data.sources import load
from distmeta.data.sources.load import generate
from distmeta.errors import RunError, UserError
from distmeta.storage import Location

SMALL = {"profile": "taobao", "users": 400, "items": 900, "interactions": 24_000}
LARGE = ["--users", "60000", "--items", "100000", "--interactions", "6000000", "--jobs", "2"]


def _command(out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "jobs.prepare", "synthetic", "--profile", "taobao", "--out", str(out), *flags]


def _writers(process: int) -> list[int]:
    """The processes that `process` started and that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # no process, or none any more
            continue
        if int(parent) == process and state != "Z":
            found.append(int(folder.name))
    return found


def _until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run whose first part is written and whose last is not, and its processes."""
    out = tmp_path / "d"
    with subprocess.Popen(_command(out, *LARGE), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        try:
            _until(lambda: list(out.glob("interactions/part-*")), "no part was written")
            yield run, _writers(run.pid)
        finally:
            run.kill()


def test_killed_it_leaves_no_process_and_no_dataset(
    running: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    run, writers = running
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert len(writers) >= 2
    _until(lambda: not any(map(_lives, writers)), "a writer outlived who started it")
    with pytest.raises(UserError, match="no dataset here"):
        Dataset.open(Location.of(tmp_path / "d"))
    again = generate(Location.of(tmp_path / "d"), 1, **SMALL)
    parts = sorted(str(f.relative_to(tmp_path / "d")) for f in (tmp_path / "d").rglob("*.parquet"))
    assert parts == sorted(f["path"] for files in again.files.values() for f in files)


def test_a_lost_writer_ends_it_with_a_sentence(
    running: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    run, writers = running
    busiest = max(writers, key=lambda pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]))
    os.kill(busiest, signal.SIGKILL)
    assert run.stderr is not None
    said = run.stderr.read()
    assert run.wait() == 1
    assert "a process that wrote parts was killed (memory?); try again with fewer --jobs" in said
    assert said.count("\n") == 1
    _until(lambda: not any(map(_lives, writers)), "a writer outlived who started it")
    assert not (tmp_path / "d/dataset.json").exists()


def test_a_file_that_cannot_be_written_ends_all_writers(tmp_path: Path) -> None:
    """In a process of the pool; by the largest size that the system lets a file have."""
    run = subprocess.run(
        _command(tmp_path / "d", "--users", "30000", "--items", "3000", "--jobs", "2"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "part-0000" in run.stderr
    assert "cannot be written" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "d/dataset.json").exists()


def test_a_small_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 200_000})())
    with pytest.raises(RunError, match=r"0\.00 GB are needed and 0\.00 GB are free"):
        generate(Location.of(tmp_path / "d"), 1, **SMALL)
    assert not (tmp_path / "d").exists()


def test_a_disk_that_fills_leaves_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PART_ROWS", 4_000)
    write: Callable[..., Any] = pq.write_table

    def full(table: Any, path: str, **options: Any) -> None:
        if path.endswith("interactions/part-00002.parquet"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, path, **options)

    monkeypatch.setattr(load.pq, "write_table", full)
    with pytest.raises(RunError, match="no space left"):
        generate(Location.of(tmp_path / "d"), 1, **SMALL)
    with pytest.raises(UserError, match="no dataset here"):
        Dataset.open(Location.of(tmp_path / "d"))
    monkeypatch.undo()
    again = generate(Location.of(tmp_path / "d"), 1, **SMALL)
    assert json.loads((tmp_path / "d/dataset.json").read_text())["interactions"] == again.interactions == 24_000


def test_memory_knows_nothing_of_the_interactions(tmp_path: Path) -> None:
    """A part takes about 250 bytes a row; two parts more would take 500 MB if anything kept them."""

    def peak(name: str, interactions: int) -> float:
        flags = ["--users", "20000", "--items", "50000", "--interactions", str(interactions), "--jobs", "1"]
        code = (
            "import resource, sys; from distmeta import cli; status = cli.main(sys.argv[1:]);"
            " print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024); sys.exit(status)"
        )
        command = [sys.executable, "-c", code, *_command(tmp_path / name, *flags)[2:]]
        command[3] = "prepare"
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    assert peak("three", 3_000_000) < peak("one", 1_000_000) + 100
