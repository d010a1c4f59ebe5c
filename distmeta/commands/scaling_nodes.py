"""What `benchmark scaling --nodes` measures: workers on several nodes against as many on one, all on this machine."""

import contextlib
import dataclasses
import secrets
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distmeta.commands.scaling_runs import Run, await_file, process, speed, steps, train
from distmeta.config import Config

ONE = "one node"


def rows(case: str, config: Config, nodes: int, workers: int, turns: int) -> list[dict[str, Any]]:
    """Train in turn on a cluster of one node and on one of `nodes`; print a table, and give its rows.

    A batch has as many tasks for a worker as --batch-size says. Both clusters are started in the same way.

    Raises:
        UserError, RunError: a training or a cluster failed, or was too short.
    """
    larger = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=workers * config.train.batch_size)
    )
    shapes = {ONE: (1, workers), f"{nodes} nodes": (nodes, workers // nodes)}
    found: dict[str, list[Run]] = {variant: [] for variant in shapes}
    for turn in range(turns):
        print(f"turn {turn + 1} of {turns}", flush=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for variant in [*shapes][:: -1 if turn % 2 else 1]:  # who is first: the machine's speed drifts
                with _cluster(*shapes[variant], Path(folder)) as env:
                    found[variant] += train(larger, Path(folder), [str(workers)], env)
    made = [_row(f"{case} for each of {workers} workers", variant, runs, found[ONE]) for variant, runs in found.items()]
    _show(made)
    return made


@contextlib.contextmanager
def _cluster(nodes: int, cpus: int, folder: Path) -> Iterator[Mapping[str, str]]:
    """A cluster of such nodes in a process of its own; gives what is to be in the environment of who uses it."""
    place = Path(tempfile.mkdtemp(dir=folder))
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    code = f"from distmeta.parallel import local_nodes; local_nodes.serve({nodes}, {cpus}, {str(place / 'address')!r})"
    with process(["-c", code], place / "output", env) as running:
        await_file(place / "address", running)
        yield {**env, "RAY_ADDRESS": (place / "address").read_text()}


def _row(case: str, variant: str, runs: list[Run], one: list[Run]) -> dict[str, Any]:
    """Medians of the turns; the ratio is that of the turns' ratios."""
    ratio = statistics.median(speed([a]) / speed([b]) for a, b in zip(runs, one, strict=True))
    return {
        "benchmark": "scaling",
        "case": case,
        "variant": variant,
        "value": statistics.median(speed([run]) for run in runs),
        "unit": "tasks/s",
        "ratio_to": {} if variant == ONE else {ONE: ratio},
        "same_parameters": len({run.parameters for run in [*runs, *one]}) == 1,
        **steps(runs),
    }


def _show(made: list[dict[str, Any]]) -> None:
    print(f"\n{made[0]['case']}\n{'':<16} {'tasks/s':>10} {'x one node':>11}  parameters")
    for r in made:
        ratio, same = r["ratio_to"].get(ONE), "the same" if r["same_parameters"] else "others"
        print(f"{r['variant']:<16} {r['value']:>10,.0f} {f'{ratio:.3f}' if ratio else '':>11}  {same}")
    print(f"\n{'ms of a step':<16}" + "".join(f"{p:>12}" for p in made[0]["step_ms"]))
    for r in made:
        print(f"{r['variant']:<16}" + "".join(f"{ms:>12.2f}" for ms in r["step_ms"].values()))
