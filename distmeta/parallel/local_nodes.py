"""A Ray cluster of several nodes on this machine: to measure and to test what nodes cost, and that they may be lost."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

from distmeta.parallel.cluster import settle

_STORE_BYTES = 256 << 20
"""The object store of a node."""


class LocalNodes:
    """Nodes of `cpus` CPUs each, the first of them the head. Ray's settings stand in this process's environment.

    Ray must know them before: set them before `ray` is imported.
    """

    def __init__(self, nodes: int, cpus: int) -> None:
        from ray.cluster_utils import Cluster

        self._node: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": _STORE_BYTES}
        head = {**self._node, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.head: Any = self.cluster.head_node
        self.others: list[Any] = []
        """The nodes besides the head."""
        self.fill(nodes)

    @property
    def address(self) -> str:
        """host:port, as RAY_ADDRESS takes it."""
        return str(self.cluster.address)

    def fill(self, nodes: int) -> None:
        """Have so many nodes, the head among them; only the main thread can add one."""
        if len(self.others) + 1 < nodes:
            self.others += [self.cluster.add_node(**self._node) for _ in range(nodes - 1 - len(self.others))]
            self.cluster.wait_for_nodes()

    def lose(self) -> None:
        """SIGKILL to the raylet of a node that is not the head; its workers find out by themselves."""
        node = self.others.pop()
        os.kill(raylet(node), signal.SIGKILL)
        self.cluster.worker_nodes.discard(node)

    def close(self) -> None:
        """Kill all nodes; asked politely, Ray takes half a minute for each."""
        for node in [*self.others, self.head]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def raylet(node: Any) -> int:
    """The process id of a node's raylet."""
    return node.all_processes["raylet"][0].process.pid


def serve(nodes: int, cpus: int, file: str) -> None:
    """Have such nodes until this process is told to end; FILE then holds their address."""
    settle("")
    over = threading.Event()
    made = LocalNodes(nodes, cpus)
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    try:
        partial = Path(f"{file}.tmp")
        partial.write_text(made.address)
        partial.rename(file)
        while not over.wait(1):
            pass
    finally:
        made.close()
