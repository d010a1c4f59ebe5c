"""Work that training need not wait for, one piece at a time: writing a checkpoint while the next steps are made."""

import threading
from collections.abc import Callable


class Background:
    """A thread for one piece of work at a time. What it raises is raised by the next `start` or `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Do `work` in the thread, after what it is at."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as e:  # handed over, whatever it is
                self._error = e

        self._thread = threading.Thread(target=run, name="distmeta-background")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is under way."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error
