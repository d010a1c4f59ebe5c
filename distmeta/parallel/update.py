"""One meta-update: local gradients, one exchange, the same AdamW step on every worker."""

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from distmeta.config import Config, TrainOptions
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.methods import method_class
from distmeta.methods.base import Method
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock


class Exchange:
    """How workers add up their numbers. This one is for one process, where the sum is the number itself."""

    rank: int = 0
    world: int = 1

    def sum(self, flat: Tensor) -> Tensor:
        """Replace the 1-d tensor `flat` by its sum over all workers, in place, and return it."""
        return flat


class NotFinite(ArithmeticError):
    """The loss or its gradient is not finite; the parameters are those before the step.

    Args:
        what: `loss` or `gradient`.
        tasks: ids of this worker's tasks to blame; empty where each of them alone is finite.
    """

    def __init__(self, what: str, tasks: list[int]) -> None:
        super().__init__(what, tasks)
        self.what, self.tasks = what, tasks


def device_of(options: TrainOptions) -> torch.device:
    """Where the run computes; UserError for --gpu without one."""
    if not options.gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--gpu: torch sees no GPU here; leave the flag out, or install a torch built for yours")
    return torch.device("cuda")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def numerics(threads: int, device: torch.device) -> Iterator[None]:
    """Fix the number of threads (sums depend on it in their last bits); on CPU, deterministic kernels."""
    deterministic: Any = torch.utils.deterministic  # a module with a property, which its stubs do not know
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads or cores())
    torch.use_deterministic_algorithms(device.type == "cpu")
    deterministic.fill_uninitialized_memory = False  # a debugging aid: a pass over new memory
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        deterministic.fill_uninitialized_memory = fill


_GENERATOR = threading.Lock()
"""torch's generator is the process's: workers that are threads would draw their initial parameters from each other."""


def build_method(config: Config, dataset: Dataset, items: dict[str, Bag], device: torch.device) -> Method:
    """The method with its initial parameters, which depend on --seed (and the shapes) alone."""
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        method = method_class(config.method)(config.method_options, dataset, items)
    return method.to(device)


class MetaUpdate:
    """AdamW on the mean over the tasks of all workers of `method.loss`.

    All gradients live in one buffer [parameters + 2] of which every `.grad` is a view: backward fills it, one
    exchange sums it. Its last two numbers are the sum of the losses and the number of tasks, so that a worker
    without tasks adds zeros and the mean is over the tasks of all. No DDP: it cannot do double backward.
    """

    def __init__(self, method: Method, options: TrainOptions, exchange: Exchange, steps: int) -> None:
        """`steps`: meta-updates an epoch (the step size's cosine spans epochs · steps)."""
        self.method, self.options, self.exchange = method, options, exchange
        self.horizon = options.epochs * steps
        self.params = {n: p for n, p in method.named_parameters() if p.requires_grad}
        values = list(self.params.values())
        self.optimizer = torch.optim.AdamW(values, lr=options.lr, weight_decay=options.weight_decay, fused=True)
        sizes = [p.numel() for p in values]
        self.flat = torch.zeros(sum(sizes) + 2, dtype=values[0].dtype, device=values[0].device)
        for p, part in zip(values, self.flat[:-2].split(sizes), strict=True):
            p.grad = part.view_as(p)

    def rate(self, step: int) -> float:
        """Step size of meta-update `step`: along a cosine from lr to lr · lr_decay over epochs · steps."""
        o = self.options
        if o.lr_decay == 1:
            return o.lr
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.horizon))
        return o.lr * (o.lr_decay + (1 - o.lr_decay) * cosine)

    def local(self, batch: TaskBatch) -> None:
        """Fill the buffer with this worker's sums over the tasks of `batch` (zeros where it has none)."""
        flat = self.flat
        flat.zero_()
        if len(batch):
            losses = self.method.loss(batch)
            losses.sum().backward()
            flat[-2] = losses.detach().sum()
            flat[-1] = len(losses)
        if flat.is_cuda:
            torch.cuda.synchronize()  # so that the phases' seconds are true; the exchange would wait anyway

    def apply(self, batch: TaskBatch, step: int) -> tuple[float, float]:
        """Update from the exchanged buffer; the sum of the losses and the number of tasks, over all workers.

        Raises:
            NotFinite: on every worker; each names its own offending tasks of `batch`.
        """
        grads = self.flat[:-2]
        norm = torch.linalg.vector_norm(grads)
        loss, count, norm = torch.stack([*self.flat[-2:], norm]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite("gradient" if math.isfinite(loss) else "loss", self._culprits(batch))
        if count:
            scale = 1 / count
            if self.options.clip and norm * scale > self.options.clip:
                scale = self.options.clip / norm
            grads.mul_(scale)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.optimizer.step()
        return loss, count

    def _culprits(self, batch: TaskBatch) -> list[int]:
        """Ids of the tasks whose loss is not finite, or else of those whose gradient is not, each task by itself.

        Of a batch together that could not be told: backward through a task with an infinite derivative makes
        0 · inf of every other task's gradient.
        """
        if not len(batch):
            return []
        ids = torch.cat([block.task for block in batch])
        bad = ~self.method.loss(batch).detach().isfinite()
        if not bad.any():
            params = list(self.params.values())
            for i, alone in enumerate(_each(batch)):
                grads = torch.autograd.grad(self.method.loss(alone).sum(), params, allow_unused=True)
                bad[i] = any(not g.isfinite().all() for g in grads if g is not None)
        return ids[bad].tolist()

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state by parameter name: NAME.step, NAME.exp_avg, NAME.exp_avg_sq; zeros at first."""
        slots = {}
        for name, p in self.params.items():
            state = self.optimizer.state[p]
            slots[f"{name}.step"] = state.get("step", torch.zeros((), device=p.device))
            for key in ("exp_avg", "exp_avg_sq"):
                slots[f"{name}.{key}"] = state.get(key, torch.zeros_like(p))
        return slots

    def set_moments(self, moments: dict[str, Tensor]) -> None:
        """Take up the state that `moments` gave: the same names, shapes and types."""
        for name, p in self.params.items():
            self.optimizer.state[p] = {
                key: moments[f"{name}.{key}"].to(p.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }


def _each(batch: TaskBatch) -> Iterator[TaskBatch]:
    """The tasks of a batch one by one, in block order."""
    for block in batch:
        for i in range(len(block.task)):
            row = torch.arange(i, i + 1, device=block.task.device)
            user = {name: bag.take(row) for name, bag in block.user.items()}
            sides = [Rows(r.item[row], r.label[row], r.mask[row]) for r in (block.support, block.query)]
            yield replace(batch, blocks=(TaskBlock(block.task[row], user, *sides),))
