"""The run directory: what it holds, who may write to it, and when it may be gone on with.

RUN/
  config.yaml       the whole config; a run exists when this does
  metrics.jsonl     one line an epoch
  checkpoints/      see checkpoint.py
  measured.arrow    what each test task came to, as Arrow streams (evaluation/measured.py)
  measured-*.arrow  the same of another split by the checkpoint of a step, where a parameter study asked for it
  evaluation.json   metrics by cohort, floors and paired differences
  report.html       the same as tables and pictures
  run.json          written last, when the run has finished
  .lock             held by the driver at work
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator

from distmeta import config as config_module
from distmeta.config import Config
from distmeta.errors import UserError
from distmeta.parallel import claim
from distmeta.storage import Location, writing


def default(method: str, dataset: str) -> Location:
    """runs/METHOD-DATASET-TIME under the working directory; a number is added where that is taken."""
    plain = re.sub(r"[^\w.-]+", "-", dataset)  # a dataset may be called anything, a/../b too
    name = f"runs/{method}-{plain}-{time.strftime('%Y%m%d-%H%M%S')}"
    run, n = Location.of(name), 1
    while run.exists():
        n += 1
        run = Location.of(f"{name}-{n}")
    return run


def exists(run: Location) -> bool:
    """Whether a run was started here."""
    return (run / "config.yaml").exists()


def begun(run: Location) -> bool:
    """Whether there is a run here to go on with.

    One that failed before it kept anything, for a setting that cannot be, leaves its config.yaml: no obstacle to
    another, as the lock tells it from one that is just starting.
    """
    return exists(run) and bool(_kept(run))


def finished(run: Location) -> bool:
    """Whether the run here was trained and evaluated to its end."""
    return (run / "run.json").exists()


def stored(run: Location) -> Config:
    """The config of the run that exists here.

    Raises:
        UserError: there is no run here, or its config.yaml is damaged.
    """
    if not exists(run):
        raise UserError(f"{run}: no run here (config.yaml is missing); give the directory of a run, or train one")
    return config_module.load(run / "config.yaml", None, {})


def check_new(run: Location) -> None:
    """UserError where a new run may not start at `run`: a run has begun there, or other things lie there."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file, not a directory; choose another --run")
    if begun(run):
        raise UserError(f"{run}: a run exists here; add --resume to go on with it, or choose another --run")
    if kept := _kept(run):
        raise UserError(f"{run}: holds other things ({kept[0]}); choose a --run that is empty or does not exist")


def _kept(run: Location) -> list[str]:
    """What lies in `run` besides what a driver writes before it has learned anything."""
    names = [c.name for c in run.children()]
    return [n for n in names if n not in (".lock", "config.yaml") and not n.startswith("config.yaml.tmp-")]


def check_same(run: Location, config: Config) -> None:
    """UserError naming the first key in which `config` differs from the run's own, but for those it may."""
    before, now = config_module.fixed(stored(run)), config_module.fixed(config)
    for key in sorted(before.keys() & now.keys()):  # epochs stand in one of them only if lr_decay differs as well
        old, new = before[key], now[key]
        if old != new:
            raise UserError(f"{run}: was started with {key} = {old!r}, not {new!r}; leave it so, or start a new run")


@contextlib.contextmanager
def lock(run: Location, log: Callable[[str], None] = print) -> Iterator[Callable[[], None]]:
    """Hold RUN/.lock while driving the run; it names this process and host.

    The kernel drops the lock with the process, so that one killed leaves no obstacle: its name in the file is
    taken over. On object stores see claim.py.

    Gives what raises RunError where the run was taken over all the same, as object stores cannot quite exclude.

    Raises:
        UserError: another process drives this run.
    """
    if not run.is_local:
        with claim.held(run, log) as check:
            yield check
        return
    path = (run / ".lock").path
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{run}: is being trained by {_holder(handle)}; wait, end it, or choose another --run"
                ) from None
            log(f"{run}: this filesystem has no locks ({e.strerror}); take care to drive it only once")
        else:
            if os.fstat(handle).st_size:
                log(f"{run}: taking over from {_holder(handle)}, which ended without finishing")
        mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        with writing(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, mine, 0)
        yield lambda: None
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    try:
        value = json.loads(os.pread(handle, 4096, 0))
        return f"process {value['pid']} on {value['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
