"""The contract between a method and the rest: what a method is given, and what it must answer.

A method knows nothing of ranks, files or Ray. It is constructed from its options, the dataset's manifest and
the items' fields, and then learns in one of two ways:

- by gradient: `loss(batch)` gives the per-task query loss with graph; the trainer averages over all tasks;
- in closed form: `statistics(batch, sweep)` gives additive sums, `solve(statistics, sweep)` takes their total
  over all tasks and workers. `sweeps` says how many passes over the training tasks it wants.

A method that learns by gradient may keep several sets of some parameters, of which each task uses one: `groups`
says how many, `grouped()` which parameters, `grouped_loss(batch)` whose set each task used. A set is then
averaged over its own tasks, and one that no task used stays as it is.

What it learns before its first task (vectors of users and items, say), it takes from the training positives: it
`prepares`, and `prepare(user, item)` is called once for all workers, who are given the parameters it came to. One that
`surveys` is told before what surrounds the scenarios.

It may also read and write state that the tasks of all workers share: `memories()` declares it, `self.shared` holds
what it is reached through, `write()` hands over what a step's tasks wrote.

Either way `adapt(batch)` looks at support rows only and `predict(state, batch)` scores the query rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distmeta.data.domains import Surroundings
from distmeta.data.schema import Dataset
from distmeta.memory.base import Memory, Shared
from distmeta.tasks import Bag, TaskBatch


class Method(nn.Module, ABC):
    """Base of every method.

    Args:
        options: the method's own dataclass from `distmeta.methods.options`.
        dataset: manifest of the dataset (fields with sizes, label range, number of items).
        items: the items' fields: Bags of `dataset.items` rows, by field name.
    """

    name: ClassVar[str]
    sweeps: int = 0
    """0: learned by gradient. Otherwise the number of statistics/solve passes."""
    groups: int = 1
    """Number of gradient groups (clusters of tasks)."""
    prepares: bool = False
    """Whether `prepare` is to be called before training begins."""
    surveys: bool = False
    """Whether `survey` is to be called before `prepare`."""
    summed: bool = False
    """Whether a group's set takes the sum over its tasks and not their mean."""

    def __init__(self, options: Any, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__()
        self.options = options
        self.dataset = dataset
        self.shared: dict[str, Shared] = {}
        """The shared memories by name. In this process, unless the trainer sets others."""

    def memories(self) -> dict[str, Memory]:
        """The states that all workers share, empty, by name."""
        return {}

    def survey(self, around: Surroundings) -> None:
        """Take note of what surrounds the scenarios, in the process where `prepare` is called next."""
        raise TypeError(f"{self.name} does not ask what surrounds the scenarios")

    def prepare(self, user: NDArray[np.int64], item: NDArray[np.int64]) -> Iterator[str]:
        """Set the parameters that are learned beforehand from the training positives (user, item), each pair once, by
        (user, item); yields what there is to say meanwhile. Called in one process alone, for all."""
        raise TypeError(f"{self.name} has nothing to prepare")

    def write(self) -> None:
        """Write to `shared` what the tasks of the step came to; called once a step after backward, also on a worker
        that had no task (which writes empty arrays)."""

    def facts(self, state: list[Any], batch: TaskBatch) -> dict[str, list[Tensor]]:
        """Numbers [b] of each block's tasks that a report shows (their step size, their cluster), by name."""
        return {}

    def traits(self, state: list[Any], batch: TaskBatch) -> dict[str, list[Tensor]]:
        """Vectors [b, w] of each block's tasks that a report draws (their context, their routes), by name; asked of a
        sample of the test tasks (evaluation/sample.py)."""
        return {}

    @abstractmethod
    def adapt(self, batch: TaskBatch) -> list[Any]:
        """Adapted state of each block, from user fields and support rows alone (never `block.query`)."""

    @abstractmethod
    def predict(self, state: list[Any], batch: TaskBatch) -> list[Tensor]:
        """Scores [b, Q] of the query rows of each block, given `adapt`'s state for the same tasks."""

    def loss(self, batch: TaskBatch) -> Tensor:
        """Query loss [B] of each task after adaptation, in block order, with graph to the parameters."""
        raise TypeError(f"{self.name} is solved in closed form; it has no loss")

    def grouped(self) -> frozenset[str]:
        """Names of the parameters of shape [groups, ...] whose slice k belongs to the tasks of group k alone."""
        return frozenset()

    def grouped_loss(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """`loss` [B] with graph, and the group of each task: int64 [B] in 0..groups−1.

        The loss of a task of group k reaches slice k of the `grouped` parameters and no other.
        """
        losses = self.loss(batch)
        return losses, torch.zeros(len(losses), dtype=torch.int64, device=losses.device)

    def statistics(self, batch: TaskBatch, sweep: int) -> dict[str, Tensor]:
        """Additive sums over the batch's tasks, support and query rows alike, that `solve` needs.

        Dense tensors, or sparse ones over the items of the batch.
        """
        raise TypeError(f"{self.name} is learned by gradient; it has no statistics")

    def solve(self, statistics: dict[str, Tensor], sweep: int) -> None:
        """Set the parameters (buffers) from the statistics summed over all training tasks."""
        raise TypeError(f"{self.name} is learned by gradient; it has no statistics")


@torch.no_grad()
def fit_closed_form(
    method: Method,
    batches: Callable[[int], Iterable[TaskBatch]],
    reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Learn a method in closed form: for each sweep sum its statistics over the training tasks, then solve.

    Args:
        batches: sweep -> the training tasks, each exactly once (on this worker).
        reduce: adds the sums of all workers (dense tensors, the same names and shapes everywhere, also on a
            worker without tasks); none: this worker has all tasks.

    Raises:
        UserError: there is no training rating at all.
    """
    for sweep in range(method.sweeps):  # at most one sweep's totals at a time: of millions of items they are gigabytes
        method.solve(_totals(method, batches(sweep), sweep, reduce or (lambda sums: sums)), sweep)


def _totals(
    method: Method,
    batches: Iterable[TaskBatch],
    sweep: int,
    reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """A sweep's statistics summed over all tasks, dense."""
    device = next(method.buffers()).device
    nothing = TaskBatch(items=torch.zeros(0, dtype=torch.int64, device=device), blocks=())
    # the sums of no tasks say which names and shapes there are
    total = {name: value.to_dense() for name, value in method.statistics(nothing, sweep).items()}
    for batch in batches:
        for name, value in method.statistics(batch.to(device), sweep).items():
            total[name] += value
    return reduce(total)
