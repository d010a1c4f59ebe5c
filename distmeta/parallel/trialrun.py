"""A search's trial, in its own process: trains the run of the trial and tells its validation error after every epoch.

The checkpoint of a trial is its run directory: whichever process trains there goes on from it. A trial of several seeds
has a directory for each: NNNN, NNNN-seed1, ….
"""

import contextlib
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distmeta import config as config_module
from distmeta import process, remote
from distmeta.config import Config
from distmeta.errors import RunError, UserError
from distmeta.parallel import rundir
from distmeta.parallel.stored import Stored
from distmeta.parallel.validation import read_metrics
from distmeta.storage import Location

OBJECTIVE = "error"
"""What trials are judged by: the metric asked for, or 1 − recall, of the checkpoint that training keeps as its best."""
_LOOK_S = 1.0
"""Seconds between two looks at what workers have trained."""
_FREED_S = 30
"""Seconds that a stopped trial has to free its workers, before its process is replaced."""
_LOCKED_S = 60.0
"""Seconds for which the process of a search that was killed may still hold a run."""


def run(asked: dict[str, Any], stored: Stored) -> None:
    """Train the run of a trial, from its newest checkpoint if there is one, and report each epoch.

    What goes wrong is reported as `failure`, so that it is recorded with its reason and not tried again.

    Args:
        asked: `run`, the name of its run, and `config`, the plain mapping of a Config.
        stored: as it lies in the object store of this node.
    """
    from ray import tune

    try:
        _train(asked, stored, tune.report)
    except Exception as e:
        said = remote.explained(e) or e
        known = isinstance(said, UserError | RunError)
        tune.report({"failure": str(said) if known else f"{type(e).__name__}: {e}", OBJECTIVE: math.inf, "epoch": 0})


def _train(asked: dict[str, Any], stored: Stored, report: Callable[[dict[str, Any]], Any]) -> None:
    config = config_module.of_plain(asked["config"])
    run = Location.of(config.train.run)
    if run.is_local and not run.parent.exists():  # the search has made it
        import ray

        raise UserError(
            f"{run.parent}: node {ray.util.get_node_ip_address()} does not see this search; choose an --out on"
            " storage that all nodes share"
        )
    _settle(config.train.threads)
    told, errors, seconds = 0, list[float](), 0.0

    def tell(rows: list[dict[str, Any]]) -> None:
        nonlocal told
        for n in range(told, len(rows)):
            spent = sum(r["seconds"] for r in rows[: n + 1])
            best = min(rows[: n + 1], key=_judged)
            report({OBJECTIVE: _error(best, asked["metric"]), "epoch": rows[n]["epoch"], "seconds": spent})
        told = len(rows)

    for n in range(asked["seeds"]):  # after the first, one that was not stopped in it
        seeded = _seeded(config, n)
        run = Location.of(seeded.train.run).make_dir()
        with _log(run) as log, _held(run, log):
            (run / "config.yaml").write_bytes(config_module.to_yaml(seeded).encode())
            done = _trained(seeded, run, stored, log, tell if n == 0 else lambda _: None)
        if done.best_mae is None:
            raise UserError(
                f"{stored.table.location}: no validation tasks to judge trials by; choose another --protocol or a"
                " larger dataset"
            )
        kept = next(r for r in read_metrics(run) if r["step"] == done.best_step)
        errors.append(_error(kept, asked["metric"]))
        seconds += done.seconds
    several = {"errors": errors, "deviation": statistics.stdev(errors)} if len(errors) > 1 else {}
    report({OBJECTIVE: statistics.fmean(errors), "epoch": max(told, 1), "seconds": seconds, "over": True, **several})


def _trained(
    config: Config, run: Location, stored: Stored, log: Callable[[str], None], tell: Callable[[list[dict]], None]
) -> Any:
    """Train a run, here or on --workers; its Outcome."""
    if config.train.workers == "0":
        from distmeta.parallel import trainer

        return trainer.train(
            config, run, stored.dataset, stored.place, stored.table, log=log, report=tell, items=stored.items()
        )
    import ray

    from distmeta.parallel import launch

    shared, looked = stored.workers, time.monotonic()
    assert shared
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(_FREED_S))
    ray.get(shared.leash.free.remote(str(run)))  # of a process that was killed here

    def follow() -> None:
        nonlocal looked
        if time.monotonic() - looked > _LOOK_S:
            tell(read_metrics(run))
            looked = time.monotonic()

    done = launch.train_trial(config, run, stored.table, log, launch.Trial(follow, shared.leash, shared.datasets))
    tell(read_metrics(run))
    return done


def _seeded(config: Config, n: int) -> Config:
    """The config of a trial's n-th seed: of the first, 0, its own."""
    if not n:
        return config
    train = config.train
    return dataclasses.replace(
        config, train=dataclasses.replace(train, seed=train.seed + n, run=f"{train.run}-seed{n}")
    )


def _judged(row: Mapping[str, Any]) -> float:
    """What training judges a checkpoint by; inf where there is no validation."""
    if row["valid_mae"] is not None:
        return row["valid_mae"]
    return 1 - row["valid_recall@10"] if "valid_recall@10" in row else math.inf


def _error(row: Mapping[str, Any], metric: str) -> float:
    """A metric of an epoch's line, less is better; inf where there is no validation."""
    value = row.get(f"valid_{metric}")
    if value is None:
        return math.inf
    return 1 - value if metric.startswith("recall") else value


@contextlib.contextmanager
def _held(run: Location, log: Callable[[str], None]) -> Iterator[None]:
    """The run's lock, waited for: a process of a search that was killed may live for a moment."""
    until = time.monotonic() + _LOCKED_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(rundir.lock(run, log))
                break
            except UserError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
        yield


@functools.lru_cache(maxsize=1)
def _settle(threads: int) -> None:
    process.prepare(threads)


@contextlib.contextmanager
def _log(run: Location) -> Iterator[Callable[[str], None]]:
    """Appends lines to RUN/log.txt."""
    with (run / "log.txt").appending() as say:
        yield say
