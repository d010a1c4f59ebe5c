"""The pages of a search: its Optuna studies as the rows that they are drawn from, and the files in OUT."""

import math
import warnings
from collections.abc import Sequence

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from distmeta.evaluation import searchpage
from distmeta.evaluation.searchrows import Axis, Launch, Search, Trial
from distmeta.parallel.tally import counted
from distmeta.storage import Location
from tune import spaces

_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
_ENOUGH = 10
"""Completed trials with which their parameters' importance is told: half of them, five, stand for the best."""


def write(
    study: optuna.Study, out: Location, methods: Sequence[str], dataset: str, protocol: str, threads: int
) -> None:
    """OUT/METHOD/report.html of a study, and OUT/index.html where the search has several methods.

    Args:
        methods: all of the search; of those that have no study yet there is nothing in the index.
        dataset, protocol, threads: as of `rows_of`.
    """
    searchpage.write(rows_of(study, dataset, protocol, threads), out / study.study_name)
    if len(methods) > 1:
        storage = study._storage
        begun = {s.study_name for s in storage.get_all_studies()}
        studies = [optuna.load_study(study_name=m, storage=storage) for m in methods if m in begun]
        searchpage.write_index([rows_of(s, dataset, protocol, threads) for s in studies], out)


def rows_of(study: optuna.Study, dataset: str, protocol: str, threads: int) -> Search:
    """A study as the rows that its report is drawn from.

    Args:
        dataset, protocol: names, for people.
        threads: CPUs of a trial.
    """
    shares, unknown = _importance(study)
    trials = study.get_trials(deepcopy=False)
    judged = study.user_attrs.get("metric", "")
    return Search(
        method=study.study_name,
        dataset=dataset,
        protocol=protocol,
        objective=f"1 − {judged.capitalize()}" if "recall" in judged else f"validation {judged.upper() or 'error'}",
        axes=_axes(trials),
        trials=tuple(_plain(t) for t in trials if counted(t)),
        importance=shares,
        unknown=unknown,
        launches=tuple(Launch(x["seconds"], x["cpus"] / threads) for x in study.user_attrs.get("launches", [])),
        unfinished=sum(t.user_attrs.get("seconds", 0.0) for t in trials if not t.state.is_finished()),
        several=len(study.directions) > 1,
    )


def _plain(trial: FrozenTrial) -> Trial:
    told, attrs = trial.intermediate_values, trial.user_attrs
    source = attrs.get("source", "")
    return Trial(
        number=trial.number,
        run=attrs.get("run") or f"{trial.number:04d}",
        state=_STATES[trial.state],
        value=trial.values[0] if trial.values else told[max(told)] if told else None,
        params=trial.params,
        curve=told,
        epochs=attrs.get("epochs", max(told, default=0)),
        seconds=attrs.get("seconds"),
        source=source,
        default=source == spaces.DEFAULTS,
        failure=attrs.get("failure", ""),
        deviation=attrs.get("deviation"),
    )


def _axes(trials: Sequence[FrozenTrial]) -> tuple[Axis, ...]:
    """The parameters that trials chose, in the order in which they were first chosen."""
    found: dict[str, Axis] = {}
    for name, has in [(name, has) for t in trials for name, has in t.distributions.items()]:
        if isinstance(has, CategoricalDistribution):
            found.setdefault(name, Axis(name, choices=tuple(c for c in has.choices if c is not None)))
        else:
            assert isinstance(has, FloatDistribution | IntDistribution)
            whole = isinstance(has, IntDistribution)
            found.setdefault(name, Axis(name, has.low, has.high, has.log, whole))
    return tuple(found.values())


def _importance(study: optuna.Study) -> tuple[dict[str, float], str]:
    """Each parameter's share, or why nothing can be said of it."""
    values = [t.values[0] for t in study.get_trials(states=(TrialState.COMPLETE,)) if math.isfinite(t.values[0])]
    if len(values) < _ENOUGH:
        return {}, f"it takes {_ENOUGH} completed trials, and there are {len(values)}."
    # its authors want five trials among the best
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, 5 / len(values)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a target: it is made small, as it should be
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, target=lambda t: t.values[0])
    if len(shares) < 2:
        return {}, "there is one parameter alone."
    if len(set(shares.values())) == 1:
        return {}, "the completed trials that are among the best do not differ from the others."
    return dict(shares), ""
