"""Room for workers on a cluster: how many fit on its nodes, and waiting for more."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from distmeta.errors import UserError

_TELL_S = 10
"""Seconds between two lines about nodes that are waited for."""

Node = Mapping[str, float]
"""Resources of a node."""


def bundle(threads: int, gpu: float) -> dict[str, float]:
    """What a worker of so many CPUs and GPUs needs."""
    return {"CPU": float(threads), **({"GPU": float(gpu)} if gpu else {})}


def places(node: Node, threads: int, gpu: float) -> int:
    """Workers that fit on a node; a share of a GPU is never of two."""
    free = int(node.get("CPU", 0.0) // threads)
    if not gpu:
        return free
    return min(free, int(node.get("GPU", 0.0)) * int(1 / gpu + 1e-6))  # a third, as it is written, is less than one


def short(nodes: Sequence[Node], needed: int, threads: int, gpu: float) -> str | None:
    """What is missing for `needed` workers, none of which is spread over two nodes; None where they all fit."""
    fit, each = sum(places(node, threads, gpu) for node in nodes), bundle(threads, gpu)
    need = "1 worker needs" if needed == 1 else f"{needed} workers need"
    if fit >= needed:
        return None
    for name, amount in each.items():
        have = sum(node.get(name, 0.0) for node in nodes)
        if have < needed * amount:
            return f"{need} {needed * amount:g} {name}s, the cluster has {have:g}"
    shapes = Counter(_said({name: node.get(name, 0.0) for name in each}) for node in nodes)
    have = ", ".join(f"{n} node{'s' * (n > 1)} of {shape}" for shape, n in shapes.items())
    return f"{need} {_said(each)}{' each' * (needed > 1)} on one node, the cluster has {have}: room for {fit}"


def _said(resources: Node) -> str:
    return " and ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in resources.items())


def alive() -> list[Node]:
    """The resources of each node that lives and has CPUs to give, the largest first."""
    import ray

    found = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    return sorted(found, key=lambda n: -n["CPU"])


def standing(threads: int, gpu: float) -> str:
    """How far a start of workers has come, for a line that says what is waited for."""
    import ray
    from ray.util.placement_group import placement_group_table

    each = bundle(threads, gpu)
    groups = [g for g in placement_group_table().values() if all(b == each for b in g["bundles"].values())]
    if not {"PENDING", "RESCHEDULING"} & {g["state"] for g in groups}:
        return "their processes are starting"
    total, left = ray.cluster_resources(), ray.available_resources()
    free = " and ".join(f"{left.get(k, 0.0):g} of the cluster's {total.get(k, 0.0):g} {k}s" for k in each)
    return f"each needs {_said(each)}, free are {free}"


@contextmanager
def wanted(needed: int, threads: int, gpu: float, wait: int, log: Callable[[str], None]) -> Iterator[None]:
    """Begin this block once the cluster has nodes for the workers, for which its autoscaler is asked.

    Ray keeps to such a request until the next one: the block's end takes it back, or the nodes would stay for ever.

    Args:
        needed: workers. threads, gpu: CPUs and GPUs of each. wait: seconds.

    Raises:
        UserError: it has not after `wait` seconds.
    """
    from ray.autoscaler.sdk import request_resources

    began, told, asked = time.monotonic(), 0.0, False
    try:
        while text := short(alive(), needed, threads, gpu):
            waited = time.monotonic() - began
            if waited > wait:
                mend = "use fewer --workers or --threads, or add nodes, or --wait longer"
                raise UserError(f"{text} after {wait} s; {mend}")
            if waited >= told:
                request_resources(bundles=[bundle(threads, gpu)] * needed)
                asked, told = True, waited + _TELL_S
                log(f"{text}; waiting ({waited:.0f} of {wait} s)")
            time.sleep(0.5)
        yield
    finally:
        if asked:
            request_resources(bundles=[])
