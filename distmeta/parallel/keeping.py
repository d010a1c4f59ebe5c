"""What a run keeps while it trains, and takes up again: its checkpoints, written while training goes on."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from distmeta import config as config_module
from distmeta.config import Config
from distmeta.exchange import Exchange
from distmeta.memory.base import Arrays
from distmeta.parallel import checkpoint as checkpoints
from distmeta.parallel.background import Background
from distmeta.parallel.checkpoint import Checkpoint, Stateful
from distmeta.parallel.standing import Standing
from distmeta.parallel.update import MetaUpdate
from distmeta.storage import Location


class Keeper:
    """The checkpoints of one run.

    Args:
        fence: called before each write; raises where this worker may not write to the run any more.
    """

    def __init__(
        self, config: Config, run: Location, split_hash: str, exchange: Exchange, fence: Callable[[], None]
    ) -> None:
        self.config, self.run, self.split_hash = config, run, split_hash
        self.exchange, self.fence = exchange, fence
        self.writing = Background()

    def save(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        stateful: Mapping[str, Stateful],
        step: int,
        cursor: dict[str, int],
        standing: Standing,
    ) -> None:
        """Copy what a checkpoint holds, and have it written while training goes on; on rank 0 alone.

        Args:
            tensors: `params`, `optimizer` -> tensors by name.
            stateful: what has a state besides, by name.
        """
        self.fence()
        parts: dict[str, Mapping[str, Tensor] | Arrays] = {
            name: {k: v.detach().clone() for k, v in part.items()} for name, part in tensors.items()
        }
        if stateful:
            parts["state"] = checkpoints.state_of(stateful)
        progress = {**vars(standing), "phases": dict(standing.phases), "groups": list(standing.groups)}
        self.writing.start(functools.partial(self._write, parts, step, cursor, progress))

    def _write(
        self,
        parts: dict[str, Mapping[str, Tensor] | Arrays],
        step: int,
        cursor: dict[str, int],
        progress: dict[str, Any],
    ) -> None:
        older = checkpoints.complete(self.run)
        checkpoints.save(
            self.run,
            parts,
            method=self.config.method,
            step=step,
            cursor=cursor,
            progress=progress,
            config=config_module.fixed(self.config),
            split_hash=self.split_hash,
        )
        best = progress["best_step"]
        checkpoints.retain(self.run, {step, *older[-1:], *([] if best is None else [best])})

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, which rank 0 says, of this run's settings; all workers call this.

        Raises:
            UserError: it is damaged, or of other settings.
        """
        newest = checkpoints.complete(self.run)[-1:] if self.exchange.rank == 0 else []
        steps = json.loads(self.exchange.gather(json.dumps(newest).encode())[0])
        if not steps:
            return None
        found = checkpoints.read(self.run, steps[0])
        checkpoints.check_origin(self.run, found, self.config, self.split_hash)
        return found

    def restore_moments(self, found: Checkpoint, update: MetaUpdate) -> None:
        """Give `update` the moments of a checkpoint; UserError where they are not its own."""
        moments = checkpoints.load(self.run, found, "optimizer")
        checkpoints.check(found, moments, update.moments())
        update.set_moments(moments)
