"""A run's best checkpoint, and the floors, on the tasks of the test split: all workers' tasks together."""

from dataclasses import dataclass

from distmeta.config import Config
from distmeta.data.loader import Loader, read_items
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError
from distmeta.evaluation import evaluate as evaluation
from distmeta.evaluation.measured import Measured
from distmeta.exchange import Exchange
from distmeta.methods import FLOORS
from distmeta.methods.base import Method
from distmeta.parallel import checkpoint
from distmeta.parallel.update import build_method, device_of, numerics
from distmeta.storage import Location


@dataclass(frozen=True)
class Assessment:
    """What there is to say of a trained run."""

    step: int
    """Of the checkpoint that was measured: the one with the lowest validation error."""
    method: Measured
    floors: dict[str, Measured]
    """By name; on worker 0 all of them. None with --no-floors."""


def assess(
    config: Config,
    run: Location,
    dataset: Dataset,
    dataset_location: Location,
    table: TaskTable,
    exchange: Exchange | None = None,
) -> Assessment:
    """Measure the best checkpoint of `run` and the floors. Every worker of `exchange` calls this.

    Shared memories are only read: each worker has them to itself.

    Raises:
        UserError: there is no checkpoint, it is damaged, or of another split. RunError: a prediction is not finite.
    """
    e = exchange or Exchange()
    step = best_step(run) if e.rank == 0 else 0
    step = int(e.gather(b"%d" % step)[0])  # rank 0 may have written it a moment ago: the others wait for that
    best = checkpoint.read(run, step)
    checkpoint.check_origin(run, best, config, table.split_hash)
    memory = config.train.memory_mb << 20
    with numerics(config.train, device_of(config.train)):
        method = _restored(config, run, best, dataset, dataset_location)
        measured = evaluation.evaluate(method, table, dataset, e, memory)
        floors: dict[str, Measured] = {}
        if config.train.floors:
            floors = evaluation.floors(table, dataset, dataset_location, FLOORS[dataset.label.kind], e, memory)
    return Assessment(step, measured, floors)


def assess_split(
    config: Config, run: Location, step: int, dataset: Dataset, dataset_location: Location, table: TaskTable, split: str
) -> Measured:
    """Measure the checkpoint of `run` at `step` on the tasks of one split: `train`, say, which `assess` leaves out.

    Raises:
        UserError, RunError: as `assess`.
    """
    kept = checkpoint.read(run, step)
    checkpoint.check_origin(run, kept, config, table.split_hash)
    with numerics(config.train, device_of(config.train)):
        method = _restored(config, run, kept, dataset, dataset_location)
        loader = Loader(table, dataset, split, evaluation.at_once(table), memory=config.train.memory_mb << 20)
        return evaluation.measure(method, loader, dataset.label, split)


def best_method(
    config: Config, run: Location, dataset: Dataset, dataset_location: Location, table: TaskTable
) -> tuple[int, Method]:
    """The run's method as its best checkpoint has it, and that checkpoint's step.

    Raises:
        UserError: there is no checkpoint, it is damaged, or of another split.
    """
    kept = checkpoint.read(run, best_step(run))
    checkpoint.check_origin(run, kept, config, table.split_hash)
    return kept.step, _restored(config, run, kept, dataset, dataset_location)


def _restored(
    config: Config, run: Location, kept: checkpoint.Checkpoint, dataset: Dataset, dataset_location: Location
) -> Method:
    """The method of a run as one of its checkpoints has it, shared memories included."""
    method = build_method(config, dataset, read_items(dataset_location, dataset), device_of(config.train))
    checkpoint.restore_params(run, kept, method, config.method)
    checkpoint.restore_state(run, kept, method.shared)
    return method


def best_step(run: Location) -> int:
    """The step of the run's checkpoint with the lowest validation error; UserError where there is none."""
    newest = checkpoint.newest(run)
    if newest is None:
        raise UserError(f"{run}: has no complete checkpoint; train on with `train --run {run} --resume`")
    return newest.progress.get("best_step") or newest.step
