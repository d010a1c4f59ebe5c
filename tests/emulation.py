"""Ray clusters as a user or KubeRay starts them: `ray start`, every node in processes of its own, all on this machine.

Never `ray stop`: it would end every Ray of the user. What is started here is found again by a mark in its environment.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).parent.parent
RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = "0123456789abcdef" * 4
MARK, NODE = "DISTMETA_TEST_MARK", "DISTMETA_TEST_NODE"
_COMMON = "--block --min-worker-port=0 --max-worker-port=0 --disable-usage-stats"
"""Of each `ray start`: in the foreground, and on ports that nobody else has."""
SOON_DEAD = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}
"""A node that is gone counts as dead after 2 seconds, not after 30; one on a busy machine may take its time."""
KEPT = {"RAY_idle_worker_killing_time_threshold_ms": "120000", "RAY_num_workers_soft_limit": "8"}
"""Idle workers wait for the next task; by default all but one a CPU end after a second, and each start takes seconds of
a core."""
_APART = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]


def hides() -> bool:
    """Whether a process may be given mounts of its own here."""
    return bool(shutil.which("unshare")) and not subprocess.run([*_APART, "true"], capture_output=True).returncode


def environment(home: Path, **extra: str) -> dict[str, str]:
    """This process's environment without its Ray settings, marked so that descendants can be found."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**plain, "HOME": str(home), MARK: uuid.uuid4().hex, "RAY_USAGE_STATS_ENABLED": "0", **extra}


def processes(env: Mapping[str, str], mark: str = MARK) -> dict[int, str]:
    """The living processes with this environment's mark: process id -> command line."""
    found, wanted = {}, f"{mark}={env[mark]}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (process / "environ").read_bytes():
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if line:
                    found[int(process.name)] = line
    return found


def descendants(env: Mapping[str, str]) -> list[str]:
    """Command lines of the living processes with this environment's mark."""
    return list(processes(env).values())


def kill(env: Mapping[str, str], mark: str = MARK) -> None:
    """SIGKILL to all of them at once: a pod, or a whole cluster, that vanishes."""
    while found := processes(env, mark):
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def until(true: Callable[[], object], what: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@dataclass
class Node:
    """A running `ray start --address` that joins a head."""

    env: dict[str, str]
    process: "subprocess.Popen[bytes]"

    def workers(self) -> list[int]:
        """Its Ray Train workers."""
        return [p for p, line in processes(self.env, NODE).items() if line.startswith("ray::RayTrainWorker")]

    def vanish(self) -> None:
        """SIGKILL to everything on it, as to a pod whose machine is gone."""
        kill(self.env, NODE)
        self.process.wait()


@dataclass
class Head:
    """A running `ray start --head`, and what a client of it sets."""

    env: dict[str, str]
    gcs: str
    api: str
    cwd: Path
    temp: str
    nodes: list[Node] = field(default_factory=list)

    def ray(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        everything = {**self.env, "RAY_API_SERVER_ADDRESS": self.api, **env}
        return subprocess.run([RAY, *words], env=everything, capture_output=True, text=True, timeout=300)

    def submit(self, tree: Path, *words: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        """Exit status and output of `ray job submit`, which follows the job's log."""
        done = self.ray("job", "submit", *options, "--working-dir", str(tree), "--", *words)
        return done.returncode, done.stdout + done.stderr

    def join(self, options: Sequence[str] = ("--num-cpus=1",), hidden: Path | None = None) -> Node:
        """Start a further node; it is there when its head knows it.

        Args:
            hidden: a folder that is empty for this node (see `hides`).
        """
        mine = {**self.env, NODE: uuid.uuid4().hex}
        (agent,), place = free_ports(1), tempfile.mkdtemp(dir=self.temp)  # nodes that start at once mix up their files
        words = f"start --address={self.gcs} --dashboard-agent-listen-port={agent} --temp-dir={place} {_COMMON}"
        before = [*_APART, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden)] if hidden else []
        node = Node(mine, _start([*before, RAY, *words.split(), *options], mine, self.cwd, "node"))
        self.nodes.append(node)
        return node


def _start(words: list[str], env: dict[str, str], cwd: Path, name: str) -> "subprocess.Popen[bytes]":
    with open(cwd / f"{name}-{time.monotonic_ns()}.log", "w") as log:
        return subprocess.Popen(words, env=env, cwd=cwd, stdout=log, stderr=log, start_new_session=True)


@contextlib.contextmanager
def head(home: Path, options: Sequence[str] = ("--num-cpus=2",), **extra: str) -> Iterator[Head]:
    """A head that answers; at the end of the block it is asked to end, and leaves nothing running but its nodes.

    Args:
        home: a folder of its own, for the token and the log. options: of `ray start`. extra: environment.
    """
    settings = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_worker_niceness": "0", **KEPT, **extra}  # 30 s; 15
    env = environment(home, **settings)
    gcs, api, client, agent = free_ports(4)
    short = tempfile.mkdtemp(prefix="dm")  # socket names below it may have 107 characters
    words = f"start --head --port={gcs} --dashboard-host=127.0.0.1 --dashboard-port={api} {_COMMON}"
    words += f" --ray-client-server-port={client} --dashboard-agent-listen-port={agent} --temp-dir={short}"
    process = _start([RAY, *words.split(), *options], env, home, "head")
    try:
        url = f"http://127.0.0.1:{api}"

        def answers() -> bool:
            assert process.poll() is None, "".join(log.read_text() for log in home.glob("head-*.log"))
            try:
                return bool(urllib.request.urlopen(f"{url}/api/version", timeout=5))
            except urllib.error.HTTPError as e:
                return e.code == 401
            except OSError:
                return False

        until(answers, "the head does not answer")
        yield (made := Head(env, f"127.0.0.1:{gcs}", url, home, short))
        for node in made.nodes:
            node.vanish()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        until(lambda: not descendants(env), f"left running: {descendants(env)}", 20)
    finally:
        kill(env)
        shutil.rmtree(short, ignore_errors=True)
