"""Counter-based randomness: every draw is a hash of what it is for, so there is no generator state to save.

A draw depends on (seed, epoch, task id, row, purpose) and on nothing else: not on the worker, the batch or the
order of arrival. That is what makes a resumed run, or one on another number of workers, see the same data.
The mixing function is splitmix64's finaliser (Steele, Lea & Flood, OOPSLA 2014).
"""

import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TURNS, _LEAST = 4, 256


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
    network on numbers of two digits, in bases whose product is hardly more than `size`, walked along its cycle until
    it is below `size` (Black & Rogaway, CT-RSA 2002).
    """
    key = hashed(*counters, purpose=purpose)
    at, n, key = (np.array(a) for a in np.broadcast_arrays(np.asarray(position, np.uint64), size, key))
    n = n.astype(np.uint64)
    room = np.maximum(n, _LEAST).astype(np.float64)
    low = np.ceil(np.sqrt(room)).astype(np.uint64)
    flat = [a.reshape(-1) for a in (at, n, low, np.ceil(room / low).astype(np.uint64))]
    keys = np.stack([hashed(key.reshape(-1), turn, purpose="feistel") for turn in range(_TURNS)])
    rows = np.arange(at.size)
    while len(rows):
        x, top, low, high = (a[rows] for a in flat)
        left, right = x // low, x % low
        for k in keys[:, rows]:
            left = (left + mix(k ^ mix(right)) % high) % high
            right = (right + mix(k ^ mix(~left)) % low) % low
        flat[0][rows] = x = left * low + right
        rows = rows[x >= top]
    return flat[0].reshape(at.shape).astype(np.int64)


def uniform(*counters: ArrayLike, purpose: str) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, by `hashed`."""
    return (hashed(*counters, purpose=purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(*counters: ArrayLike, purpose: str) -> NDArray[np.float64]:
    """Standard normal numbers by Box-Muller over two `uniform` draws."""
    u = uniform(*counters, 0, purpose=purpose)
    v = uniform(*counters, 1, purpose=purpose)
    return np.sqrt(-2.0 * np.log1p(-u)) * np.cos(2.0 * np.pi * v)
