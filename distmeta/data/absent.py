"""Items that a user has not taken, drawn exactly: no draw is ever refused, however much the user has taken."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Taken:
    """Which of a scenario's items each of its users has taken: rows of (group, position), sorted and distinct.

    A group is one user in one scenario, a position that of an item among the scenario's items. The r-th position
    that a group has not taken is r plus the taken ones before it: those, the i-th of the group, with position − i ≤ r.
    """

    start: Ints
    """[groups]: the first row of each."""
    count: Ints
    """[groups]: rows of each."""
    width: int
    """More than any number of items."""
    keys: Ints
    """[rows], sorted: group · width + position − place of the row in its group."""

    @classmethod
    def of(cls, count: Ints, position: Ints, width: int) -> "Taken":
        """From the rows of all groups one after another, `count` of each."""
        start = np.cumsum(count) - count
        place = np.arange(len(position)) - np.repeat(start, count)
        return cls(start, count, width, np.repeat(np.arange(len(count)), count) * width + position - place)

    def absent(self, group: Ints, items: Ints, u: NDArray[np.float64]) -> Ints:
        """For each asked group one position that it has not taken, all alike likely; `u` in [0, 1) decides.

        Args:
            items: items of the group's scenario, more than the group has taken.
        """
        r = (u * (items - self.count[group])).astype(np.int64)
        before = np.searchsorted(self.keys, group * self.width + r, side="right") - self.start[group]
        return r + before
