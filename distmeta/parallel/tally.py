"""How a search stands: its trials by how they ended, the best so far, and where the CPUs' time went."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from distmeta.parallel.progress import clock, number


@dataclass
class Tally:
    """How the trials of a study ended."""

    name: str
    trials: int
    """To be finished."""
    failures: float
    """Share of them that may fail."""
    done: int = 0
    pruned: int = 0
    failed: int = 0
    best: float = math.inf
    best_run: str = ""
    reasons: list[str] = field(default_factory=list)
    """Of those that failed."""
    began: float = field(default_factory=time.monotonic)
    before: int = 0
    """Trials that had ended when this launch began."""
    closed: bool = False
    """The search was given up: what becomes of its trials from here on is no result."""

    @property
    def ended(self) -> int:
        return self.done + self.pruned + self.failed

    @property
    def hopeless(self) -> bool:
        """Whether more have failed than may."""
        return self.failed > self.failures * self.trials

    def count(self, state: TrialState, value: float | None, run: str, failure: str) -> None:
        """A trial has ended."""
        self.done += state == TrialState.COMPLETE
        self.pruned += state == TrialState.PRUNED
        if state == TrialState.FAIL:
            self.failed += 1
            self.reasons.append(f"{run}: {failure}")
        if value is not None and value < self.best:
            self.best, self.best_run = value, run

    def text(self, running: int) -> str:
        """`melu  12/40  running 2  pruned 5  failed 0  best .741 (0007)  ETA 3:20`."""
        best = f"  best {number(self.best)} ({self.best_run})" if self.best_run else ""
        here = self.ended - self.before
        left = (time.monotonic() - self.began) / here * (self.trials - self.ended) if here else 0.0
        eta = f"  ETA {clock(left)}" if here and self.ended < self.trials else ""
        return (
            f"{self.name}  {self.ended}/{self.trials}  running {running}  pruned {self.pruned}"
            f"  failed {self.failed}{best}{eta}"
        )


def counted(trial: FrozenTrial) -> bool:
    """Whether a trial has ended."""
    return trial.state.is_finished()


def tally(study: optuna.Study, trials: int, failures: float) -> Tally:
    """How the trials of a study have ended so far."""
    found = Tally(study.study_name, trials, failures)
    for trial in filter(counted, study.trials):
        value = trial.values[0] if trial.state == TrialState.COMPLETE else None
        found.count(trial.state, value, trial.user_attrs.get("run", ""), trial.user_attrs.get("failure", ""))
    found.before = found.ended
    return found


def lowest(study: optuna.Study) -> FrozenTrial | None:
    """The complete trial of the lowest error, the first objective; none is complete: None."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(done, key=lambda t: (t.values[0], t.number), default=None)


class Launch:
    """This launch in the study's attribute `launches`, so that its time counts whatever becomes of its process."""

    def __init__(self, study: optuna.Study, cpus: float) -> None:
        self.study, self.before = study, study.user_attrs.get("launches", [])
        self.began, self.start, self.cpus, self.kept = time.time(), time.monotonic(), cpus, 0.0

    def keep(self, every: float = 0.0) -> None:
        """Write how long it lasts by now, unless that was done in the last `every` seconds."""
        seconds = time.monotonic() - self.start
        if not self.kept or seconds - self.kept >= every:
            self.kept = seconds
            mine = {"began": self.began, "seconds": round(seconds, 3), "cpus": self.cpus}
            self.study.set_user_attr("launches", [*self.before, mine])


def spent(study: optuna.Study, threads: int) -> tuple[float, float]:
    """The share of the CPUs' time, over all launches, that trials spent in training and validation; and how many
    seconds of a trial's CPUs, for each trial that ended, went by beside it: starting, proposing, waiting for the last.

    Epochs that a kill undid count as beside it.

    Args:
        threads: CPUs of a trial.
    """
    launches: Sequence[dict[str, Any]] = study.user_attrs.get("launches", [])
    had = sum(x["seconds"] * x["cpus"] for x in launches)
    ended = [t for t in study.trials if counted(t)]
    trained = threads * sum(t.user_attrs.get("seconds", 0.0) for t in study.trials)
    if not had or not ended:
        return 0.0, 0.0
    return trained / had, (had - trained) / threads / len(ended)


def summary(study: optuna.Study, threads: int) -> str:
    """`melu: best validation mae .498 (0003), the method's defaults .512 (0000); CPU in training 87 %, …`."""
    best, judged = lowest(study), study.user_attrs.get("metric", "error")
    share, beside = spent(study, threads)
    text = f"{study.study_name}: best validation {judged} "
    text += f"{best.values[0]:.4f} ({best.user_attrs['run']})" if best else "of no trial: none was completed"
    plain = next((t for t in study.trials if t.user_attrs.get("run") == "0000" and counted(t)), None)
    if plain:
        text += f", {plain.user_attrs.get('source', 'the first trial')} {_outcome(plain)}"
    return f"{text}; CPU in training {100 * share:.0f} %, {beside:.1f} s a trial beside training"


def _outcome(trial: FrozenTrial) -> str:
    if trial.values:
        return f"{trial.values[0]:.4f}"
    if trial.state == TrialState.PRUNED:
        told = trial.intermediate_values
        return f"{told[max(told)]:.4f} when stopped after epoch {max(told)}" if told else "were stopped"
    return "failed"
