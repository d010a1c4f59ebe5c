"""Values made ahead of their use, by a thread of their own."""

import contextlib
import queue
import threading
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def ahead(values: Generator[T], most: int) -> Generator[T]:
    """`values`, made by a daemon thread; what making one raises is raised here.

    Closing this ends the thread, whatever it is at, closes `values` and waits for both.

    Args:
        most: values that are ready or under way at a time, besides the one last given out, which is let go
            before another is begun.
    """
    room, ready, stopped = threading.Semaphore(most), queue.SimpleQueue[T | BaseException](), threading.Event()

    def run() -> None:
        try:
            with contextlib.closing(values):
                while room.acquire() and not stopped.is_set():
                    ready.put(next(values))
        except BaseException as e:  # the end of `values` too: handed to the consumer, whose loop it must end
            ready.put(e)

    thread = threading.Thread(target=run, name="distmeta-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value = ready.get()
            room.release()
            if isinstance(value, StopIteration):
                return
            if isinstance(value, BaseException):
                raise value
            yield value
            del value
    finally:
        stopped.set()
        room.release()
        thread.join()
