"""A search's trials: each trains in a process of Ray Tune's, tells its validation error after every epoch, and can be
stopped early. The Optuna study is the one record of the search; Ray Tune's own state is written and never read.

A trial's checkpoint is its run directory, OUT/METHOD/NNNN: whichever process trains there goes on from it.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from distmeta.errors import RunError
from distmeta.parallel import cluster, hosting, trialrun
from distmeta.parallel.hosting import Shared
from distmeta.parallel.progress import Progress
from distmeta.parallel.tally import Launch, Tally, counted, tally
from distmeta.parallel.trialrun import OBJECTIVE
from distmeta.storage import Location

_KEPT_S = 60.0
"""Seconds after which a launch that is killed has at least told how long it lasts."""


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
    shared: Shared
    """What all trials have in common."""
    gpu: float = 0.0
    """Of a GPU, for each of its workers or itself."""
    metric: str = "mae"
    """Of validation, that trials are judged by."""
    seeds: int = 1
    """Trainings of a trial that is not stopped in the first."""
    workers: int = 0
    """Ray Train workers of a trial; 0: it trains in its own process."""


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

    found = tally(study, plan.trials, plan.failures)
    study.set_user_attr("metric", plan.metric)
    if found.ended >= plan.trials or found.hopeless:
        return _checked(found)
    needs = plan.workers, plan.threads, plan.gpu
    launch, room = Launch(study, _have("CPU")), lambda: hosting.trials_now(*needs)
    if plan.workers:
        log(f"trials at a time: {room()}; workers of each: {plan.workers}; CPUs of a worker: {plan.threads}")
    searcher = _searcher(study, plan, found, ask, room)
    watch = _watch(found, launch, searcher.running, plan.shared, log)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trialrun.run, stored=plan.shared.stored), hosting.resources(*needs)),
        tune_config=tune.TuneConfig(
            num_samples=plan.trials - found.ended,
            search_alg=searcher,
            scheduler=_scheduler(study, plan, searcher),
            trial_dirname_creator=lambda trial: trial.trial_id,
            reuse_actors=True,  # torch and ray are imported once a process, not once a trial
        ),
        run_config=tune.RunConfig(
            name=f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=out.path,
            storage_filesystem=None if out.is_local else out.fs,
            stop=_stopper(found),
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=1),  # a process that was lost; the rest is caught in it
            verbose=0,
        ),
    )
    # it complains of results that it did not write itself, and has a stack trace for a lost process, which we tell
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        cluster.interruptible(tuner.fit)
    finally:
        found.closed = True  # Ctrl-C ends the wait, not the thread, which would take the lost processes for failures
        launch.keep()
    return _checked(found)


def _checked(found: Tally) -> Tally:
    """The tally; RunError where more trials failed than may."""
    if not found.hopeless:
        return found
    raise RunError(
        f"{found.name}: {found.failed} of {found.trials} trials failed, more than --failures {found.failures:g} allows;"
        f" the last, {found.reasons[-1]}; mend that and start a new search"
    )


def _have(name: str) -> float:
    import ray

    return ray.cluster_resources().get(name, 0.0)


def _scheduler(study: optuna.Study, plan: Plan, searcher: Any) -> Any:
    """ASHA over epochs, that knows what trials reported before this launch; None where it would stop no trial.

    Searcher: knows which Optuna trial is behind one of Tune's.
    """
    from ray.tune.schedulers import ASHAScheduler

    # at its end a trial has nothing left that to stop it would save, but for its other seeds
    last = plan.epochs - (plan.seeds == 1)
    if not plan.pruning or plan.grace > last:
        return None

    class Rungs(_Unkept, ASHAScheduler):
        """ASHA; an interrupted trial reports all its epochs again, and was judged by them before.

        The first trial, that of the method's defaults, goes to its end: the others are compared with it.
        """

        def tell(self, told: Any, curve: Mapping[int, float]) -> None:
            super().on_trial_add(None, told)  # type: ignore[arg-type]
            for epoch, error in sorted(curve.items()):
                super().on_trial_result(None, told, {"epoch": epoch, OBJECTIVE: error})  # type: ignore[arg-type]

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            self.tell(trial, searcher.curve(trial.trial_id))

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = super().on_trial_result(tune_controller, trial, result)
            return self.CONTINUE if searcher.first(trial.trial_id) else decision

    asha = Rungs("epoch", OBJECTIVE, "min", max_t=last, grace_period=plan.grace, stop_last_trials=False)
    for trial in filter(counted, study.trials):
        asha.tell(_Earlier(f"earlier-{trial.number}"), trial.intermediate_values)
    return asha


@dataclass(frozen=True)
class _Earlier:
    """All of a trial that ASHA looks at."""

    trial_id: str


class _Unkept:
    """What Tune is to leave out of the state that it writes and nobody reads: a study, a screen cannot be pickled."""

    def __reduce__(self) -> Any:
        return object, ()


def _searcher(
    study: optuna.Study,
    plan: Plan,
    found: Tally,
    ask: Callable[[optuna.Trial], tuple[str, dict[str, Any]]],
    room: Callable[[], int],
) -> Any:
    from ray.tune.search.optuna import OptunaSearch

    several = len(study.directions) > 1

    class Journalled(_Unkept, OptunaSearch):
        """OptunaSearch on a study that is there, and whose trials end as what they were: complete, pruned, failed.

        It begins with the trials that an earlier launch left running.
        """

        def __init__(self) -> None:
            super().__init__(metric=OBJECTIVE, mode="min")
            left = study.get_trials(states=(TrialState.RUNNING,))
            self._left = [optuna.Trial(study, t._trial_id) for t in left]
            self._live: dict[str, set[int]] = {}
            """Trials at work, and the epochs they reported; a process that takes one over reports all again."""

        def set_search_properties(self, *args: Any, **kwargs: Any) -> bool:
            return True  # there is a study: OptunaSearch need make none

        def suggest(self, trial_id: str) -> dict[str, Any] | None:
            if len(self._live) >= room():
                return None  # for now
            trial = self._left.pop(0) if self._left else study.ask()
            run, config = ask(trial)
            before = trial.user_attrs
            for name, value in (("run", run), ("began", time.time()), ("earlier", before.get("seconds", 0.0))):
                trial.set_user_attr(name, value)
            self._ot_trials[trial_id], self._live[trial_id] = trial, set(self.curve(trial_id, trial))
            return {"run": run, "config": config, "metric": plan.metric, "seeds": plan.seeds}

        def running(self) -> int:
            return len(self._live)

        def first(self, trial_id: str) -> bool:
            """Whether a trial is the first of the study."""
            return self._ot_trials[trial_id].number == 0

        def curve(self, trial_id: str, trial: Any = None) -> dict[int, float]:
            """The epochs that a trial reported before."""
            return study._storage.get_trial((trial or self._ot_trials[trial_id])._trial_id).intermediate_values

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            told, epoch = self._live.get(trial_id, set()), result["epoch"]
            if "failure" in result or epoch in told or found.closed:
                return
            told.add(epoch)
            trial = self._ot_trials[trial_id]
            if not several:  # of two objectives Optuna keeps no curves
                trial.report(result[OBJECTIVE], epoch)
            trial.set_user_attr("epochs", epoch)
            trial.set_user_attr("seconds", result["seconds"])

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            if trial_id not in self._live or found.hopeless or found.closed:
                return  # what ends with the search has no result: --resume goes on with it
            state, failure = _ending(result, error)
            trial = self._ot_trials[trial_id]
            if result:  # that with which ASHA stops a trial comes here alone
                self.on_trial_result(trial_id, result)
            del self._live[trial_id]
            value = None
            if state == TrialState.COMPLETE:
                assert result
                value = result[OBJECTIVE]
                for name in ("seconds", "errors", "deviation"):
                    if name in result:
                        trial.set_user_attr(name, result[name])
            if failure:
                trial.set_user_attr("failure", failure)
            values = None if value is None else [value, result["seconds"]] if several and result else [value]
            study.tell(trial, values, state=state)
            found.count(state, value, trial.user_attrs["run"], failure)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the study is in its journal."""

    return Journalled()


def _ending(result: Mapping[str, Any] | None, error: bool) -> tuple[TrialState, str]:
    """The state and failure of a trial whose last report was `result`."""
    if error or not result:
        return TrialState.FAIL, "its process was lost twice (killed, or out of memory)"
    if "failure" in result:
        return TrialState.FAIL, result["failure"]
    return (TrialState.COMPLETE if "over" in result else TrialState.PRUNED), ""


def _stopper(found: Tally) -> Any:
    from ray import tune

    class Hopeless(_Unkept, tune.Stopper):
        """Ends the search when too many trials have failed."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return found.hopeless

    return Hopeless()


def _watch(found: Tally, launch: Launch, running: Callable[[], int], shared: Shared, log: Callable[[str], None]) -> Any:
    from ray import tune

    class Watch(_Unkept, tune.Callback):
        """The progress line: on a terminal rewritten in place, else one for each trial that ends; failures besides."""

        def __init__(self) -> None:
            self.screen, self.ended, self.failed = Progress(log), found.ended, found.failed

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            for reason in found.reasons[self.failed :]:
                self.screen.line(f"{found.name}  failed {reason}")
            self.failed = found.failed
            if found.ended > self.ended:
                self.ended = found.ended
                launch.keep()
                self.screen.now(lambda: found.text(running()))
            else:
                launch.keep(_KEPT_S)
                self.screen.within(lambda: found.text(running()))

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.screen.line(f"{found.name}  {trial.config['run']}: its process was lost; another goes on in its place")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            shared.free(trial.config["config"]["train"]["run"])

        def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
            self.screen.wipe()

    return Watch()
