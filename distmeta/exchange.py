"""How workers put their numbers together: the seam between what is computed and how it is spread."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from distmeta.parallel.shared import Servers


class Exchange:
    """This one is for a single process, where the sum is the number itself; parallel/collective.py has the other."""

    rank: int = 0
    world: int = 1
    servers: "Servers | None" = None
    """Of what the tasks of all workers share; none: it is in this process."""

    def sum(self, flat: Tensor) -> Tensor:
        """Replace the 1-d tensor `flat` by its sum over all workers, in place, and return it."""
        return flat

    def sums(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace each dense tensor by its sum over all workers; the same names and shapes everywhere."""
        for key in sorted(values):
            value = values[key].contiguous()
            values[key] = self.sum(value.view(-1)).view_as(value)
        return values

    def gather(self, data: bytes) -> list[bytes]:
        """What every worker gave, in rank order, on every worker; lengths may differ. All must call it."""
        return [data]
