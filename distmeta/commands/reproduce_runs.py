"""The runs behind a paper's table: which there are, which are missing, and what the finished ones measured."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distmeta import config as config_module
from distmeta import remote
from distmeta.commands import train
from distmeta.commands.evaluate import MEASURED
from distmeta.commands.settings import Setting, of_flags
from distmeta.config import Config
from distmeta.data import protocols, tasktable
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError
from distmeta.evaluation.papertables import PREPARE, Ours, PaperTable
from distmeta.evaluation.studies import Study
from distmeta.methods import entry
from distmeta.parallel import rundir
from distmeta.storage import Location

if TYPE_CHECKING:
    from distmeta.evaluation.measured import Measured


@dataclass(frozen=True)
class Run:
    """One training run."""

    dataset: str
    label: str
    """Of the table's row."""
    seed: int
    """Of the split."""
    where: Location
    config: Config
    argv: tuple[str, ...]
    """Of `train`."""


@dataclass(frozen=True)
class Call:
    """What all runs of one call of `reproduce` have in common."""

    seeds: int | None
    """Split seeds 0 to this, without it; None: what each table and study has."""
    out: Location
    methods: Sequence[str]
    """Those to run."""
    settings: Sequence[Setting]
    common: Sequence[str]
    """Flags of `train` for every run."""


def plan(table: PaperTable, places: Mapping[str, Location], call: Call) -> list[Run]:
    """Every run of a table, split seed by split seed.

    Args:
        places: the data sets at hand.

    Raises:
        UserError: a method is not there, or a setting is not one of its.
    """
    return [
        make(table, dataset, place, ours, seed, call)
        for seed in range(call.seeds or table.seeds)
        for dataset, place in places.items()
        for ours in table.ours
        if ours.method in call.methods and dataset in table.datasets
    ]


def make(asker: PaperTable | Study, dataset: str, place: Location, ours: Ours, seed: int, call: Call) -> Run:
    """The run of one row on one split, in OUT/runs/DATASET-PROTOCOL-METHOD-SEED; of a table with intervals over seeds
    the seed is that of training too. The table's own flags give way to the call's settings, and these to the row's.

    What a row sets to another value than it has anyway is in the name too, so that a run serves every table and
    study that asks for it.

    Raises:
        UserError: as `plan`.
    """
    entry(ours.method)
    settings = [*of_flags(asker.flags), *call.settings]
    chosen = [word for s in settings if s.meant_for(dataset, ours.method) for word in s.argv()]
    shared = [ours.method, "--data", str(place), "--protocol", asker.protocol, "--split-seed", str(seed)]
    shared += ["--seed", str(seed)] if isinstance(asker, PaperTable) and asker.confidence else []
    shared += [*chosen, *call.common]
    before, config = _flat(train.parse(shared)), train.parse([*shared, *ours.flags])
    own = [f"{k.replace('_', '-')}-{_word(v)}" for k, v in _flat(config).items() if v != before[k]]
    where = call.out / "runs" / "-".join([dataset, asker.protocol, ours.method, *own, str(seed)])
    return Run(dataset, ours.label, seed, where, config, (*shared, *ours.flags, "--run", str(where)))


def _word(value: Any) -> str:
    """A value in a file's name."""
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(config: Config) -> dict[str, Any]:
    return {k: v for s in (config.data, config.train, config.method_options) for k, v in dataclasses.asdict(s).items()}


def value_of(config: Config, flag: str) -> Any:
    """What a config has for a flag of `train`."""
    return _flat(config)[flag.replace("-", "_")]


def check(run: Run) -> None:
    """UserError where what lies at `run.where` is another run than the one wanted, or damaged."""
    if not rundir.exists(run.where):
        rundir.check_new(run.where)
        return
    before, now = (_deciding(c) for c in (rundir.stored(run.where), run.config))
    for key in now:
        if before.get(key) != now[key]:
            raise UserError(
                f"{run.where}: was trained with {key} = {before.get(key)!r}, not {now[key]!r}; delete it to have it"
                " trained anew, or choose another --out"
            )
    if rundir.finished(run.where):
        read_summary(run.where)


def _deciding(config: Config) -> dict[str, Any]:
    """What a finished run's numbers depend on."""
    return {
        **config_module.fixed(config),
        "train.epochs": config.train.epochs,
        "train.patience": config.train.patience,
    }


def read_summary(where: Location) -> dict[str, Any]:
    """RUN/run.json; UserError where it is damaged."""
    mend = f"delete it, and the next call finishes the run in {where}"
    summary = (where / "run.json").read_json(mend)
    if not isinstance(summary, dict) or not isinstance(summary.get("split_hash"), str):
        raise UserError(f"{where / 'run.json'}: does not say which split it is of; {mend}")
    return summary


def tasks(run: Run, place: Location) -> TaskTable:
    """The task table of a run, made where it does not exist yet."""
    return tasktable.make(place, run.config.data.protocol, run.seed, protocols.protocol_options(run.config.data))


def measured(run: Run, table: TaskTable) -> "Measured":
    """What a finished run measured on its test tasks.

    Raises:
        UserError: it was trained on another split than `table` holds; the file is missing or damaged.
    """
    if read_summary(run.where)["split_hash"] != table.split_hash:
        raise UserError(
            f"{run.where}: was trained on another split than {table.location} holds (the data set was made anew?);"
            " delete it to have it trained anew"
        )
    return read_measured(run.where / MEASURED, f"make it again with `python -m jobs.evaluate --run {run.where}`")


def read_measured(file: Location, mend: str) -> "Measured":
    """A file that holds what `Measured.to_ipc` wrote; UserError, ending with `mend`, where it does not."""
    import pyarrow as pa

    from distmeta.evaluation.measured import Measured

    try:
        return Measured.from_ipc(file.read_bytes())
    except (OSError, KeyError, pa.ArrowException) as e:
        remote.let_pass(e)
        what = "is missing" if isinstance(e, FileNotFoundError) else "is damaged"
        raise UserError(f"{file}: {what}; {mend}") from None


def dataset_at(name: str, place: Location) -> Dataset:
    """The data set at `place`; UserError where it is not `name`."""
    found = Dataset.open(place)
    source, wanted = found.extra.get("source"), name.removesuffix("-complete")
    if source != wanted or (name != wanted and not found.extra.get("complete")):
        made = f"made from {source}" + (", not --complete" if source == wanted else "")
        raise UserError(
            f"{place}: holds {found.name}, {made}, and is given as {name}; give the data set that"
            f" `{PREPARE[name]}` makes"
        )
    return found
