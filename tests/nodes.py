"""A Ray cluster of several nodes on this machine, for tests: 1 CPU each, to be killed and replaced."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emulation import KEPT, SOON_DEAD

from distmeta import cli
from distmeta.parallel.local_nodes import LocalNodes, raylet

SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # by default 15: beside anything else they would starve
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process less for each start of workers
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    **SOON_DEAD,
    **KEPT,
}


class Nodes(LocalNodes):
    """A head and a further node; this process is connected to them as a driver."""

    def __init__(self) -> None:
        import ray

        super().__init__(2, 1)
        ray.init(address=self.address, namespace="distmeta", log_to_driver=False)

    def workers(self) -> list[int]:
        """Processes of the Ray Train workers of this cluster, oldest first."""
        return self._processes(b"ray::RayTrainWorker")

    def servers(self) -> list[int]:
        """Processes of the shared state's servers, oldest first."""
        return self._processes(b"ray::StateServer")

    def _processes(self, title: bytes) -> list[int]:
        raylets = {str(raylet(node)) for node in [self.head, *self.others]}
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                ours = stat.read_text().rpartition(")")[2].split()[1] in raylets
                if ours and (stat.parent / "cmdline").read_bytes().startswith(title):
                    found.append(int(stat.parent.name))
        return sorted(found)

    def close(self) -> None:
        import ray

        ray.shutdown()
        super().close()


@contextlib.contextmanager
def command(*argv: str) -> Iterator["Command"]:
    """A command that runs in a thread while the block does things to it; the block's end waits for its end."""
    running = Command(argv)
    try:
        yield running
    finally:
        running.thread.join()


class Command:
    """One of the project's commands, in a thread of this process."""

    def __init__(self, argv: tuple[str, ...]) -> None:
        self.status: int | None = None
        self.thread = threading.Thread(target=self._run, args=(argv,))
        self.thread.start()

    def _run(self, argv: tuple[str, ...]) -> None:
        self.status = cli.main(argv)

    def wait(self, until: Callable[[], Any], seconds: float = 240) -> Any:
        """What `until` gives, once that is true; fails where the command ends before, or time runs out."""
        deadline = time.monotonic() + seconds
        while not (value := until()):
            assert self.thread.is_alive(), f"the command ended with {self.status} before"
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.02)
        return value
