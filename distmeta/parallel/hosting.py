"""What a search's trials have of the cluster: a connection, room side by side, and the data that all have in common."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distmeta.config import Config
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError
from distmeta.parallel import cluster, room
from distmeta.parallel.stored import SPLITS, ForWorkers, Stored
from distmeta.parallel.update import check_shares
from distmeta.process import cores
from distmeta.storage import Location

_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay what they are
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # of its own state, which is never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # the searcher itself proposes no more than there is room for
    "RAY_AIR_NEW_OUTPUT": "0",
}

_DRIVER_BYTES = 512 << 20
"""Memory of a process that waits for a trial's workers."""


@dataclass(frozen=True)
class Shared:
    """What all trials have in common."""

    stored: Any
    """Where a Stored lies in the object store."""
    leash: Any = None
    """Handle of the Leash on trials' workers, where they have some; it lives as long as this."""

    def free(self, run: str) -> None:
        """End the workers of a trial that ended without doing so."""
        if self.leash:
            self.leash.free.remote(run)


def check_room(workers: int, threads: int, gpu: float) -> None:
    """UserError where trials are to run on this machine, and it is too small for one, or where the workers of a trial
    would share a GPU; the arguments as of `at_once`."""
    check_shares(gpu, workers, "--workers-per-trial")
    if os.environ.get("RAY_ADDRESS", "") in ("", "local") and max(1, workers) * threads > cores():
        flags = f"--workers-per-trial {workers} --threads {threads}" if workers else f"--threads {threads}"
        raise UserError(f"search: {flags}: this machine has {cores()} CPUs; use fewer, or set RAY_ADDRESS")


@contextlib.contextmanager
def connected(threads: int, gpu: float, wait: int, workers: int = 0) -> Iterator[None]:
    """Be connected to a cluster that has room for a trial.

    Raises:
        UserError: there is none.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(cluster.connected(max(1, workers), threads, gpu, wait))
        except UserError as e:
            raise UserError(str(e).replace("--workers", "--workers-per-trial")) from None
        yield


def share(table: TaskTable, dataset: Dataset, config: Config, log: Callable[[str], None] = print) -> Shared:
    """What all trials have in common, put into the cluster's object store; says what is too large for it.

    Args:
        config: of any trial.

    Raises:
        UserError: the dataset or the task table is damaged.
    """
    import ray

    place, memory = Location.of(config.data.data), config.train.memory_mb << 20
    if config.train.workers == "0":
        stored, held = Stored.read(table, dataset, place, memory), None
        kept = stored.table.splits or {}
    else:  # read by Ray Data, which gives each worker its share
        from distmeta.parallel import launch, leash

        kept, held = launch.materialised(config, table, SPLITS), leash.create()
        stored = replace(Stored.read(table, dataset, place, 0), workers=ForWorkers(held, kept))
    if missing := [name for name in SPLITS if name not in kept and table.counts[name]["tasks"]]:
        names = " and ".join(missing)
        log(f"the {names} tasks are larger than --memory-mb: each trial streams them from the files")
    return Shared(ray.put(stored), held)


def resources(workers: int, threads: int, gpu: float) -> Any:
    """What Ray Tune reserves for a trial; the arguments as of `at_once`.

    The process of a trial with workers waits for them and takes no CPU: of those that it reserved, its own workers
    would find none. Ray Tune wants it to take something: the memory that it has.
    """
    from ray import tune

    if workers:
        return tune.PlacementGroupFactory([{"memory": _DRIVER_BYTES}])
    return room.bundle(threads, gpu)


def trials_now(workers: int, threads: int, gpu: float) -> int:
    """Trials that the cluster has room for now, at least one; the arguments as of `at_once`."""
    import ray

    if not ray.is_initialized():  # an interrupted search's thread: Ray would connect it to any cluster that it finds
        return 1
    return max(1, at_once(room.alive(), workers, threads, gpu))


def at_once(nodes: Sequence[Mapping[str, float]], workers: int, threads: int, gpu: float) -> int:
    """Trials that fit into a cluster side by side, so that none waits for what another one's workers hold.

    A worker is on one node, a trial's workers may be on several: what fits is a question of places for workers.

    Args:
        nodes: the resources of each.
        workers: of a trial; 0: it is one itself.
        threads: CPUs of each worker.
        gpu: share of one that each worker has; a share is never of two.
    """
    return sum(room.places(node, threads, gpu) for node in nodes) // max(1, workers)
