"""The shared state's servers as Ray actors: the driver starts them, workers reach them by their handles."""

import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distmeta.parallel.cluster import NAMESPACE
from distmeta.parallel.collective import TorchExchange
from distmeta.parallel.shared import Servers
from distmeta.parallel.state import Server, StateLost

_LATER = 60.0
"""Seconds that an answer may take beyond the server's own timeout: its restart, large arrays."""


class StateServer(Server):
    """A Server in a process of its own."""

    def __init__(self, timeout: float, shard: int) -> None:
        super().__init__(timeout, f"shard {shard}, process {os.getpid()} on {ray.util.get_node_ip_address()}")


def create(run: str, shards: int, workers: int, timeout: float) -> list[Any]:
    """Handles of a server a shard, which end with this driver: one beside it, several spread over the nodes.

    Args:
        run: a name for them. workers: the most there will be; each waits in a call of its own.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {
        "num_cpus": 0,
        "namespace": NAMESPACE,
        "max_restarts": -1,
        "max_task_retries": -1,  # of an answer lost on its way; a server that was started anew says so
        "max_concurrency": 2 * workers + 4,  # those of a group that is over may wait until the next one opens
        "scheduling_strategy": here if shards == 1 else "SPREAD",
    }
    made, unique = ray.remote(StateServer), uuid.uuid4().hex[:6]
    return [
        made.options(name=f"distmeta-state-{run}-{unique}-{shard}", **options).remote(timeout, shard)
        for shard in range(shards)
    ]


class RayServers(Servers):
    """The servers as a worker of `exchange` reaches them."""

    def __init__(self, actors: Sequence[Any], exchange: TorchExchange, timeout: float) -> None:
        self.actors, self.exchange, self.timeout = actors, exchange, timeout

    def __len__(self) -> int:
        return len(self.actors)

    def begin(self, method: str, each: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        """See Servers.begin."""
        asked = [getattr(actor, method).remote(*args) for actor, args in zip(self.actors, each, strict=True)]
        name = each[0][0]  # and not `each`, which holds a step's writes

        def answers() -> list[Any]:
            self.exchange.since = time.monotonic()  # like an exchange: the others may be waited for here
            try:
                found = ray.get(asked, timeout=self.timeout + _LATER)
            except RayTaskError as e:
                raise e.cause from None
            except (RayActorError, GetTimeoutError) as e:
                raise StateLost(f"the shared state {name} was lost: its server does not answer ({e})") from None
            self.exchange.since = None
            return found

        return answers
