"""The Optuna study behind a search: its journal file, what to do with trials that were interrupted, and its tables."""

import io
import os
import warnings
from dataclasses import replace

import optuna
import polars as pl
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from distmeta import config as config_module
from distmeta.errors import RunError
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
