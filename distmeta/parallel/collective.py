"""The exchange between worker processes: sums and gathers on torch.distributed (gloo on CPUs, NCCL on GPUs)."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from distmeta.exchange import Exchange


class ExchangeBroken(RuntimeError):
    """Another worker died, hung or left: this one cannot go on, a new group of workers can."""


class TorchExchange(Exchange):
    """An Exchange over the default process group, which Ray Train has made where there are several workers."""

    def __init__(self) -> None:
        several = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.calls = 0
        """Exchanges that this worker has come to; the same number on all workers means the same exchange."""
        self.since: float | None = None
        """When it came to the exchange that it is in, by time.monotonic; none: it is in none."""

    def sum(self, flat: Tensor) -> Tensor:
        """Replace the 1-d tensor `flat` by its sum over all workers, in place, and return it.

        The order of the additions depends on the number of workers alone, so equal runs give equal bits.

        Raises:
            ExchangeBroken: another worker died, or did not come within the group's timeout.
        """
        if self.world > 1:
            self._run(lambda: dist.all_reduce(flat))
        return flat

    def gather(self, data: bytes) -> list[bytes]:
        """Everyone's `data`, by rank, on every worker. Sizes may differ."""
        if self.world == 1:
            return [data]
        mine = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        self._run(lambda: dist.all_gather(sizes, torch.tensor([len(data)])))
        width = max(1, *(int(n) for n in sizes))
        padded = torch.zeros(width, dtype=torch.uint8)
        padded[: len(mine)] = mine
        everyone = [torch.empty(width, dtype=torch.uint8) for _ in range(self.world)]
        self._run(lambda: dist.all_gather(everyone, padded))
        return [row[: int(n)].numpy().tobytes() for row, n in zip(everyone, sizes, strict=True)]

    def _run(self, collective: Callable[[], object]) -> None:
        self.calls += 1
        self.since = time.monotonic()
        try:
            collective()
        except (RuntimeError, ValueError) as e:  # it stays inside: that is where its last sign of life shows it
            if isinstance(e, ValueError) and dist.is_initialized():
                raise  # it is not that Ray Train has taken the group down under a worker that still computes
            raise ExchangeBroken(f"worker {self.rank}: exchange {self.calls} failed: {e}") from e
        self.since = None

    @property
    def waited(self) -> float:
        """Seconds that it has been in its exchange; 0 where it is in none."""
        return 0.0 if self.since is None else time.monotonic() - self.since
