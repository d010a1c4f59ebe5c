"""The Optuna study behind a search: its journal file, made or gone on with, and the files that its trials come to."""

import io
import json
import os
from dataclasses import replace
from typing import Any

import optuna
import polars as pl
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from distmeta import config as config_module
from distmeta.commands.search_journal import PartsJournal
from distmeta.commands.search_samplers import sampler
from distmeta.errors import RunError, UserError
from distmeta.parallel import rundir
from distmeta.parallel.tally import counted, lowest
from distmeta.storage import Location
from tune import spaces


def opened(
    out: Location,
    method: str,
    proposes: str,
    seed: int,
    first: list[tuple[str, dict[str, spaces.Value]]],
    *,
    pareto: bool = False,
    tasks: str = "",
) -> optuna.Study:
    """The study of METHOD in OUT/journal.log, made where there is none, ready to be asked.

    Its trials that nobody works on any more are still running: the search begins with them. The caller is the only
    process at work on the journal.

    Args:
        proposes: name of the sampler.
        first: source and values of the trials to begin with.
        pareto: whether training seconds are a second objective.
        tasks: hash of the tasks that trials learn, the same in all launches.

    Raises:
        UserError: the journal is damaged, or of other tasks.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions = [StudyDirection.MINIMIZE] * (1 + pareto)
    try:
        storage = JournalStorage(journal(out))
        study = optuna.create_study(storage=storage, study_name=method, directions=directions, load_if_exists=True)
        trials = study.trials
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{_place(out)}: is damaged ({e or type(e).__name__}); start a new search") from e
    if study.user_attrs.get("tasks", tasks) != tasks:
        raise UserError(f"{out}: was started with other tasks: the dataset has changed since; start a new search")
    study.set_user_attr("tasks", tasks)
    study.sampler = sampler(proposes, seed, seed + 1_000_003 * len(trials))
    for source, values in first:
        study.enqueue_trial(values, user_attrs={"source": source}, skip_if_exists=True)
    return study


def journal(out: Location) -> BaseJournalBackend:
    """The journal of the search in OUT, in one file where files can be appended to; made where there is none.

    Raises:
        UserError: it is damaged.
    """
    if not out.is_local:
        return PartsJournal(_place(out))
    _mend(_place(out).path)
    return JournalFileBackend(_place(out).path)


def _place(out: Location) -> Location:
    return out / ("journal.log" if out.is_local else "journal")


def _mend(path: str) -> None:
    """Take away what a kill left: half a line, to which the next would be appended, and the lock of writing it.

    Raises:
        UserError: a line but the last is not JSON.
    """
    lock = f"{path}.lock"
    if os.path.lexists(lock):
        os.unlink(lock)
    if not os.path.exists(path):
        return
    kept = 0
    with open(path, "rb+") as f:
        for n, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                f.truncate(kept)
                break
            kept += len(line)
            try:
                json.loads(line)
            except ValueError:
                raise UserError(f"{path}, line {n}: is damaged; start a new search") from None


def suggest(trial: optuna.Trial, space: spaces.Space) -> dict[str, spaces.Value]:
    """A value for each parameter of the space that there is something to choose of.

    Raises:
        UserError: an interrupted trial, or those before, are of another space.
    """
    try:
        return _suggested(trial, space)
    except ValueError as e:
        name = trial.study.study_name
        raise UserError(f"{name}: its trials are of another search space ({e}); start a new search") from e


def _suggested(trial: optuna.Trial, space: spaces.Space) -> dict[str, spaces.Value]:
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
    front = {t.number for t in study.best_trials} if len(study.directions) > 1 else None
    rows = [_row(t) | ({} if front is None else {"front": t.number in front}) for t in study.trials if counted(t)]
    tuned = dict.fromkeys(name for row in rows for name in row if name not in _COLUMNS)
    columns = [pl.Series(name, [row[name] for row in rows], dtype) for name, dtype in _COLUMNS.items()]
    columns += [pl.Series(name, [row.get(name) for row in rows], strict=False) for name in tuned]
    frame = pl.DataFrame(columns)
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    (where / "trials.parquet").write_bytes(buffer.getvalue())


_COLUMNS = {
    "number": pl.Int64,
    "run": pl.String,
    "source": pl.String,
    "state": pl.String,
    "error": pl.Float64,
    "deviation": pl.Float64,
    "epochs": pl.Int64,
    "seconds": pl.Float64,
    "failure": pl.String,
}
"""Of a table of trials; its parameters, and `front` of two objectives, follow."""


def _row(trial: FrozenTrial) -> dict[str, Any]:
    told, attrs = trial.intermediate_values, trial.user_attrs
    return {
        "number": trial.number,
        "run": attrs.get("run"),
        "source": attrs.get("source"),
        "state": trial.state.name.lower(),
        "error": trial.values[0] if trial.values else told[max(told)] if told else None,
        "deviation": attrs.get("deviation"),
        "epochs": attrs.get("epochs", 0),
        "seconds": attrs.get("seconds"),
        "failure": attrs.get("failure"),
        **{f"param.{name}": value for name, value in trial.params.items()},
    }


def write_best(study: optuna.Study, where: Location, data: str = "") -> FrozenTrial:
    """WHERE/best.yaml for `train --config`: the config of the complete trial with the lowest error.

    And WHERE/tuned.yaml: what it has otherwise than the method's defaults, to train on other data with. Of two
    objectives also WHERE/front/NNNN.yaml, for each trial that none is better than in both.

    Args:
        data: what it was tuned on, in words.

    Raises:
        RunError: no trial was completed.
    """
    best = lowest(study)
    if best is None:
        raise RunError(f"{where}: no trial was completed; see the column `failure` of {where / 'trials.parquet'}")
    _write_config(study, best, where, where / "best.yaml")
    _write_tuned(study, best, where, data)
    if len(study.directions) > 1:
        (where / "front").remove()
        for trial in study.best_trials:
            _write_config(study, trial, where, (where / "front").make_dir() / f"{trial.user_attrs['run']}.yaml")
    return best


def _write_config(study: optuna.Study, trial: FrozenTrial, where: Location, file: Location) -> None:
    config = rundir.stored(where / trial.user_attrs["run"])
    text = config_module.to_yaml(replace(config, train=replace(config.train, run="")))
    judged, seeds = study.user_attrs.get("metric", "error"), trial.user_attrs.get("errors", [])
    head = f"# trial {trial.number} of study {study.study_name}, validation {judged} {trial.values[0]:.6g}"
    if len(seeds) > 1:
        head += f": mean of seeds {config.train.seed} to {config.train.seed + len(seeds) - 1}, of {seeds}"
    if len(trial.values) > 1:
        head += f", {trial.values[1]:.1f} s of training"
    file.write_bytes(f"{head}\n{text}".encode())


def _write_tuned(study: optuna.Study, best: FrozenTrial, where: Location, data: str) -> None:
    plain, on = study.trials[0], f" on {data}" if data else ""
    head = f"# trial {best.number} of the {len(study.trials)} of study {study.study_name}{on}:\n"
    head += f"# validation {study.user_attrs.get('metric', 'error')} {best.values[0]:.4f}"
    if plain.values:
        head += f"; {plain.user_attrs.get('source', 'the first trial')}: {plain.values[0]:.4f}"
    text = yaml.safe_dump(config_module.apart(rundir.stored(where / best.user_attrs["run"])), sort_keys=False)
    (where / "tuned.yaml").write_bytes(f"{head}\n{text}".encode())
