"""Where the README's blocks are run: the code, small raw files where the README says they are, and its `python`."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import s3server
import yaml
from emulation import head
from readme_blocks import REPO, Block
from readme_python import CLIENT

EVERY = 32
"""One of so many users of the real logs is there."""
_SECONDS = 500
"""That a block may take."""


class Sandbox:
    """A folder that looks like a reader's checkout, and the environment of the reader's shell."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env

    def run(self, block: Block) -> str:
        """What bash says of a block; AssertionError where one of its commands fails."""
        words = ["bash", "--norc", "-e", "-o", "pipefail", "-c", block.text]
        done = subprocess.run(
            words, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.where}: exit status {done.returncode}\n{done.stdout}"
        return done.stdout


@contextlib.contextmanager
def sandbox(folder: Path, raw: Path, data: Path) -> Iterator[Sandbox]:
    """Make one in an empty folder, from the official layouts in `raw` and the other real files in `data`.

    A Ray cluster is there, for those commands that would start one of their own: each start takes ten seconds. Its
    s3://bucket is that of a server on loopback.
    """
    for name in ("distmeta", "jobs", "tune", "k8s", "tests", "pyproject.toml"):
        if (REPO / name).exists():
            (folder / name).symlink_to(REPO / name)
    cold = (data / "movielens-1m" / "melu_cold_users.txt").read_text().split()
    (folder / "melu_cold_users.txt").write_text("".join(f"{user}\n" for user in cold if _kept(user)))
    _few(raw / "ml-1m", folder / "ml-1m", {"ratings.dat": "::"})
    _few(raw / "BX", folder / "BX", {"BX-Book-Ratings.csv": ";"})
    _few(raw / "ml-100k", folder / "ml-100k", {})
    (folder / "bin").mkdir()
    where = folder / "bin" / "socket"
    for name in ("python", "python3", "distmeta"):
        (folder / "bin" / name).write_text(CLIENT.format(python=sys.executable, socket=where))
        (folder / "bin" / name).chmod(0o755)
    home = folder / "home"
    home.mkdir()
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env = {
        **plain, "HOME": str(home), "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    log = folder / "bin" / "log"
    with log.open("wb") as words:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("readme_python.py")), str(where)],
            env=env, stdout=words, stderr=words, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 240
        while not where.exists():
            assert server.poll() is None and time.monotonic() < end, log.read_text()  # noqa: PT018
            time.sleep(0.05)
        with head(home, RAY_AUTH_MODE="disabled") as cluster, s3server.serve() as s3:
            yield Sandbox(folder, {**env, **s3.env, "RAY_ADDRESS": cluster.gcs})
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _few(source: Path, to: Path, logs: dict[str, str]) -> None:
    """The files of a raw folder; of its logs (file -> separator) the lines of every EVERYth user."""
    to.mkdir()
    for file in source.iterdir():
        if file.name not in logs:
            (to / file.name).symlink_to(file)
            continue
        lines = file.read_text("latin-1").splitlines(keepends=True)
        ids = [line.split(logs[file.name])[0].strip('"') for line in lines]
        kept = [line for line, user in zip(lines, ids, strict=True) if _kept(user)]
        (to / file.name).write_text("".join(kept), "latin-1")


def _kept(user: str) -> bool:
    """Whether a user is there; a header is."""
    return not user.isdigit() or int(user) % EVERY == 0


def described(spec: dict[str, Any], folder: Path, users: int = 60, items: int = 40) -> None:
    """Files that fit the description of somebody's own data: every user knows half of the items."""
    rng = np.random.default_rng(0)
    log, label = spec["interactions"], spec["label"]
    user, item = np.nonzero(rng.random((users, items)) < 0.5)
    low, high = (0, 1) if label["kind"] == "click" else (label["minimum"], label["maximum"])
    columns = {log["user"]: user, log["item"]: item, log["label"]: rng.integers(low, high + 1, len(user))}
    if "time" in log:
        columns[log["time"]] = 1_700_000_000 + rng.permutation(len(user))
    if "scenario" in log:
        columns[log["scenario"]] = np.array(["at", "ch", "de"])[user % 3]
    _write(columns, folder / log["file"])
    for side, count in (("users", users), ("items", items)):
        if own := spec.get(side):
            made: dict[str, Any] = {own["key"]: np.arange(count)}
            for field in own["fields"]:
                numeric = field["type"] == "numeric"
                made[field.get("column", field["name"])] = (
                    rng.random(count) if numeric else np.array(["a", "b", "c"])[rng.integers(0, 3, count)]
                )
            _write(made, folder / own["file"])


def _write(columns: dict[str, Any], file: Path) -> None:
    table = pl.DataFrame(columns)
    if file.suffix == ".csv":
        table.write_csv(file)
    else:
        table.write_parquet(file)


def written(block: Block, folder: Path) -> None:
    """Keep a YAML block whose first line names its file, and make the files that it describes."""
    name = block.text.splitlines()[0].removeprefix("# ")
    if not name.endswith(".yaml"):
        return
    (folder / name).write_text(block.text)
    spec = yaml.safe_load(block.text)
    if "interactions" in spec:
        described(spec, folder)
