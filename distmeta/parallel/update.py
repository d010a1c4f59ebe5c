"""One meta-update: local gradients, one exchange, the same AdamW step on every worker."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from distmeta import process
from distmeta.adaptation import precision
from distmeta.config import Config, TrainOptions
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.exchange import Exchange
from distmeta.methods import method_class
from distmeta.methods.base import Method
from distmeta.parallel.shared import share
from distmeta.tasks import Bag, TaskBatch


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
        raise UserError(
            "--gpu: torch sees no GPU here; leave the flag out, say --no-gpu, or install a torch built for yours"
        )
    return torch.device("cuda", torch.cuda.current_device())  # by number: the current one is a thread's own


def check_shares(gpu: float, workers: int, flag: str = "--workers") -> None:
    """UserError where workers that train together would share a GPU, which NCCL refuses."""
    if 0 < gpu < 1 < workers:
        raise UserError(
            f"--gpu {gpu:g} {flag} {workers}: workers that train together have a GPU each; give --gpu 1, or"
            f" {flag} {1 if flag == '--workers' else 0} (a search runs several such trials on one GPU)"
        )


@contextlib.contextmanager
def numerics(options: TrainOptions, device: torch.device) -> Iterator[None]:
    """Fix what sums depend on in their last bits: the number of threads, --precision; on CPU, deterministic kernels."""
    deterministic: Any = torch.utils.deterministic  # a module with a property, which its stubs do not know
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.set_num_threads(options.threads or process.cores())
    torch.use_deterministic_algorithms(device.type == "cpu")
    deterministic.fill_uninitialized_memory = False  # a debugging aid: a pass over new memory
    try:
        with precision.taken(options.precision, device):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def _untimed(phase: str) -> Iterator[None]:
    yield


_GENERATOR = threading.Lock()
"""torch's generator is the process's: workers that are threads would draw their initial parameters from each other."""


def build_method(
    config: Config, dataset: Dataset, items: dict[str, Bag], device: torch.device, exchange: Exchange | None = None
) -> Method:
    """The method with its initial parameters, which depend on --seed (and the shapes) alone.

    Args:
        exchange: of the workers that share its memories, who all call this; none: they are this process's own.
    """
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        known = dataset.without(config.data.leave_out)
        method = method_class(config.method)(config.method_options, known, items)
    share(method, config.train, exchange or Exchange())
    return method.to(device)


class MetaUpdate:
    """AdamW on the mean over the tasks of all workers of the method's loss, each gradient group by its own tasks.

    All gradients live in one buffer, of which every `.grad` is a view: backward fills it, one exchange sums it.
    It holds [gradients | sum of the losses | number of tasks | number of tasks of each group], so that a worker
    without tasks adds zeros and means are over the tasks of all. No DDP: it cannot do double backward.

    Slice k of a parameter that the method names in `grouped` is averaged over the tasks of group k, all others
    over all tasks. A slice whose group had no task on any worker keeps its value, its moments and its count of
    steps, and does not decay. A method that is `summed` gets its groups' sums in place of their means. `clip` bounds
    the norm of each of these by itself: of all parameters that are not grouped together, and of each group's slices
    together.
    """

    def __init__(self, method: Method, options: TrainOptions, exchange: Exchange, steps: float) -> None:
        """`steps`: meta-updates an epoch (the step size's cosine spans epochs · steps)."""
        self.method, self.options, self.exchange = method, options, exchange
        self.horizon = options.epochs * steps
        self.shrunk = 0
        """How often --plateau made the step size smaller."""
        self.params = {n: p for n, p in method.named_parameters() if p.requires_grad}
        self.counts = [0] * method.groups
        """Tasks of each group in the last update, over all workers."""
        grouped = _grouped(method)
        shared = {n: p for n, p in self.params.items() if n not in grouped}
        stacked = {n: p for n, p in self.params.items() if n in grouped}
        sizes = [p.numel() for p in shared.values()]
        widths = [p[0].numel() for p in stacked.values()]
        tail = 2 + method.groups
        like = next(iter(self.params.values()))
        self.flat = like.new_zeros(sum(sizes) + method.groups * sum(widths) + tail, requires_grad=False)
        self.tail = self.flat[-tail:]
        self.shared = self.flat[: sum(sizes)]
        stacks = self.flat[sum(sizes) : -tail].split([method.groups * w for w in widths])
        self.stacks = [part.view(method.groups, w) for part, w in zip(stacks, widths, strict=True)]
        """[groups, width] of each grouped parameter: row k holds the gradient of slice k."""
        for p, part in zip((*shared.values(), *stacked.values()), (*self.shared.split(sizes), *stacks), strict=True):
            p.grad = part.view_as(p)
        self.leaves: dict[str, Tensor] = dict(shared)
        """What AdamW sees, by name: parameters, and NAME.k for slice k of a grouped one (sharing its storage)."""
        self.groups: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(method.groups)]
        """Of each group its slices and their gradients."""
        for name, p in stacked.items():
            for k, group in enumerate(self.groups):
                self.leaves[f"{name}.{k}"] = leaf = p.detach()[k]
                assert p.grad is not None
                group.append((leaf, p.grad[k]))
        self.optimizer = torch.optim.AdamW(
            list(self.leaves.values()), lr=options.lr, weight_decay=options.weight_decay, fused=True
        )

    def rate(self, step: int) -> float:
        """Step size of meta-update `step`: along a cosine from lr to lr · lr_decay over epochs · steps, and smaller
        by what --plateau made of it, down to lr_least."""
        o, rate = self.options, self.options.lr
        if o.lr_decay != 1:
            cosine = 0.5 * (1 + math.cos(math.pi * step / self.horizon))
            rate = o.lr * (o.lr_decay + (1 - o.lr_decay) * cosine)
        return max(rate * o.plateau**self.shrunk, min(rate, o.lr_least)) if self.shrunk else rate

    def local(self, batch: TaskBatch, timed: Callable[[str], AbstractContextManager[None]] = _untimed) -> None:
        """Fill the buffer with this worker's sums over the tasks of `batch` (zeros where it has none).

        Args:
            timed: given `adapt` (the losses), then `backward`; measures the block.
        """
        with timed("adapt"):
            self.flat.zero_()
            if not len(batch):
                self.method.write()
                return
            losses, group = self.method.grouped_loss(batch)
        with timed("backward"):
            losses.sum().backward()
            self.tail[0] = losses.detach().sum()
            self.tail[1] = len(losses)
            self.tail[2:] = (group[:, None] == torch.arange(len(self.counts), device=group.device)).sum(0)
            self.method.write()
            self._settle()

    def _settle(self) -> None:
        """Wait for the GPU once a step, so that what it computes is not counted as the exchange, where `apply` would
        wait for it anyway. `adapt` is the time to queue that: what is left of it counts as `backward`."""
        if self.flat.device.type == "cuda":
            torch.cuda.synchronize(self.flat.device)

    def apply(self, batch: TaskBatch, step: int) -> tuple[float, float]:
        """Update from the exchanged buffer; the sum of the losses and the number of tasks, over all workers.

        Raises:
            NotFinite: on every worker; each names its own offending tasks of `batch`.
            ValueError: the method put a task into a group that it does not have.
        """
        n = len(self.counts)
        norms = torch.stack([self.flat.new_zeros(n), *(torch.linalg.vector_norm(part, dim=1) for part in self.stacks)])
        norm = torch.linalg.vector_norm(self.shared)
        loss, count, *rest = torch.cat([self.tail, torch.linalg.vector_norm(norms, dim=0), norm[None]]).tolist()
        if not (math.isfinite(loss) and all(map(math.isfinite, rest))):
            for shared in self.method.shared.values():  # nothing more is written, and blame is found by reading
                shared.discard()
            raise NotFinite("gradient" if math.isfinite(loss) else "loss", self._culprits(batch))
        for shared in self.method.shared.values():  # what the next step reads comes while this one ends
            shared.advance()
        counts, norms, norm = rest[:n], rest[n:-1], rest[-1]
        if sum(counts) != count:
            raise ValueError(f"{self.method.name}: grouped_loss gave a group outside of 0..{n - 1}")
        self.counts = [int(c) for c in counts]
        if count:
            self.shared.mul_(self._scale(count, norm))
            over = [float(c > 0) for c in counts] if self.method.summed else counts
            scales = self.flat.new_tensor([[self._scale(c, one)] for c, one in zip(over, norms, strict=True)])
            for part in self.stacks:
                part.mul_(scales)
            for touched, group in zip(self.counts, self.groups, strict=True):
                for leaf, grad in group:
                    leaf.grad = grad if touched else None  # AdamW passes over one without
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.optimizer.step()
        return loss, count

    def _scale(self, count: float, norm: float) -> float:
        """What makes a sum over `count` tasks, of norm `norm`, their mean, clipped; 0 where there are none."""
        if not count:
            return 0.0
        clip = self.options.clip
        return clip / norm if clip and norm * (1 / count) > clip else 1 / count

    def _culprits(self, batch: TaskBatch) -> list[int]:
        """Ids of the tasks whose loss is not finite, or else of those whose gradient is not, each task by itself.

        Of a batch together that could not be told: backward through a task with an infinite derivative makes
        0 · inf of every other task's gradient.
        """
        if not len(batch):
            return []
        ids = torch.cat([block.task for block in batch])
        bad = ~self.method.grouped_loss(batch)[0].detach().isfinite()
        if not bad.any():
            params = list(self.params.values())
            for i, alone in enumerate(_each(batch)):
                grads = torch.autograd.grad(self.method.grouped_loss(alone)[0].sum(), params, allow_unused=True)
                bad[i] = any(not g.isfinite().all() for g in grads if g is not None)
        return ids[bad].tolist()

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state by parameter name: NAME.step, NAME.exp_avg, NAME.exp_avg_sq; zeros at first.

        Of a grouped parameter NAME.k.step, … for each of its slices k.
        """
        slots = {}
        for name, p in self.leaves.items():
            state = self.optimizer.state[p]
            slots[f"{name}.step"] = state.get("step", torch.zeros((), device=p.device))
            for key in ("exp_avg", "exp_avg_sq"):
                slots[f"{name}.{key}"] = state.get(key, torch.zeros_like(p))
        return slots

    def reset(self, k: int) -> None:
        """Have AdamW begin anew with the slices of group k: moments and count of steps 0."""
        for leaf, _ in self.groups[k]:
            self.optimizer.state.pop(leaf, None)

    def set_moments(self, moments: dict[str, Tensor]) -> None:
        """Take up the state that `moments` gave: the same names, shapes and types."""
        for name, p in self.leaves.items():
            self.optimizer.state[p] = {
                key: moments[f"{name}.{key}"].to(p.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }


def _grouped(method: Method) -> frozenset[str]:
    """`method.grouped()`; ValueError for a name or a shape that cannot be."""
    params, names = dict(method.named_parameters()), method.grouped()
    for name in sorted(names):
        if name not in params or params[name].shape[:1] != (method.groups,):
            raise ValueError(f"{method.name}: grouped parameter {name} is none of shape [{method.groups}, ...]")
    return names


def _each(batch: TaskBatch) -> Iterator[TaskBatch]:
    """The tasks of a batch one by one, in block order."""
    for block in batch:
        for i in range(len(block.task)):
            yield replace(batch, blocks=(block.take(torch.arange(i, i + 1, device=block.task.device)),))
