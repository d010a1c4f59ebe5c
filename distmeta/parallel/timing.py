"""Where a worker's seconds go: sums by phase, the times of single steps, and what the workers' make together."""

import contextlib
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

PHASES = ("input", "adapt", "backward", "exchange", "optimizer", "checkpoint", "validation")
"""adapt: the loss forward, inner loop included (on a GPU until it is queued; what is left of it is backward).
input: waiting for the batch, and moving it to the device."""
OF_A_STEP = PHASES[:-1]
_EXCHANGE = OF_A_STEP.index("exchange")
_BUSY = [OF_A_STEP.index(p) for p in ("input", "adapt", "backward", "optimizer")]
KEPT = 1 << 15
"""Most steps of an epoch whose times are kept, and gathered from all workers: 48 bytes each."""


class Times:
    """This worker's times of the epoch under way.

    Args:
        sums: seconds by phase, counted on in place; they may include those of an earlier launch, while single
            steps are only those of this one.
    """

    def __init__(self, sums: dict[str, float]) -> None:
        self.sums = sums
        self._phase: str | None = None
        self._since = 0.0
        self._steps, self._stride = 0, 1
        self._rows = array("d")
        self._start = self._before = self._read()
        self._peak = [0.0] * len(OF_A_STEP)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the block as `name`; a phase within it counts as its own alone."""
        outer = self._phase
        self._turn(name)
        try:
            yield
        finally:
            self._turn(outer)

    def _turn(self, phase: str | None) -> None:
        now = time.perf_counter()
        if self._phase is not None:
            self.sums[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def _read(self) -> list[float]:
        return [self.sums[p] for p in OF_A_STEP]

    def step(self) -> None:
        """A step ends: what was counted since the one before is its own.

        Of an epoch with more than KEPT steps every second, then every fourth, … is kept; sums and maxima are
        of all.
        """
        now = self._read()
        row = [a - b for a, b in zip(now, self._before, strict=True)]
        self._before = now
        self._peak = list(map(max, self._peak, row))
        if self._steps % self._stride == 0:
            if len(self._rows) == KEPT * len(row):
                self._rows = array("d", np.array(self._rows).reshape(-1, len(row))[::2].ravel())
                self._stride *= 2  # KEPT is even, so this step stands on the new stride too
            self._rows.extend(row)
        self._steps += 1

    def learning(self) -> float:
        """Seconds of the epoch but for validation."""
        return sum(v for k, v in self.sums.items() if k != "validation")

    def packed(self) -> bytes:
        """What `together` wants of each worker: float64 [1 + 2·P + kept·P], P phases of a step."""
        spent = [a - b for a, b in zip(self._before, self._start, strict=True)]
        return np.array([self._steps, *self._peak, *spent, *self._rows]).tobytes()


def together(packed: Sequence[bytes]) -> dict[str, Any]:
    """The workers' step times in a metrics line, from each one's `Times.packed` in rank order.

    Returns:
        world: number of workers. step_ms: phase -> [median, 95th percentile, maximum] over steps and workers.
        skew: by rank, the seconds it was busy itself (input, adapt, backward, optimizer).
        exchange_wait_s: seconds that a worker waited in exchanges for the slowest: what its exchange took more
            than the shortest of that step, summed over steps, mean over workers.
        mean_s: phase -> seconds of all steps, mean over workers.
    """
    p = len(OF_A_STEP)
    flat = np.stack([np.frombuffer(data) for data in packed])
    steps, peak, spent = flat[0, 0], flat[:, 1 : 1 + p], flat[:, 1 + p : 1 + 2 * p]
    rows = flat[:, 1 + 2 * p :].reshape(len(flat), -1, p)  # [ranks, steps kept, phases]
    middle, high = np.quantile(rows.reshape(-1, p), [0.5, 0.95], axis=0)
    table = 1000 * np.stack([middle, high, peak.max(0)], 1)
    exchange = rows[:, :, _EXCHANGE]
    waited = (exchange - exchange.min(0)).mean(0)
    return {
        "world": len(flat),
        "step_ms": dict(zip(OF_A_STEP, table.tolist(), strict=True)),
        "exchange_wait_s": float(waited.mean() * steps),
        "skew": spent[:, _BUSY].sum(1).tolist(),
        "mean_s": dict(zip(OF_A_STEP, spent.mean(0).tolist(), strict=True)),
    }
