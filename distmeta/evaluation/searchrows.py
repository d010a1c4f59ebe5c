"""What a hyperparameter search found, as plain rows: its trials, the axes of its space, and what follows from them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from distmeta.evaluation import pareto
from distmeta.evaluation.charts import finite

Value = float | int | str | bool
COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
STATES = {COMPLETE: "completed", PRUNED: "pruned", FAILED: "failed"}
"""How a trial ends, and how it is called in a sentence."""


@dataclass(frozen=True)
class Axis:
    """One parameter's range: `low` to `high`, or `choices` without an order."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False
    choices: tuple[Value, ...] = ()

    def at(self, value: Value) -> float:
        """Where a value lies, 0 at the lower end and 1 at the upper; each choice in the middle of a part of its own."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        low, high, x = (math.log(v) if self.log else float(v) for v in (self.low, self.high, float(value)))
        return (x - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Values to write at the axis, and where: all choices; round numbers of a log scale; the ends."""
        if self.choices:
            return [(self.at(c), shown(c)) for c in self.choices]
        marks = [self.low, self.high] if self.high > self.low else [self.low]
        if self.log and self.high > self.low:
            base = 2 if self.whole else 10
            ends = math.ceil(math.log(self.low, base) - 1e-9), math.floor(math.log(self.high, base) + 1e-9)
            powers = [float(base) ** k for k in range(ends[0], ends[1] + 1)]
            marks = powers if len(powers) > 1 else marks
        return [(self.at(m), shown(m)) for m in marks]


@dataclass(frozen=True)
class Trial:
    """One trial that has ended."""

    number: int
    run: str
    """Name of its run directory."""
    state: str
    """One of STATES."""
    value: float | None
    """What it is judged by, less is better: of a complete trial its result, of others what they told last."""
    params: Mapping[str, Value]
    """Those that there was something to choose of."""
    curve: Mapping[int, float] = field(default_factory=dict)
    """Epoch -> what it told."""
    epochs: int = 0
    seconds: float | None = None
    """In training; None where it did not tell."""
    source: str = ""
    """Who asks for it, where the sampler did not choose it."""
    default: bool = False
    """Whether it has the method's defaults."""
    failure: str = ""
    deviation: float | None = None
    """Standard deviation of its value over seeds, where it has several."""


@dataclass(frozen=True)
class Launch:
    """From a start of the search to its end, or to when it was last seen."""

    seconds: float
    slots: float
    """Trials that there was room for at a time."""


@dataclass(frozen=True)
class Search:
    """A study as it stands."""

    method: str
    dataset: str
    protocol: str
    objective: str
    """What a trial's value is, in words: `validation MAE`."""
    axes: tuple[Axis, ...]
    trials: tuple[Trial, ...]
    """Those that have ended, by number."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """Parameter -> share of what the parameters explain; empty where `unknown` says why there is none."""
    unknown: str = ""
    launches: tuple[Launch, ...] = ()
    unfinished: float = 0.0
    """Seconds of training of trials that have not ended."""
    several: bool = False
    """Whether the study has training seconds as a second objective."""

    def judged(self) -> list[Trial]:
        """Complete trials that have a number, the best first."""
        found = [t for t in self.trials if t.state == COMPLETE and finite(t.value)]
        return sorted(found, key=lambda t: (t.value, t.number))

    @property
    def best(self) -> Trial | None:
        return next(iter(self.judged()), None)

    @property
    def default(self) -> Trial | None:
        """The trial with the method's defaults; the last, where it was made again."""
        return next((t for t in reversed(self.trials) if t.default), None)

    def counts(self) -> dict[str, int]:
        """Trials by state, each of STATES."""
        found = Counter(t.state for t in self.trials)
        return {state: found[state] for state in STATES}

    def times(self) -> dict[str, float]:
        """Seconds of training by state, each of STATES."""
        known = [(t.state, t.seconds) for t in self.trials if finite(t.seconds)]
        return {state: math.fsum(seconds for s, seconds in known if s == state) for state in STATES}

    def trained(self) -> float:
        """Seconds of training of all trials."""
        return math.fsum([*self.times().values(), self.unfinished])

    def beside(self) -> float | None:
        """Seconds that there was room for trials and none was trained: starting, proposing, waiting for the last.

        None where no launch was recorded.
        """
        if not self.launches:
            return None
        return max(0.0, math.fsum(x.seconds * x.slots for x in self.launches) - self.trained())


def shown(value: Value) -> str:
    """A parameter's value for people: three digits of a number that is not whole."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) and not value.is_integer() else f"{value}".removesuffix(".0")


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Complete trials than which no other is at once as good, as fast, and better in one; the fastest first."""
    able = [
        (t.seconds, t.value, t)
        for t in sorted(trials, key=lambda t: t.number)
        if t.state == COMPLETE and finite(t.value) and finite(t.seconds)
    ]
    return [able[i][2] for i in pareto.front([(seconds, value) for seconds, value, _ in able])]


def so_far(trials: Sequence[Trial]) -> list[tuple[int, float]]:
    """Number and value of each complete trial that was better than all before it."""
    found: list[tuple[int, float]] = []
    for t in trials:
        if t.state == COMPLETE and finite(t.value) and (not found or t.value < found[-1][1]):
            found.append((t.number, t.value))
    return found


def ceiling(values: Sequence[float]) -> float | None:
    """Beyond what a picture leaves values out, so that a few that went astray do not press the others flat.

    Twice as far from the lowest as four of five values, or five times as far as half of them, whichever is less; None
    where that would not leave out a third of the whole range.
    """
    if not values:
        return None
    low, half, most, high = np.quantile(values, [0.0, 0.5, 0.8, 1.0], method="lower")
    limit = float(low + min(2 * (most - low), 5 * (half - low)))
    return limit if high - low > 1.5 * (limit - low) > 0 else None
