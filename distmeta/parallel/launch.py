"""The driver's side of training on Ray: start the workers, show what they say, turn what goes wrong into sentences."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distmeta import config as config_module
from distmeta.config import Config
from distmeta.data.protocols import SPLITS
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import RunError, UserError
from distmeta.evaluation.measured import Measured
from distmeta.methods import method_class
from distmeta.methods.base import Method
from distmeta.parallel import cluster, room
from distmeta.parallel.assessment import Assessment
from distmeta.parallel.trainer import Outcome
from distmeta.parallel.update import check_shares
from distmeta.storage import Location


def workers(config: Config) -> tuple[int, int]:
    """Least and most workers of --workers: N or A:B; UserError where A is larger than B."""
    least, _, most = config.train.workers.partition(":")
    if int(least) > int(most or least):
        raise UserError(f"--workers {config.train.workers}: the least comes first; give --workers {most}:{least}")
    check_shares(config.train.gpu, int(most or least))
    return int(least), int(most or least)


_NCCL = {
    # an all-reduce ends when it is done, and raises after TorchConfig's timeout_s where another worker is lost, as
    # gloo's does: by default it only queues a kernel, and after that time a watchdog ends the process without a word
    # (torch's ProcessGroupNCCL environment variables). What it costs, to wait, the finite-check after it costs anyway
    "TORCH_NCCL_BLOCKING_WAIT": "1",
}
"""Environment of workers on GPUs. Ray sets TORCH_NCCL_ASYNC_ERROR_HANDLING where neither is set."""


@dataclass(frozen=True)
class Trial:
    """A trial of a search whose training is elsewhere; the process that waits for it here may be stopped at any time.

    What workers tell of an epoch is its line in RUN/metrics.jsonl: `follow` reads it. Ray's TuneReportCallback would
    hand Ray Tune what workers report to Ray Train; but then nobody here hears that Tune stops the trial, who could
    free its workers, and a resumed run's earlier epochs would not be told.
    """

    follow: Callable[[], None]
    """Called several times a second while the workers train; what it raises ends them."""
    leash: Any
    """Handle of the search's Leash."""
    datasets: dict[str, Any]
    """The splits as `delivery.materialise` gives them."""


def run_workers(
    config: Config, run: Location, table: TaskTable, log: Callable[[str], None] = print, *, learn: bool = True
) -> tuple[Outcome | None, Assessment]:
    """Train (`learn`) and measure a run on --workers Ray Train workers: trainer.train and assess, elsewhere.

    Raises: as `train_trial`.
    """
    found = _run(config, run, table, log, learn, None)
    floors = {name: Measured.from_ipc(data) for name, data in found["floors"].items()}
    outcome = Outcome(**found["outcome"]) if found["outcome"] else None
    return outcome, Assessment(found["step"], Measured.from_ipc(found["method"]), floors)


def train_trial(config: Config, run: Location, table: TaskTable, log: Callable[[str], None], trial: Trial) -> Outcome:
    """Train a run on --workers Ray Train workers, measuring nothing but validation.

    Raises:
        UserError: no cluster, too small a cluster, more workers than shards, data that a worker cannot read.
        RunError: training failed, or workers died more often than --max-failures.
    """
    return Outcome(**_run(config, run, table, log, True, trial)["outcome"])


def _run(
    config: Config, run: Location, table: TaskTable, log: Callable[[str], None], learn: bool, trial: Trial | None
) -> dict[str, Any]:
    """What rank 0 of `worker.run` gives, of as many launches as it takes."""
    least, most = workers(config)
    o = config.train
    if most > table.shards:
        raise UserError(
            f"--workers {most}: the task table has {table.shards} shards, and a worker needs one of its own"
        )
    lost = 0
    while True:
        with cluster.connected(least, o.threads, o.gpu, o.wait, log) as ours:
            try:
                return _fit(config, run, table, log, learn, ours, trial)
            except _ControllerLost as e:
                lost += 1
                if lost > o.max_failures:
                    raise _given_up(config, run, [f"Ray's controller: {_line(e)}"]) from e
                log("Ray's controller of the workers died; starting again from the newest checkpoint")


class _ControllerLost(Exception):
    """The process that starts and watches the workers is gone, with its workers."""


def _fit(
    config: Config,
    run: Location,
    table: TaskTable,
    log: Callable[[str], None],
    learn: bool,
    ours: bool,
    trial: Trial | None,
) -> dict[str, Any]:
    """One `fit()` of Ray Train, which itself starts new workers for lost ones."""
    import ray
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchTrainer

    from distmeta.parallel import board as boards
    from distmeta.parallel import delivery, leash, stateactor, watch, worker

    datasets = trial.datasets if trial else materialised(config, table, SPLITS)
    threads = f"{config.train.threads} thread{'s' * (config.train.threads > 1)}"
    log(f"starting {config.train.workers} workers of {threads}")
    board = boards.create(0.9 * config.train.exchange_timeout)
    watching = watch.Watch(board, log, lambda: room.standing(config.train.threads, config.train.gpu))
    error, found = None, None
    servers: list[Any] = []
    try:
        if learn and method_class(config.method).memories is not Method.memories:
            o = config.train
            servers = stateactor.create(run.name, o.state_shards, workers(config)[1], o.exchange_timeout)
        callbacks = [watch.Deaths(board), *([leash.Held(trial.leash, str(run))] if trial else [])]
        trainer = TorchTrainer(
            worker.run,
            train_loop_config={
                "config": config_module.plain(config),
                "table": str(table.location),
                "delivered": list(datasets),
                "learn": learn,
                "measure": trial is None,
                "board": board,
                "servers": servers,
            },
            datasets=datasets,
            dataset_config=delivery.ShardConfig({split: table.sizes(split) for split in datasets}),
            **_ray_config(config, run, callbacks),
        )

        def over() -> bool:
            if trial:
                trial.follow()
            return ours and watching.failure is not None

        done = cluster.interruptible(trainer.fit, over)
        found = done.return_value if done else None
    except TrainingFailedError as e:
        error = e
    except RayActorError as e:
        raise _ControllerLost(_line(e)) from e
    finally:
        if trial:
            ray.get(trial.leash.free.remote(str(run)))
        failure = watching.close()
        for actor in (board, *servers):
            ray.kill(actor)
    if failure:
        kind, sentence = failure
        raise (UserError if kind == "UserError" else RunError)(sentence)
    if error:
        raise _failed(config, run, error) from error
    if found is None:
        raise RunError(f"{run}: the workers ended without a result; `train --run {run} --resume` goes on")
    return found


def materialised(config: Config, table: TaskTable, splits: Sequence[str]) -> dict[str, Any]:
    """Splits of a run's task table in the object store, as far as --memory-mb allows.

    Raises:
        UserError: a part is missing or damaged, or cannot be read on a node of the cluster.
    """
    from distmeta.parallel import delivery

    try:
        dataset = Dataset.open(Location.of(config.data.data))
        return delivery.materialise(table, dataset, config.train.memory_mb << 20, splits=splits)
    except Exception as e:
        raise delivery.sentence(e) or e from None


def _ray_config(config: Config, run: Location, callbacks: list[Any]) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    o = config.train
    least, most = workers(config)
    storage = run / ".ray"
    return {
        "torch_config": TorchConfig(backend="cpu:gloo,cuda:nccl" if o.gpu else "gloo", timeout_s=o.exchange_timeout),
        "scaling_config": ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=o.gpu > 0,
            resources_per_worker=room.bundle(o.threads, o.gpu),
        ),
        "run_config": RunConfig(
            name=f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=storage.path,
            storage_filesystem=None if storage.is_local else storage.fs,
            failure_config=FailureConfig(max_failures=o.max_failures, controller_failure_limit=cluster.starts(o.wait)),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": _NCCL} if o.gpu else None,
        ),
    }


def _failed(config: Config, run: Location, e: Exception) -> RunError:
    """A sentence for a `fit()` that failed."""
    from ray.train import WorkerGroupError

    if isinstance(e, WorkerGroupError):
        return _given_up(config, run, [f"worker {r}: {_line(x)}" for r, x in sorted(e.worker_failures.items())])
    return RunError(
        f"the workers could not be started: {_line(getattr(e, 'controller_failure', e))}; mend that, then"
        f" `train --run {run} --resume` goes on from the newest checkpoint"
    )


def _given_up(config: Config, run: Location, last: list[str]) -> RunError:
    return RunError(
        f"workers were lost more than --max-failures {config.train.max_failures} times, last {'; '.join(last)};"
        f" mend that, then `train --run {run} --resume` goes on from the newest checkpoint"
    )


def _line(e: BaseException) -> str:
    lines = [line for line in str(e).strip().split("\n") if line]
    return lines[-1] if lines else type(e).__name__
