"""What a process has of the machine, and what one that adapts tasks in batches sets once, before its first tensor."""

import contextlib
import ctypes
import gc
import math
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEEP = 2**31 - 1
_LARGEST = (1 << 30, 1 << 25)  # the second is the most that glibc accepts on 64 bits where it refuses the first


_QUOTA = "/sys/fs/cgroup/cpu.max"


def cores(quota: str = _QUOTA) -> int:
    """CPU cores that this process may use: those that the kernel lets it run on, and of their time what a container's
    limit leaves, rounded up.

    Args:
        quota: file of a container's limit (cgroup v2: microseconds, or max, in each so many).
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open(quota) as f:
            most, period = f.read().split()
        usable = min(usable, max(1, math.ceil(int(most) / int(period))))
    return usable


def free_memory(meminfo: str = "/proc/meminfo", limit: str = "/sys/fs/cgroup/memory") -> int | None:
    """Bytes that this process may still take: what Linux calls available, and what a container's limit leaves of it.

    Args:
        meminfo: file of the kernel. limit: what the files of a container's limit and use begin with (cgroup v2).

    Returns:
        None where the system does not tell.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration), open(meminfo) as f:
        found.append(1024 * int(next(line.split()[1] for line in f if line.startswith("MemAvailable:"))))
    # `max`, where there is no limit, is no number
    with contextlib.suppress(OSError, ValueError), open(f"{limit}.max") as most, open(f"{limit}.current") as used:
        found.append(max(0, int(most.read()) - int(used.read())))
    return min(found, default=None)


def prepare(threads: int) -> bool:
    """Set torch's threads, and let freed memory stay with the process.

    The graph of a batch is some tens of MiB that are allocated and freed at every step. By default glibc returns
    them to the kernel and the next step faults them back in page by page (measured: 3,000 faults a step, a fifth
    of its time). Kept, the memory is at most what the largest step so far needed.

    Args:
        threads: torch's threads for one operation, at least 1.

    Returns:
        Whether malloc was told so; False where the C library has no mallopt (not glibc).
    """
    import torch

    torch.set_num_threads(threads)
    # what is loaded by now stays loaded: full collections, which a batch's many small objects bring about, skip it
    gc.collect()
    gc.freeze()
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)
    return bool(mallopt(_TRIM_THRESHOLD, _KEEP)) and kept
