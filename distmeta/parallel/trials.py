"""A search's trials: each trains in a process of Ray Tune's, tells its validation error after every epoch, and can be
stopped early. The Optuna study is the one record of the search; Ray Tune's own state is written and never read.

A trial's checkpoint is its run directory, OUT/METHOD/NNNN: whichever process trains there goes on from it.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState

from distmeta.errors import RunError
from distmeta.parallel import cluster, trialrun
from distmeta.parallel.progress import Progress, clock, number
from distmeta.parallel.stored import Stored
from distmeta.parallel.trialrun import OBJECTIVE
from distmeta.storage import Location

_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay what they are
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # of its own state, which is never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Plan:
    """What a search of one method asks for."""

    method: str
    trials: int
    """To be finished, failed ones among them, those of launches before this one too."""
    epochs: int
    """Of a trial that is not stopped early."""
    failures: float
    """Share of `trials` that may fail."""
    pruning: bool
    """Whether ASHA stops trials that fall behind."""
    grace: int
    """Epochs of every trial, before ASHA judges it."""
    threads: int
    """CPUs of a trial."""
    stored: Any
    """What all trials have in common, as `share` gives it."""
    gpu: bool = False


@dataclass
class Tally:
    """How the trials of a study ended."""

    plan: Plan
    done: int = 0
    pruned: int = 0
    failed: int = 0
    best: float = math.inf
    best_run: str = ""
    reasons: list[str] = field(default_factory=list)
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
        return self.failed > self.plan.failures * self.plan.trials

    def text(self, running: int) -> str:
        """`melu  12/40  running 2  pruned 5  failed 0  best .741 (0007)  ETA 3:20`."""
        best = f"  best {number(self.best)} ({self.best_run})" if self.best_run else ""
        here = self.ended - self.before
        left = (time.monotonic() - self.began) / here * (self.plan.trials - self.ended) if here else 0.0
        eta = f"  ETA {clock(left)}" if here and self.ended < self.plan.trials else ""
        return (
            f"{self.plan.method}  {self.ended}/{self.plan.trials}  running {running}  pruned {self.pruned}"
            f"  failed {self.failed}{best}{eta}"
        )


def counted(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial is one of those asked for, and has ended; one that was interrupted is not."""
    return trial.state.is_finished() and "continued" not in trial.user_attrs


def tally(study: optuna.Study, plan: Plan) -> Tally:
    """How the trials of a study have ended so far."""
    found = Tally(plan)
    for trial in filter(counted, study.trials):
        value = trial.value if trial.state == TrialState.COMPLETE else None
        _count(found, trial.state, value, trial.user_attrs.get("run", ""), trial.user_attrs.get("failure", ""))
    found.before = found.ended
    return found


def _count(found: Tally, state: TrialState, value: float | None, run: str, failure: str) -> None:
    found.done += state == TrialState.COMPLETE
    found.pruned += state == TrialState.PRUNED
    if state == TrialState.FAIL:
        found.failed += 1
        found.reasons.append(f"{run}: {failure}")
    if value is not None and value < found.best:
        found.best, found.best_run = value, run


def search(
    study: optuna.Study,
    plan: Plan,
    ask: Callable[[optuna.Trial], tuple[str, dict[str, Any]]],
    out: Location,
    log: Callable[[str], None] = print,
) -> Tally:
    """Run the trials that a study still lacks, as many at a time as the cluster has CPUs (or GPUs) for.

    Args:
        ask: chooses the parameters of an Optuna trial; gives the name of its run and its config as a plain mapping.
        out: where Ray Tune puts its own state.

    Raises:
        RunError: more trials failed than may. UserError: the cluster has no room for one.
    """
    from ray import tune

    found = tally(study, plan)
    if found.ended >= plan.trials or found.hopeless:
        return _checked(found)
    searcher, watch = _searcher(study, found, ask), _watch(found, log)
    resources = {"CPU": float(plan.threads), **({"GPU": 1.0} if plan.gpu else {})}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trialrun.run, stored=plan.stored), resources),
        tune_config=tune.TuneConfig(
            num_samples=plan.trials - found.ended,
            max_concurrent_trials=_at_once(resources),
            search_alg=searcher,
            scheduler=_scheduler(study, plan) if plan.pruning else None,
            trial_dirname_creator=lambda trial: trial.trial_id,
            reuse_actors=True,  # torch and ray are imported once a process, not once a trial
        ),
        run_config=tune.RunConfig(
            name=f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=out.path,
            stop=_stopper(found),
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=1),  # a process that was lost; the rest is caught in it
            verbose=0,
        ),
    )
    # of results that it did not write itself it complains, and of arguments that it takes from the trial
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        cluster.interruptible(tuner.fit)
    finally:
        found.closed = True  # Ctrl-C ends the wait, not the thread, which would take the lost processes for failures
    return _checked(found)


def _checked(found: Tally) -> Tally:
    """The tally; RunError where more trials failed than may."""
    if not found.hopeless:
        return found
    plan = found.plan
    raise RunError(
        f"{plan.method}: {found.failed} of {plan.trials} trials failed, more than --failures {plan.failures:g} allows;"
        f" the last, {found.reasons[-1]}; mend that and start a new search"
    )


@contextlib.contextmanager
def connected(threads: int, gpu: bool, wait: int) -> Iterator[None]:
    """Be connected to a cluster that has room for a trial."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with cluster.connected(1, threads, gpu, wait):
        yield


def share(stored: Stored, log: Callable[[str], None] = print) -> Any:
    """Put what trials have in common into the cluster's object store; says what is too large for it."""
    import ray

    if stored.note:
        log(stored.note)
    return ray.put(stored)


def _at_once(resources: Mapping[str, float]) -> int:
    """Trials that the cluster has room for now; those asked for earlier than they can run would know less."""
    import ray

    have = ray.cluster_resources()
    return max(1, int(min(have.get(name, 0.0) // amount for name, amount in resources.items())))


def _scheduler(study: optuna.Study, plan: Plan) -> Any:
    """ASHA over epochs, that knows what the trials before this launch reported."""
    from ray.tune.schedulers import ASHAScheduler

    grace = min(plan.grace, plan.epochs)
    # beyond the last epoch: there a trial ends by itself, and is complete
    asha = ASHAScheduler(time_attr="epoch", metric=OBJECTIVE, mode="min", max_t=plan.epochs + 1, grace_period=grace)
    for trial in study.trials:
        if counted(trial):
            told: Any = _Earlier(f"earlier-{trial.number}")
            asha.on_trial_add(None, told)  # type: ignore[arg-type]
            for epoch, error in sorted(trial.intermediate_values.items()):
                asha.on_trial_result(None, told, {"epoch": epoch, OBJECTIVE: error})  # type: ignore[arg-type]
    return asha


@dataclass(frozen=True)
class _Earlier:
    """All of a trial that ASHA looks at."""

    trial_id: str


def _searcher(study: optuna.Study, found: Tally, ask: Callable[[optuna.Trial], tuple[str, dict[str, Any]]]) -> Any:
    from ray.tune.search.optuna import OptunaSearch

    class Journalled(OptunaSearch):
        """OptunaSearch on a study that is there, and whose trials end as what they were: complete, pruned, failed."""

        def __init__(self) -> None:
            super().__init__(metric=OBJECTIVE, mode="min")
            self._told: dict[str, set[int]] = {}
            """Epochs that were reported; a process that takes a trial over reports all again."""

        def set_search_properties(self, *args: Any, **kwargs: Any) -> bool:
            return True  # there is a study: OptunaSearch need make none

        def suggest(self, trial_id: str) -> dict[str, Any]:
            trial = self._ot_trials[trial_id] = study.ask()
            run, config = ask(trial)
            trial.set_user_attr("run", run)
            return {"run": run, "config": config}

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            told = self._told.setdefault(trial_id, set())
            if math.isfinite(result[OBJECTIVE]) and result["epoch"] not in told:
                told.add(result["epoch"])
                self._ot_trials[trial_id].report(result[OBJECTIVE], result["epoch"])

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            if trial_id in self._completed_trials or found.hopeless or found.closed:
                return  # what ends with the search has no result: --resume goes on with it
            state, value, failure = _ending(result, error, found.plan.epochs)
            trial = self._ot_trials[trial_id]
            if result:  # that with which ASHA stops a trial comes here alone
                self.on_trial_result(trial_id, result)
            if result and "seconds" in result:
                trial.set_user_attr("seconds", result["seconds"])
            if failure:
                trial.set_user_attr("failure", failure)
            study.tell(trial, value, state=state)
            self._completed_trials.add(trial_id)
            _count(found, state, value, trial.user_attrs["run"], failure)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the study is in its journal."""

    return Journalled()


def _ending(result: dict[str, Any] | None, error: bool, epochs: int) -> tuple[TrialState, float | None, str]:
    """The state, value and failure of a trial whose last report was `result`."""
    if error or not result:
        return TrialState.FAIL, None, "its process was lost (killed, or out of memory)"
    if "failure" in result:
        return TrialState.FAIL, None, result["failure"]
    if "over" in result or result["epoch"] >= epochs:
        return TrialState.COMPLETE, result[OBJECTIVE], ""
    return TrialState.PRUNED, None, ""


def _stopper(found: Tally) -> Any:
    from ray import tune

    class Hopeless(tune.Stopper):
        """Ends the search when too many trials have failed."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return found.hopeless

    return Hopeless()


def _watch(found: Tally, log: Callable[[str], None]) -> Any:
    from ray import tune

    class Watch(tune.Callback):
        """The progress line: rewritten as trials report, and one that stays for each that ends."""

        def __init__(self) -> None:
            self.screen, self.ended = Progress(log), found.ended

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            running = sum(t.status == "RUNNING" for t in trials)
            if found.ended > self.ended:
                self.ended = found.ended
                self.screen.line(found.text(running))
            else:
                self.screen.within(lambda: found.text(running))

    return Watch()
