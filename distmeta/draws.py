"""Counter-based randomness: every draw is a hash of what it is for, so there is no generator state to save.

A draw depends on (seed, epoch, task id, row, purpose) and on nothing else: not on the worker, the batch or the
order of arrival. That is what makes a resumed run, or one on another number of workers, see the same data.
The mixing function is splitmix64's finaliser (Steele, Lea & Flood, OOPSLA 2014).
"""

import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TURNS = 8


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, elementwise: a bijection of 64-bit words with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(*counters: ArrayLike, purpose: str) -> NDArray[np.uint64]:
    """Hash integer counters (broadcast against each other) and a purpose to 64-bit words.

    `counters` are taken in order, e.g. `hashed(seed, epoch, task_id[:, None], row[None, :], purpose="query")`.
    Negative integers are taken modulo 2**64.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        h = np.uint64(zlib.crc32(purpose.encode())) * _GOLDEN
        for counter in counters:
            c = np.asarray(counter)
            c = c.astype(np.int64).view(np.uint64) if c.dtype != np.uint64 else c
            h = mix(np.asarray((h ^ c) + _GOLDEN))
        return np.asarray(h)


def permuted(position: ArrayLike, size: ArrayLike, *counters: ArrayLike, purpose: str) -> NDArray[np.int64]:
    """Where a permutation of 0 … size − 1, one for each value of the counters, takes `position`; int64.

    The first k positions are so a draw of k of `size` without replacement, at a cost that knows k only. A Feistel
    network on the next even number of bits, walked along its cycle until it is below `size` (Black & Rogaway 2002).
    """
    key = hashed(*counters, purpose=purpose)
    at, size, key = (a.copy() for a in np.broadcast_arrays(np.asarray(position, np.uint64), size, key))
    size = size.astype(np.uint64)
    half = (np.ceil(np.log2(np.maximum(size, 256).astype(np.float64))).astype(np.uint64) + np.uint64(1)) // np.uint64(2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    flat = [a.reshape(-1) for a in (at, size, key, half, mask)]
    open_rows = np.arange(flat[0].size)
    while len(open_rows):
        x, n, k, h, m = (a[open_rows] for a in flat)
        left, right = x >> h, x & m
        for turn in range(_TURNS):
            left, right = right, left ^ (hashed(k, right, turn, purpose="feistel") & m)
        x = (left << h) | right
        flat[0][open_rows] = x
        open_rows = open_rows[x >= n]
    return flat[0].reshape(at.shape).astype(np.int64)


def uniform(*counters: ArrayLike, purpose: str) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, by `hashed`."""
    return (hashed(*counters, purpose=purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(*counters: ArrayLike, purpose: str) -> NDArray[np.float64]:
    """Standard normal numbers by Box-Muller over two `uniform` draws."""
    u = uniform(*counters, 0, purpose=purpose)
    v = uniform(*counters, 1, purpose=purpose)
    return np.sqrt(-2.0 * np.log1p(-u)) * np.cos(2.0 * np.pi * v)
