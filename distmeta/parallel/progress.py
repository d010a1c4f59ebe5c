"""What a person sees while a run trains: a line an epoch, and within long epochs a sign of life."""

import sys
import time
from collections.abc import Callable
from typing import TextIO


def clock(seconds: float) -> str:
    """`0:42`, `12:03`, `3:20:11`."""
    s = max(0, round(seconds))
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


def number(value: float) -> str:
    """Three decimals, without the zero before the point: `.741`, `1.204`."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


class Progress:
    """Writes epoch lines through `log`, and progress within an epoch: on a terminal rewritten in place every
    few seconds, in a file plain and rare.

    Args:
        log: takes one line (print, a logger's method).
        stream: where the rewritten line goes.
    """

    def __init__(self, log: Callable[[str], None], stream: TextIO | None = None) -> None:
        self.log = log
        self.stream = stream or sys.stderr
        self.tty = self.stream.isatty()
        self.every = 2.0 if self.tty else 60.0
        self.last = time.monotonic()
        self.width = 0

    def within(self, text: Callable[[], str]) -> None:
        """Say how far the epoch is, if the last sign of life is old enough; `text` is made only then."""
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.now(text)

    def now(self, text: Callable[[], str]) -> None:
        """Say it at once."""
        self.last = time.monotonic()
        line = text()
        if self.tty:
            self.stream.write("\r" + line.ljust(self.width))
            self.stream.flush()
            self.width = len(line)
        else:
            self.log(line)

    def line(self, text: str) -> None:
        """A line that stays; the rewritten one is wiped first."""
        self.wipe()
        self.log(text)
        self.last = time.monotonic()

    def wipe(self) -> None:
        """Take the rewritten line away."""
        if self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()
            self.width = 0
