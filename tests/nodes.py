"""A Ray cluster of several nodes on this machine, for tests: 1 CPU each, to be killed and replaced."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distmeta import cli

SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # by default 15: beside anything else they would starve
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # a node counts as dead after 2 seconds without a sign of life, not after 30
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "4",
}


class Nodes:
    """A head and further nodes; this process is connected to it as a driver."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 200 << 20}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.others: list[Any] = []
        self.fill()
        ray.init(address=self.cluster.address, namespace="distmeta", log_to_driver=False)

    def fill(self) -> None:
        """Have two nodes; only the main thread can add one."""
        if not self.others:
            self.others.append(self.cluster.add_node(num_cpus=1, object_store_memory=200 << 20))
            self.cluster.wait_for_nodes()

    def kill_node(self) -> None:
        """SIGKILL to the raylet of the node that is not the head; its workers find out by themselves."""
        node = self.others.pop()
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        self.cluster.worker_nodes.discard(node)

    def workers(self) -> list[int]:
        """Processes of the Ray Train workers of this cluster, oldest first."""
        return self._processes(b"ray::RayTrainWorker")

    def servers(self) -> list[int]:
        """Processes of the shared state's servers, oldest first."""
        return self._processes(b"ray::StateServer")

    def _processes(self, title: bytes) -> list[int]:
        nodes = [self.cluster.head_node, *self.others]
        raylets = {str(n.all_processes["raylet"][0].process.pid) for n in nodes}
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                ours = stat.read_text().rpartition(")")[2].split()[1] in raylets
                if ours and (stat.parent / "cmdline").read_bytes().startswith(title):
                    found.append(int(stat.parent.name))
        return sorted(found)

    def close(self) -> None:
        """Disconnect and kill everything; asked politely, Ray takes half a minute a node."""
        import ray

        ray.shutdown()
        for node in [*self.others, self.cluster.head_node]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)


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
