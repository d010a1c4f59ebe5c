"""When a task of s²Meta stops: the controller that says how likely, and how that is decided in training and after.

While training, a task stops by a draw of its own, from which REINFORCE teaches the controller. Afterwards it stops at
the step by which a draw would more likely than not have stopped it, the median of what training sees: neither a seed
nor the task's id has a say in what is served. A threshold on the step's own probability would make all tasks go on to
the last step where that is a little under a half, which in training hardly any does.
"""

import math

import torch
from torch import Tensor, nn

from distmeta import draws
from distmeta.tasks import TaskBatch, TaskBlock


class Stop(nn.Module):
    """The stop controller (arXiv 1906.00391): an LSTM cell on one number for each tensor's gradient and the loss."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        n = tensors + 1
        self.lstm = nn.LSTMCell(n, 2 * n)
        self.head = nn.Linear(2 * n, 1)
        nn.init.zeros_(self.head.bias)
        self.state = nn.Parameter(torch.randn(2 * n))
        self.cell = nn.Parameter(torch.randn(2 * n))

    def begin(self, tasks: int) -> tuple[Tensor, Tensor]:
        return self.state.expand(tasks, -1), self.cell.expand(tasks, -1)

    def forward(self, seen: Tensor, before: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits [b] of stopping from what is seen [b, n], and the state after it."""
        h, c = self.lstm(seen, before)
        return self.head(h).squeeze(1), (h, c)


class Drawn:
    """Stops a task by a draw of its own at each step."""

    def __init__(self, batch: TaskBatch, block: TaskBlock) -> None:
        self.batch, self.task = batch, block.task.cpu().numpy()

    def stops(self, step: int, tasks: Tensor, going: Tensor) -> Tensor:
        """bool [k]: who stops before `step`, of the tasks int64 [k]; going [k]: log of the chance to go on."""
        b = self.batch
        u = draws.uniform(b.seed, b.epoch, self.task[tasks.cpu().numpy()], step, purpose="s2meta/stop")
        return torch.from_numpy(u).to(going.device) < -torch.expm1(going.double())


class Median:
    """Stops a task at the first step before which a draw would have stopped it with a chance of a half or more."""

    def __init__(self, block: TaskBlock) -> None:
        self.chance = torch.zeros(len(block.task), dtype=torch.float64, device=block.task.device)
        """Of each task [b], log of its chance to have gone on."""

    def stops(self, step: int, tasks: Tensor, going: Tensor) -> Tensor:
        """As `Drawn.stops`."""
        self.chance[tasks] += going
        return self.chance[tasks] <= -math.log(2)
