"""The driver's side of training on Ray: start the workers, show what they say, turn what goes wrong into sentences."""

import os
import time
from collections.abc import Callable
from typing import Any

from distmeta import config as config_module
from distmeta.config import Config
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import RunError, UserError
from distmeta.evaluation.measured import Measured
from distmeta.methods import method_class
from distmeta.methods.base import Method
from distmeta.parallel import cluster
from distmeta.parallel.assessment import Assessment
from distmeta.parallel.trainer import Outcome
from distmeta.storage import Location


def workers(config: Config) -> tuple[int, int]:
    """Least and most workers of --workers: N or A:B; UserError where A is larger than B."""
    least, _, most = config.train.workers.partition(":")
    if int(least) > int(most or least):
        raise UserError(f"--workers {config.train.workers}: the least comes first; give --workers {most}:{least}")
    return int(least), int(most or least)


def run_workers(
    config: Config, run: Location, table: TaskTable, log: Callable[[str], None] = print, *, learn: bool = True
) -> tuple[Outcome | None, Assessment]:
    """Train (`learn`) and measure a run on --workers Ray Train workers: trainer.train and assess, elsewhere.

    Raises:
        UserError: no cluster, too small a cluster, more workers than shards, data that a worker cannot read.
        RunError: training failed, or workers died more often than --max-failures.
    """
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
                return _fit(config, run, table, log, learn, ours)
            except _ControllerLost as e:
                lost += 1
                if lost > o.max_failures:
                    raise _given_up(config, run, [f"Ray's controller: {_line(e)}"]) from e
                log("Ray's controller of the workers died; starting again from the newest checkpoint")


class _ControllerLost(Exception):
    """The process that starts and watches the workers is gone, with its workers."""


def _fit(
    config: Config, run: Location, table: TaskTable, log: Callable[[str], None], learn: bool, ours: bool
) -> tuple[Outcome | None, Assessment]:
    """One `fit()` of Ray Train, which itself starts new workers for lost ones."""
    import ray
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchTrainer

    from distmeta.parallel import board as boards
    from distmeta.parallel import delivery, stateactor, worker

    try:
        dataset = Dataset.open(Location.of(config.data.data))
        datasets = delivery.materialise(table, dataset, config.train.memory_mb << 20)
    except Exception as e:
        raise delivery.sentence(e) or e from None
    threads = f"{config.train.threads} thread{'s' * (config.train.threads > 1)}"
    log(f"starting {config.train.workers} workers of {threads}")
    board = boards.create(0.9 * config.train.exchange_timeout)
    watch = boards.Watch(board, log)
    error, found = None, None
    servers: list[Any] = []
    try:
        if learn and method_class(config.method).memories is not Method.memories:
            o = config.train
            servers = stateactor.create(run.name, o.state_shards, workers(config)[1], o.exchange_timeout)
        trainer = TorchTrainer(
            worker.run,
            train_loop_config={
                "config": config_module.plain(config),
                "table": str(table.location),
                "delivered": list(datasets),
                "learn": learn,
                "board": board,
                "servers": servers,
            },
            datasets=datasets,
            dataset_config=delivery.ShardConfig({split: table.sizes(split) for split in datasets}),
            **_ray_config(config, run, boards.Deaths(board)),
        )
        done = cluster.interruptible(trainer.fit, lambda: ours and watch.failure is not None)
        found = done.return_value if done else None
    except TrainingFailedError as e:
        error = e
    except RayActorError as e:
        raise _ControllerLost(_line(e)) from e
    finally:
        failure = watch.close()
        for actor in (board, *servers):
            ray.kill(actor)
    if failure:
        kind, sentence = failure
        raise (UserError if kind == "UserError" else RunError)(sentence)
    if error:
        raise _failed(config, run, error) from error
    if found is None:
        raise RunError(f"{run}: the workers ended without a result; `train --run {run} --resume` goes on")
    floors = {name: Measured.from_ipc(data) for name, data in found["floors"].items()}
    outcome = Outcome(**found["outcome"]) if found["outcome"] else None
    return outcome, Assessment(found["step"], Measured.from_ipc(found["method"]), floors)


def _ray_config(config: Config, run: Location, callback: Any) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    o = config.train
    least, most = workers(config)
    storage = run / ".ray"
    return {
        "torch_config": TorchConfig(backend="cpu:gloo,cuda:nccl" if o.gpu else "gloo", timeout_s=o.exchange_timeout),
        "scaling_config": ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=o.gpu,
            resources_per_worker={"CPU": o.threads, **({"GPU": 1} if o.gpu else {})},
        ),
        "run_config": RunConfig(
            name=f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=storage.path,
            storage_filesystem=None if storage.is_local else storage.fs,
            failure_config=FailureConfig(max_failures=o.max_failures, controller_failure_limit=cluster.starts(o.wait)),
            callbacks=[callback],
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
