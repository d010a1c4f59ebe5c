"""Which of several choices nothing else beats in two costs at once."""

import math
from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points (two costs each) than which no other is at least as low in both and lower in one; by the
    first cost, points alike in both by position."""
    found: list[int] = []
    last = (math.inf, math.inf)
    for point, i in sorted((point, i) for i, point in enumerate(points)):
        if point[1] < last[1] or point == last:
            last = point
            found.append(i)
    return found
