"""A search's trial, in its own process: trains the run of the trial and tells its validation error after every epoch.

The checkpoint of a trial is its run directory: whichever process trains there goes on from it.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distmeta import config as config_module
from distmeta import process
from distmeta.errors import RunError, UserError
from distmeta.parallel import rundir
from distmeta.parallel.stored import Stored
from distmeta.storage import Location

OBJECTIVE = "error"
"""What trials are judged by: the lowest validation error so far, as training judges its checkpoints (MAE of ratings and
clicks, 1 − Recall@10 of scenarios)."""


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
        known = isinstance(e, UserError | RunError)
        tune.report({"failure": str(e) if known else f"{type(e).__name__}: {e}", OBJECTIVE: math.inf, "epoch": 0})


def _train(asked: dict[str, Any], stored: Stored, report: Callable[[dict[str, Any]], Any]) -> None:
    from distmeta.parallel import trainer

    config = config_module.of_plain(asked["config"])
    run = Location.of(config.train.run)
    _settle(config.train.threads)
    told = 0

    def tell(rows: list[dict[str, Any]]) -> None:
        nonlocal told
        for n in range(told, len(rows)):
            seconds = sum(r["seconds"] for r in rows[: n + 1])
            error = min(_error(r) for r in rows[: n + 1])
            report({OBJECTIVE: error, "epoch": rows[n]["epoch"], "seconds": seconds})
        told = len(rows)

    run.make_dir()
    with _log(run) as log, rundir.lock(run, log):  # a process of a search that was killed may live for a moment
        (run / "config.yaml").write_bytes(config_module.to_yaml(config).encode())
        done = trainer.train(
            config, run, stored.dataset, stored.place, stored.table, log=log, report=tell, items=stored.items()
        )
    if done.best_mae is None:
        raise UserError(
            f"{stored.table.location}: no validation tasks to judge trials by; choose another --protocol or a larger dataset"
        )
    report({OBJECTIVE: done.best_mae, "epoch": max(done.epochs, 1), "seconds": done.seconds, "over": done.ended})


def _error(row: Mapping[str, Any]) -> float:
    """What training judges a checkpoint by; inf where there is no validation."""
    if row["valid_mae"] is not None:
        return row["valid_mae"]
    return 1 - row["valid_recall@10"] if "valid_recall@10" in row else math.inf


@functools.lru_cache(maxsize=1)
def _settle(threads: int) -> None:
    process.prepare(threads)


@contextlib.contextmanager
def _log(run: Location) -> Iterator[Callable[[str], None]]:
    """Appends lines to RUN/log.txt."""
    with open((run / "log.txt").path, "a") as f:

        def say(line: str) -> None:
            print(line, file=f, flush=True)

        yield say
