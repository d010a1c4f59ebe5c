"""The constant floor: one number for everybody."""

from torch import Tensor

from distmeta.methods.closedform import ClosedForm
from distmeta.tasks import TaskBatch


class Constant(ClosedForm):
    """Predicts the mean training label.

    The mean minimises the squared error over training *ratings* (`mse` pooled, `rmse`); it does not minimise
    the absolute error, for which the median would be the constant, nor the per-user means, which weigh users
    alike.
    """

    name = "constant"
    sweeps = 1

    def statistics(self, batch: TaskBatch, sweep: int) -> dict[str, Tensor]:
        return {"labels": self.first_sums(batch)["labels"]}

    def solve(self, statistics: dict[str, Tensor], sweep: int) -> None:
        self.set_mean(statistics)

    def adapt(self, batch: TaskBatch) -> list[None]:
        return [None] * len(batch.blocks)

    def predict(self, state: list[None], batch: TaskBatch) -> list[Tensor]:
        return [self.mean.expand(block.query.item.shape) for block in batch]
