"""Ray as this program starts it, or finds it: settings, address, authentication, and resources to wait for."""

import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from distmeta.errors import RunError, UserError
from distmeta.parallel.update import cores

NAMESPACE = "distmeta"
START_S = 60
"""Seconds after which Ray Train gives up a start of workers, to try again with what nodes there are then."""

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # 2 s by default, of which a failure or a report waits for one
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_S),
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}


@contextlib.contextmanager
def connected(needed: int, threads: int, gpu: bool, wait: int, log: Callable[[str], None] = print) -> Iterator[None]:
    """Be connected to the cluster at RAY_ADDRESS, or to one of its own on this machine, which ends with this block.

    Args:
        needed: workers that must fit. threads: CPUs of each. wait: seconds to wait for nodes.

    Raises:
        UserError: no cluster answers at the address, it refuses the token, or it is too small.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    already = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if already:  # the connection of a program that calls us, which is not ours to end
        _await(needed, threads, gpu, wait, log)
        yield
        return
    if not address and needed * threads > cores():
        raise UserError(
            f"--workers {needed}: {needed} workers of {threads} CPU{'s' * (threads > 1)} each need {needed * threads},"
            f" this machine has {cores()}; use fewer --workers or --threads, or a cluster (set RAY_ADDRESS)"
        )
    _authentication(address)
    import ray

    if address and address not in ("auto", "local"):
        _answers(address)
    try:
        ray.init(
            address=address or "local",
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            **({} if address else {"num_cpus": cores(), "include_dashboard": False}),
        )
    except Exception as e:
        raise _refused(address, e) from e
    try:
        _await(needed, threads, gpu, wait, log)
        yield
    finally:
        ray.shutdown()


def _authentication(address: str) -> None:
    """Say explicitly whether tokens are used: Ray's default depends on how the cluster was started.

    A cluster of our own gets a token of its own, which is written nowhere.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if not address:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    found = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or Path("~/.ray/auth_token").expanduser()
    there = found if isinstance(found, set) else found.exists()
    os.environ["RAY_AUTH_MODE"] = "token" if there else "disabled"


def _answers(address: str) -> None:
    """UserError where nothing listens at host:port; Ray itself would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except (OSError, ValueError) as e:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({e}); start one with `ray start --head`, or correct"
            " the address"
        ) from None


def _refused(address: str, e: Exception) -> UserError | RunError:
    text = f"{type(e).__name__} {e}"
    if any(word in text for word in ("uthenticat", "UNAUTHENTICATED", "token")):
        return UserError(
            f"RAY_ADDRESS={address}: the cluster refuses this token, or wants one"
            f" (RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or"
            " RAY_AUTH_TOKEN_PATH, to the cluster's"
        )
    if address:
        return UserError(f"RAY_ADDRESS={address}: no Ray cluster to connect to ({_first(e)}); correct the address")
    return RunError(f"Ray does not start on this machine: {_first(e)}")


def _first(e: Exception) -> str:
    return str(e).strip().split("\n")[0] or type(e).__name__


def _await(needed: int, threads: int, gpu: bool, wait: int, log: Callable[[str], None]) -> None:
    """Wait until the cluster has what the workers need, and ask its autoscaler for it.

    Raises:
        UserError: it has not after `wait` seconds.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    want = {"CPU": float(needed * threads), **({"GPU": float(needed)} if gpu else {})}
    began, told = time.monotonic(), 0.0
    bundle = {name: int(amount // needed) for name, amount in want.items()}
    while True:
        have = ray.cluster_resources()
        short = [name for name, amount in want.items() if have.get(name, 0) < amount]
        waited = time.monotonic() - began
        if not short:
            return
        name = short[0]
        text = f"{needed} workers need {want[name]:.0f} {name}s, the cluster has {have.get(name, 0):.0f}"
        if waited > wait:
            raise UserError(f"{text} after {wait} s; use fewer --workers, or add nodes, or --wait longer")
        if waited >= told:
            request_resources(bundles=[bundle] * needed)
            log(f"{text}; waiting ({waited:.0f} of {wait} s)")
            told = waited + 10
        time.sleep(0.5)
