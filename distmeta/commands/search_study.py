"""The Optuna study behind a search: its journal file, what to do with trials that were interrupted, and its tables."""

import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace

import optuna
import polars as pl
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from distmeta import config as config_module
from distmeta.errors import RunError
from distmeta.evaluation import searchpage
from distmeta.evaluation.searchrows import Axis, Launch, Search
from distmeta.evaluation.searchrows import Trial as Row
from distmeta.parallel import rundir
from distmeta.parallel.trials import counted
from distmeta.storage import Location
from tune import spaces


def opened(
    out: Location, method: str, sampler: str, seed: int, first: list[tuple[str, dict[str, spaces.Value]]]
) -> optuna.Study:
    """The study of METHOD in OUT/journal.log, made where there is none, ready to be asked.

    Trials that nobody works on any more are asked for again, with the same run directory, before any new one. The
    caller is the only process at work on the journal.

    Args:
        first: source and values of the trials to begin with.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = (out / "journal.log").path
    _whole_lines(path)
    storage = JournalStorage(JournalFileBackend(path))
    study = optuna.create_study(storage=storage, study_name=method, direction="minimize", load_if_exists=True)
    # of the same seed a later launch would draw what the first one drew
    drawn = seed + 1_000_003 * len(study.trials)
    if sampler == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of constant_liar
            study.sampler = optuna.samplers.TPESampler(seed=drawn, constant_liar=True)
    else:
        study.sampler = optuna.samplers.RandomSampler(seed=drawn)
    for source, values in first:
        study.enqueue_trial(values, user_attrs={"source": source}, skip_if_exists=True)
    _take_up(study)
    return study


def _whole_lines(path: str) -> None:
    """Cut off what a kill left of a line: what is appended next would become a part of it."""
    if not os.path.exists(path):
        return
    with open(path, "rb+") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - (1 << 20)))
        begin, tail = f.tell(), f.read()
        if tail and not tail.endswith(b"\n"):
            f.truncate(begin + tail.rfind(b"\n") + 1)


def _take_up(study: optuna.Study) -> None:
    waiting = {t.user_attrs.get("run") for t in study.get_trials(states=(TrialState.WAITING,))}
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        run = trial.user_attrs.get("run") or f"{trial.number:04d}"
        if run not in waiting:
            study.enqueue_trial(trial.params, user_attrs={**trial.user_attrs, "run": run})
        study._storage.set_trial_user_attr(trial._trial_id, "continued", True)
        study.tell(trial.number, state=TrialState.FAIL)


def suggest(trial: optuna.Trial, space: spaces.Space) -> dict[str, spaces.Value]:
    """A value for each parameter of the space that there is something to choose of."""
    values: dict[str, spaces.Value] = {}
    for p in space.parameters:
        if not p.active(values):
            continue
        if isinstance(p, spaces.Float):
            values[p.name] = trial.suggest_float(p.name, p.low, p.high, log=p.log)
        elif isinstance(p, spaces.Int):
            values[p.name] = trial.suggest_int(p.name, p.low, p.high, log=p.log)
        else:
            assert isinstance(p, spaces.Choice)
            chosen = trial.suggest_categorical(p.name, p.values)
            assert chosen is not None
            values[p.name] = chosen
    return values


def write_trials(study: optuna.Study, where: Location) -> None:
    """WHERE/trials.parquet: a row for each trial that ended, its parameters in columns of their own."""
    rows = [_row(t) for t in study.trials if counted(t)]
    names = sorted({name for row in rows for name in row})
    frame = pl.DataFrame({name: pl.Series([row.get(name) for row in rows], strict=False) for name in names})
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    (where / "trials.parquet").write_bytes(buffer.getvalue())


def _row(trial: FrozenTrial) -> dict[str, spaces.Value | None]:
    best = min(trial.intermediate_values.values(), default=None)
    return {
        "number": trial.number,
        "run": trial.user_attrs.get("run"),
        "source": trial.user_attrs.get("source"),
        "state": trial.state.name.lower(),
        "error": trial.value if trial.state == TrialState.COMPLETE else best,
        "epochs": max(trial.intermediate_values, default=0),
        "seconds": trial.user_attrs.get("seconds"),
        "failure": trial.user_attrs.get("failure"),
        **{f"param.{name}": value for name, value in trial.params.items()},
    }


def write_best(study: optuna.Study, where: Location) -> FrozenTrial:
    """WHERE/best.yaml for `train --config`: the config of the complete trial with the lowest error.

    Raises:
        RunError: no trial was completed.
    """
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        raise RunError(f"{where}: no trial was completed; see the column `failure` of {where / 'trials.parquet'}")
    best = study.best_trial
    config = rundir.stored(where / best.user_attrs["run"])
    text = config_module.to_yaml(replace(config, train=replace(config.train, run="")))
    head = f"# trial {best.number} of study {study.study_name}, validation error {best.value:.6g}\n"
    (where / "best.yaml").write_bytes((head + text).encode())
    return best


def write_pages(
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
        launches=tuple(Launch(x["seconds"], x["cpus"] // threads) for x in study.user_attrs.get("launches", [])),
        unfinished=sum(t.user_attrs.get("seconds", 0.0) for t in trials if not t.state.is_finished()),
        several=len(study.directions) > 1,
    )


def _plain(trial: FrozenTrial) -> Row:
    told, attrs = trial.intermediate_values, trial.user_attrs
    source = attrs.get("source", "")
    return Row(
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


_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def _axes(trials: Sequence[FrozenTrial]) -> tuple[Axis, ...]:
    """The parameters that trials were asked for, in the space's order, those that few have after what they hang on."""
    found: dict[str, Axis] = {}
    for name, has in [(name, has) for t in trials for name, has in t.distributions.items()]:
        if isinstance(has, optuna.distributions.CategoricalDistribution):
            found.setdefault(name, Axis(name, choices=tuple(c for c in has.choices if c is not None)))
        else:
            assert isinstance(has, optuna.distributions.FloatDistribution | optuna.distributions.IntDistribution)
            whole = isinstance(has, optuna.distributions.IntDistribution)
            found.setdefault(name, Axis(name, has.low, has.high, has.log, whole))
    return tuple(found.values())


ENOUGH = 10
"""Completed trials with which their parameters' importance is told: half of them, five, stand for the best."""


def _importance(study: optuna.Study) -> tuple[dict[str, float], str]:
    """Each parameter's share, or why nothing can be said of it."""
    values = [t.values[0] for t in study.get_trials(states=(TrialState.COMPLETE,)) if math.isfinite(t.values[0])]
    if len(values) < ENOUGH:
        return {}, f"it takes {ENOUGH} completed trials, and there are {len(values)}."
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
