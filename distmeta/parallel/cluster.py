"""Ray as this program starts it, or finds it: settings, address and authentication."""

import contextlib
import logging
import math
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

from distmeta.errors import RunError, UserError
from distmeta.parallel import room
from distmeta.process import cores

T = TypeVar("T")

NAMESPACE = "distmeta"
START_S = 30
"""Seconds after which Ray Train gives up a start of workers, to try again with what nodes there are then."""

_ANSWER_S = 5
"""Seconds to wait for a cluster's answer."""
_TOKENS = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}

_MISMATCH = re.compile(r"^Version mismatch: .*Ray: (\S+) Python: (\S+) .* Ray: (\S+) Python: (\S+)")
"""What ray.init says where the cluster's versions are others, its lines joined."""

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # 2 s by default, of which a failure waits for one
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_S),
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    # on a cluster of our own: a step's arrays to and from the shared state go with the call, in half the time that the
    # detour through the object store takes, which is the way above 100 kB by default
    "RAY_max_direct_call_object_size": str(1 << 20),
    "RAY_worker_niceness": "0",  # workers are what the user waits for; 15 starves them beside anything else
}


@contextlib.contextmanager
def connected(needed: int, threads: int, gpu: float, wait: int, log: Callable[[str], None] = print) -> Iterator[bool]:
    """Be connected to the cluster at RAY_ADDRESS, or to one of its own on this machine, which ends with this block.

    Gives whether the connection is this block's own, so that its end ends all that was started.

    Args:
        needed: workers that must fit. threads: CPUs of each. gpu: GPUs of each. wait: seconds to wait for nodes.

    Raises:
        UserError: no cluster answers at the address, it refuses the token, or it is too small.
        KeyboardInterrupt, SystemExit: the process was told to end, and is disconnected.
    """
    already = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if already:  # the connection of a program that calls us, which is not ours to end
        _set(_SETTINGS)
        with room.wanted(needed, threads, gpu, wait, log):
            yield False
        return
    address = _address()
    if not address and needed * threads > cores():
        raise UserError(
            f"--workers {needed}: {needed} workers of {threads} CPU{'s' * (threads > 1)} each need {needed * threads},"
            f" this machine has {cores()}; use fewer --workers or --threads, or a cluster (set RAY_ADDRESS)"
        )
    settle(address)
    import ray

    with _signals():
        try:
            _connect(address)
            _on_sigterm()
            with room.wanted(needed, threads, gpu, wait, log):
                yield True
        finally:
            ray.shutdown()


def settle(address: str) -> None:
    """Ray's settings, where the user has others in the environment they stay; all its processes inherit them.

    Args:
        address: of the cluster to connect to; empty for one of our own, which is still to start.

    Raises:
        UserError: RAY_AUTH_MODE is no word of Ray's.
    """
    _set(_SETTINGS if address else {**_SETTINGS, "MALLOC_ARENA_MAX": "1"})
    _authentication(address)


def _set(settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def starts(wait: int) -> int:
    """How often Ray Train may try to start workers within `wait` seconds."""
    return math.ceil(wait / float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]))


def _address() -> str:
    """RAY_ADDRESS, host:port or auto; empty for a cluster of our own.

    Raises:
        UserError: it is neither.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return ""
    if address == "auto" or re.fullmatch(r"[^/]+:\d+", address):
        return address
    where = "; the dashboard's address is for `ray job submit --address`" if address.startswith("http") else ""
    raise UserError(f"RAY_ADDRESS={address}: give host:port of the cluster's head (6379 by default), or auto{where}")


def _connect(address: str) -> None:
    import ray

    try:
        if address not in ("", "auto"):
            _answers(address)
        ray.init(
            address=address or "local",
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            **({} if address else {"num_cpus": cores(), "include_dashboard": False}),
        )
    except UserError:
        raise
    except Exception as e:
        raise _refused(address, e) from e


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends this block as Ctrl-C does, and both have their handlers back after it.

    Ray's own handlers of SIGTERM end the process with a stack trace, without disconnecting it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as e:
        if e.code != signal.SIGTERM:
            raise
        print("terminated", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_sigterm() -> None:
    """Take SIGTERM from Ray, which has taken it in ray.init."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))


def interruptible(work: Callable[[], T], over: Callable[[], bool] = lambda: False) -> T | None:
    """work(), in a thread, so that Ctrl-C and SIGTERM end the wait for it at once; None where `over` says so before.

    In the main thread Ray Train's `fit()` takes Ctrl-C over and goes on training for many seconds, then exits with 1.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as e:
            done.set_exception(e)

    threading.Thread(target=run, name="distmeta-fit", daemon=True).start()
    while not done.done():  # in short waits: a signal wakes no longer one where a library's handler has been between
        wait([done], 0.2)
        if over():
            return None
    return done.result()


def _authentication(address: str) -> None:
    """Say explicitly whether tokens are used: Ray's default depends on how the cluster was started.

    A cluster of our own gets a token of its own, which is written nowhere.

    Raises:
        UserError: RAY_AUTH_MODE is a word that Ray does not know, which it would take for disabled.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token", "disabled"):
        raise UserError(f"RAY_AUTH_MODE={mode}: is neither token nor disabled; correct it")
    if not address and mode != "disabled" and not _TOKENS & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if not mode:
        there = _TOKENS & os.environ.keys() or Path("~/.ray/auth_token").expanduser().exists()
        os.environ["RAY_AUTH_MODE"] = "token" if there else "disabled"


def _answers(address: str) -> None:
    """Ask the cluster at host:port whether it is alive: Ray itself tries for 20 s to minutes and does not say why.

    Raises:
        UserError: nothing answers there, or not a Ray cluster, or one that refuses the token.
    """
    try:
        import grpc
        from ray._private.gcs_utils import create_gcs_channel
    except ImportError:  # not where this version of Ray has it: ray.init will find out, later
        return
    channel = create_gcs_channel(address)
    try:
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=_ANSWER_S)
    except grpc.RpcError as e:
        code, details = e.code(), e.details()  # type: ignore[attr-defined]
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise _unauthenticated(address) from None
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({details}); start one with `ray start --head`, or"
            " correct the address"
        ) from None
    finally:
        channel.close()


def _unauthenticated(address: str) -> UserError:
    given = os.environ["RAY_AUTH_MODE"].lower() == "token"
    return UserError(
        f"RAY_ADDRESS={address}: the cluster {'refuses this' if given else 'wants a'} token; set RAY_AUTH_MODE=token"
        " and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's"
    )


def _refused(address: str, e: Exception) -> UserError | RunError:
    text = " ".join(str(e).split()) or type(e).__name__
    if type(e).__name__ == "AuthenticationError":  # there is no token, or its file cannot be read
        why = text.partition(". ")[0]
        return UserError(f"RAY_AUTH_MODE=token: {why}; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it")
    if address and (found := _MISMATCH.search(text)):
        ray, python, our_ray, our_python = found.groups()
        return UserError(
            f"RAY_ADDRESS={address}: the cluster has Ray {ray} and Python {python}, this process Ray {our_ray} and"
            f" Python {our_python}, which must be the same; use an environment like the cluster's, or have the command"
            " run there: `ray job submit`"
        )
    if address:
        return UserError(f"RAY_ADDRESS={address}: cannot be connected to ({text}); correct the address, or the token")
    return RunError(f"Ray does not start on this machine: {text}")
