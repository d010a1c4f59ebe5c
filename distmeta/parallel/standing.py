"""How far a run is: the scalars that a checkpoint carries besides tensors and position, and the words for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distmeta.data.epochs import Epochs
from distmeta.errors import UserError
from distmeta.parallel.checkpoint import Checkpoint
from distmeta.parallel.progress import clock, number
from distmeta.parallel.timing import PHASES


@dataclass
class Standing:
    """What training has come to."""

    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    waited: int = 0
    """Epochs without a better error since the last one, or since the step size last shrank."""
    shrunk: int = 0
    """How often --plateau made the step size smaller."""
    seconds: float = 0.0
    """Of the epochs before this one."""
    loss: float = 0.0
    tasks: float = 0.0
    """Sums of the epoch under way; so are the next ones."""
    wait: float = 0.0
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    groups: list[int] = field(default_factory=list)
    """Tasks of each group."""

    def add(self, loss: float, tasks: float, groups: list[int]) -> None:
        """Count a meta-update on."""
        self.loss += loss
        self.tasks += tasks
        self.groups = [a + b for a, b in zip(self.groups or [0] * len(groups), groups, strict=True)]

    def judge(self, mae: float | None, step: int, patience: int = 0) -> None:
        """An epoch ended at `step` with this validation error; none: there is nothing to validate with.

        Args:
            patience: epochs without a better one that the step size stays as it is.
        """
        if mae is None:
            self.best, self.best_step = None, step
        elif self.best is None or mae < self.best:
            self.best, self.best_step, self.stale, self.waited = mae, step, 0, 0
        else:
            self.stale += 1
            self.waited += 1
            if self.waited > patience:
                self.waited, self.shrunk = 0, self.shrunk + 1

    def next(self) -> "Standing":
        """Where the next epoch begins."""
        seconds = self.seconds + sum(self.phases.values())
        return Standing(self.best, self.best_step, self.stale, self.waited, self.shrunk, seconds)


def of_checkpoint(found: Checkpoint) -> Standing:
    """The standing that a checkpoint carries; UserError where that, or its cursor, is not what this distmeta writes."""
    odd = sorted(
        ({"epoch", "batch"} - found.cursor.keys())
        | (found.progress.keys() - vars(Standing()).keys())
        | (found.progress.get("phases", Standing().phases).keys() ^ set(PHASES))
    )
    if odd:
        raise UserError(
            f"{found.location}: its cursor or progress is of another distmeta ({odd[0]}); go on with the one that"
            " wrote it, or start a new run"
        )
    return Standing(**found.progress)


@dataclass(frozen=True)
class Words:
    """What the screen says of a run of `epochs` epochs cut as `cut` says, learned by gradient or solved."""

    epochs: int
    cut: Epochs
    learned: bool

    def within(self, at: Standing, epoch: int, batch: int, learning: float) -> str:
        """How far an epoch is; `learning`: its seconds so far but for validation."""
        return (
            f"epoch {epoch + 1}/{self.epochs}  {batch:,}/{self.cut.steps(epoch):,} updates"
            f"  train {number(at.loss / max(at.tasks, 1))}  {self._speed(at, learning)}"
            f"  ETA {clock(self._eta(at, epoch, batch))}"
        )

    def summary(self, at: Standing, row: Mapping[str, Any], over: bool, learning: float) -> str:
        """The line of an epoch that ended; `row`: its metrics, `over`: it was the last one."""
        epoch = row["epoch"]
        parts = [f"epoch {epoch}/{self.epochs}" if self.learned else "solved"]
        if row["train_loss"] is not None:
            parts.append(f"train {number(row['train_loss'])}")
        if row["valid_mae"] is not None:
            at_epoch = self.cut.ended(at.best_step or 0)
            best = f" (best {number(at.best or 0.0)} at {at_epoch})" if self.learned else ""
            parts.append(f"valid mae {number(row['valid_mae'])}{best}")
        if "valid_recall@10" in row:
            at_epoch = self.cut.ended(at.best_step or 0)
            best = f" (best {number(1 - (at.best or 0.0))} at {at_epoch})" if self.learned else ""
            parts.append(f"valid recall@10 {number(row['valid_recall@10'])}{best}")
        parts.append(self._speed(at, learning))
        if self.learned and not over:
            parts.append(f"ETA {clock(self._eta(at, epoch, 0))}")
        return "  ".join(parts)

    def _speed(self, at: Standing, learning: float) -> str:
        """`5,120 tasks/s  input 1.2 %`: the share of the time that training waited for its tasks."""
        learning = max(learning, 1e-9)
        waiting = f"  input {100 * at.wait / learning:.1f} %" if self.learned else ""
        return f"{at.tasks / learning:,.0f} tasks/s{waiting}"

    def _eta(self, at: Standing, epoch: int, batch: int) -> float:
        """Seconds until --epochs are done at the mean speed so far."""
        done = self.cut.before(epoch) + batch
        spent = at.seconds + sum(at.phases.values())
        return spent / done * (self.cut.before(self.epochs) - done) if done else 0.0
