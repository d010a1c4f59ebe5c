"""Points of many dimensions on a plane, and how far apart their groups are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 4000
"""More points than this are thinned evenly: all their distances are looked at."""
CHUNK = 500
"""Points whose distances to all are in memory together."""


def project(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Principal components of `points` [n, d], the first two: [n, 2], each one's largest entry positive."""
    centred = points - points.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = np.vstack([axes[:2], np.zeros((max(0, 2 - len(axes)), points.shape[1]))])
    signs = np.sign(axes[np.arange(2), np.abs(axes).argmax(1)])
    return centred @ (axes * np.where(signs == 0, 1, signs)[:, None]).T


def silhouette(points: NDArray[np.float64], group: Sequence[str] | NDArray[Any]) -> float | None:
    """Mean silhouette of the groups (Rousseeuw, 1987): 1 far apart, 0 mixed; None for fewer than two groups.

    Of a point: (b − a) / max(a, b), a its mean distance to its own group's others, b the least mean distance to
    another group; 0 where it is alone in its group, or at no distance from anybody.
    """
    from scipy.spatial.distance import cdist

    step = -(-len(points) // MOST)
    points, labels = points[::step], np.unique(np.asarray(group)[::step], return_inverse=True)[1]
    counts = np.bincount(labels)
    if len(counts) < 2:
        return None
    member, chunks = np.eye(len(counts))[labels], -(-len(points) // CHUNK)
    sums = np.concatenate([cdist(some, points) @ member for some in np.array_split(points, chunks)])
    own, rows = counts[labels], np.arange(len(points))
    a = sums[rows, labels] / np.maximum(own - 1, 1)
    means = sums / counts
    means[rows, labels] = np.inf
    b = means.min(1)
    most = np.maximum(a, b)
    return float(np.where((own > 1) & (most > 0), (b - a) / np.where(most > 0, most, 1), 0.0).mean())
