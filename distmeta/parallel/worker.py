"""What a Ray Train worker runs: the training loop, with an exchange between processes and tasks from Ray Data."""

import uuid
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError

from distmeta import config as config_module
from distmeta import process, remote
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import RunError, Unreachable, UserError
from distmeta.parallel import rundir, trainer
from distmeta.parallel.assessment import assess
from distmeta.parallel.collective import ExchangeBroken, TorchExchange
from distmeta.parallel.delivery import DeliveredTable
from distmeta.parallel.state import StateError
from distmeta.parallel.stateactor import RayServers
from distmeta.parallel.watch import Pulse
from distmeta.storage import Location


def run(settings: dict[str, Any]) -> dict[str, Any] | None:
    """One rank of a run: train from its newest complete checkpoint, where that is wanted, then measure it.

    Args:
        settings: `config` (the plain mapping of a Config), `table` (where the task table lies), `delivered` (its
            splits that Ray Train hands out), `learn` (whether to train), `measure` (whether to assess what was
            trained), `board`, `servers` (of the shared state, by shard; none where the method has none).

    Returns:
        Of rank 0: `outcome` (an Outcome as a mapping, None where nothing was to be learned) and the Assessment,
        where one was asked for: `step`, and as Arrow IPC `method` and `floors`. None of the others, and where the run
        cannot be: then a worker has left the sentence on the board.

    Raises:
        ExchangeBroken, StateError: another worker or the shared state was lost; Ray Train starts a new group of
            workers, as for any error.
    """
    # Ray Train shows all GPUs of a node to all its workers there
    if settings["config"]["train"]["gpu"] and torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    board = settings["board"]
    if ray.get(board.failed.remote()):
        return None
    exchange = TorchExchange()
    if exchange.rank == 0:
        ray.get(board.start.remote())
    pulse = Pulse(board, exchange)
    try:
        return _work(settings, exchange, lambda line: board.say.remote(line))
    except (ExchangeBroken, StateError, RayError, Unreachable):
        raise  # what is lost may be back when the next group of workers starts
    except Exception as e:
        said = remote.explained(e) or e
        if isinstance(said, OSError | Unreachable):
            raise
        kind = "UserError" if isinstance(said, UserError) else "RunError"
        known = isinstance(said, UserError | RunError)
        whose = "" if known else f"worker {exchange.rank} ({pulse.place}): {type(e).__name__}: "
        ray.get(board.fail.remote(kind, f"{whose}{said}"))
        raise  # which ends the others too; the next group of workers finds the failure and does nothing
    finally:
        pulse.close()


def _work(settings: dict[str, Any], exchange: TorchExchange, log: Any) -> dict[str, Any] | None:
    config = config_module.of_plain(settings["config"])
    process.prepare(config.train.threads)
    run, place = Location.of(config.train.run), Location.of(config.data.data)
    where = f"a worker on {ray.util.get_node_ip_address()}"
    if not rundir.exists(run):
        raise UserError(f"{run}: {where} does not see this run; choose a --run on storage that all nodes share")
    if not (place / "dataset.json").exists():
        raise UserError(f"{place}: {where} does not see this dataset; put it on storage that all nodes share")
    table = TaskTable.open(Location.of(settings["table"]))
    table = DeliveredTable(**vars(table), delivered=frozenset(settings["delivered"]))
    dataset, outcome = table.seen(Dataset.open(place)), None
    if settings["servers"]:
        exchange.servers = RayServers(settings["servers"], exchange, config.train.exchange_timeout)
    if settings["learn"]:
        fence = Fence(run, exchange) if exchange.rank == 0 else None
        outcome = asdict(trainer.train(config, run, dataset, place, table, exchange, log, fence=fence))
    if not settings["measure"]:
        return None if exchange.rank else {"outcome": outcome}
    found = assess(config, run, dataset, place, table, exchange)
    if exchange.rank:
        return None
    floors = {name: measured.to_ipc() for name, measured in found.floors.items()}
    return {"outcome": outcome, "step": found.step, "method": found.method.to_ipc(), "floors": floors}


class Fence:
    """Keeps a worker that was given up, but lives on, from writing into the run that others go on with.

    A node that lost its cluster goes on training until it is told; the newest group of workers puts its name into
    RUN/.ray/owner, and who finds another name there stops.
    """

    def __init__(self, run: Location, exchange: TorchExchange) -> None:
        self.file, self.name = (run / ".ray").make_dir() / "owner", uuid.uuid4().hex.encode()
        self.file.write_bytes(self.name)

    def __call__(self) -> None:
        """Raise ExchangeBroken where a newer group of workers has taken the run over."""
        if self.file.read_bytes() != self.name:
            raise ExchangeBroken(f"{self.file}: a newer group of workers goes on with this run")
