"""What frees the workers of a search's trial, however the trial ends: it stands in the search's own driver.

The resources of Ray Train's workers are a placement group that its controller reserves. Ray gives it up when the
controller ends in peace; where the trial is stopped or killed, the group outlives its controller as long as the search
does, and no later trial finds room. (Ray's own remedy asks the dashboard, which a cluster need not have.)
"""

import contextlib
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util import remove_placement_group

_ABORT_S = 15.0
"""Seconds that a controller has to end its workers."""


class Leash:
    """An actor's state: what each run holds."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[list[Any], list[Any]]] = {}

    def hold(self, run: str, controllers: list[Any], groups: list[Any]) -> None:
        """A run has these controllers and placement groups, besides what it has already."""
        mine = self.held.setdefault(run, ([], []))
        mine[0].extend(controllers)
        mine[1].extend(groups)

    def free(self, run: str) -> int:
        """End all that a run, or one of its other seeds, holds: controllers, which would replace what is lost, first.

        Returns:
            How many placement groups that were.
        """
        found = [self.held.pop(name) for name in list(self.held) if name == run or name.startswith(f"{run}-seed")]
        groups = [group for _, mine in found for group in mine]
        for controller in (c for mine, _ in found for c in mine):
            # asked to, it also ends an actor of 200 MB that is there to watch it, and would look for it for ever
            with contextlib.suppress(RayError, ValueError):
                ray.get(controller.abort.remote(), timeout=_ABORT_S)
            with contextlib.suppress(RayError, ValueError):
                ray.kill(controller)
        for group in groups:
            with contextlib.suppress(RayError, ValueError):
                remove_placement_group(group)
        return len(groups)


def create() -> Any:
    """A handle of a new Leash, which ends with this driver; one trial that is slow to end holds up no other."""
    return ray.remote(Leash).options(num_cpus=0, max_concurrency=16).remote()


class Held(ControllerCallback, WorkerGroupCallback):
    """Tells a leash what a run holds; runs in Ray Train's controller."""

    def __init__(self, leash: Any, run: str) -> None:
        self.leash, self.run = leash, run

    def after_controller_start(self, train_run_context: Any) -> None:
        """The controller, before it has workers."""
        ray.get(self.leash.hold.remote(self.run, [ray.get_runtime_context().current_actor], []))

    def after_worker_group_start(self, worker_group: Any) -> None:
        """The group of workers, before it works."""
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        ray.get(self.leash.hold.remote(self.run, [], [group]))
