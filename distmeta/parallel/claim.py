"""Who drives a run on an object store, which has no locks: RUN/.lock names the driver, who writes it anew all the time.

Whoever finds it takes the run over when it no longer changes. Two that begin at the same moment see each other's name
there; one that was away for long (a machine that slept) and finds another's does not write over it.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from distmeta.errors import RunError, UserError
from distmeta.storage import Location

BEAT_S = 10.0
"""Seconds between two signs of life."""
SILENT_S = 45.0
"""Seconds without one after which a driver counts as gone."""
SETTLE_S = 0.5
"""Seconds in which another one that began at the same moment shows."""


class Claim:
    """This process's name in a run's file `.lock`."""

    def __init__(self, file: Location) -> None:
        self.file, self.lost = file, False
        self.mine = {"pid": os.getpid(), "host": socket.gethostname(), "name": uuid.uuid4().hex, "beat": 0}

    def write(self) -> None:
        self.mine["beat"] += 1  # type: ignore[operator]
        self.file.write_json(self.mine)

    def check(self) -> None:
        """RunError where another driver has taken the run over."""
        if self.lost:
            raise RunError(f"{self.file.parent}: another process took this run over; this one ends")

    def beat(self, over: threading.Event) -> None:
        """Write the file again and again, until `over` or another name is there."""
        while not over.wait(BEAT_S):
            with contextlib.suppress(OSError, UserError):  # an outage passes
                if read(self.file).get("name") not in (None, self.mine["name"]):
                    self.lost = True
                    return
                self.write()


def read(file: Location) -> dict[str, Any]:
    """What the file says; nothing where it does not exist or is no such file."""
    try:
        value = json.loads(file.read_bytes())
        return value if isinstance(value, dict) else {}
    except (FileNotFoundError, ValueError):
        return {}


@contextlib.contextmanager
def held(run: Location, log: Callable[[str], None] = print) -> Iterator[Callable[[], None]]:
    """Hold RUN/.lock while driving the run; gives `Claim.check`.

    Raises:
        UserError: another process drives this run.
    """
    file = run / ".lock"
    if before := read(file):
        _await_silence(run, file, before, log)
    claim = Claim(file)
    claim.write()
    time.sleep(SETTLE_S)
    if (there := read(file)).get("name") != claim.mine["name"]:
        raise _driven(run, there)
    over = threading.Event()
    thread = threading.Thread(target=claim.beat, args=(over,), name="distmeta-claim", daemon=True)
    thread.start()
    try:
        yield claim.check
    finally:
        over.set()
        thread.join()
        if not claim.lost:
            file.remove()


def _await_silence(run: Location, file: Location, before: dict[str, Any], log: Callable[[str], None]) -> None:
    """Wait until the driver named in the file counts as gone; UserError where it gives a sign of life."""
    if not _ended(before):
        log(f"{run}: was driven by {_named(before)}; waiting {SILENT_S:.0f} s for a sign of life from it")
        until = time.monotonic() + SILENT_S
        while time.monotonic() < until and not _ended(before):
            time.sleep(min(1.0, SILENT_S / 4))
            now = read(file)
            if not now:
                return
            if now != before:
                raise _driven(run, now)
    log(f"{run}: taking over from {_named(before)}, which ended without finishing")


def _ended(owner: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no longer there."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _driven(run: Location, owner: dict[str, Any]) -> UserError:
    return UserError(f"{run}: is being trained by {_named(owner)}; wait, end it, or choose another --run")
