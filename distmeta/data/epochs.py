"""How the batches of a run are cut into epochs: whole passes over the training tasks, or parts of a pass.

A part is what a run validates, checkpoints and reports after: a pass over a million tasks need not be one epoch. The
order of the tasks is that of the passes: the parts of a pass, one after another, are the pass.
"""

from dataclasses import dataclass

from distmeta.errors import UserError


@dataclass(frozen=True)
class Epochs:
    """Epoch e is part e mod `parts` of pass e // `parts`; parts of a pass differ by one batch at most."""

    whole: int
    """Batches of a pass."""
    parts: int = 1
    """Epochs that a pass takes."""

    @classmethod
    def of(cls, tasks: int, whole: int, batch_size: int, most: int) -> "Epochs":
        """Passes of `tasks` tasks in `whole` batches, an epoch having at most `most` tasks; 0: a pass.

        Raises:
            UserError: an epoch would not hold a batch.
        """
        if not most or most >= tasks:
            return cls(whole)
        if most < batch_size:
            raise UserError(f"--epoch-tasks {most}: a meta-update takes --batch-size {batch_size}; give at least that")
        return cls(whole, -(-whole // (most // batch_size)))

    def before(self, epoch: int) -> int:
        """Batches of all epochs before this one: a run's step where it begins."""
        passes, part = divmod(epoch, self.parts)
        return passes * self.whole + part * self.whole // self.parts

    @property
    def mean(self) -> float:
        """Batches of an epoch, on average."""
        return self.whole / self.parts

    def steps(self, epoch: int) -> int:
        """Batches of an epoch."""
        return self.before(epoch + 1) - self.before(epoch)

    def at(self, epoch: int) -> tuple[int, int, int]:
        """The pass of an epoch, the epoch's first batch in it, and that after its last."""
        number = epoch // self.parts
        first = self.before(epoch) - number * self.whole
        return number, first, first + self.steps(epoch)

    def ended(self, step: int) -> int:
        """The number of epochs that have ended where a run has made `step` updates."""
        passes, rest = divmod(step, max(self.whole, 1))
        return passes * self.parts + -(-rest * self.parts // max(self.whole, 1))
