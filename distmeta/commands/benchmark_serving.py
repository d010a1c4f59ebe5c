"""`benchmark serving`: milliseconds from one new user's support to the scores of candidates, on one thread."""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from distmeta import process
from distmeta.cli import Parser
from distmeta.commands import train
from distmeta.commands.settings import Setting
from distmeta.data import protocols, tasktable
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.methods import METHODS
from distmeta.parallel import rundir
from distmeta.storage import Location

if TYPE_CHECKING:
    from torch import Tensor

    from distmeta.methods.base import Method

    Serve = Callable[..., Tensor]

_Place = tuple[Dataset, Location]
"""A dataset and where it lies."""
_WARM = 5
"""Requests before those that count."""
_COUNTS = {
    "support": (40, 0, "support rows"),
    "candidates": (1000, 1, "items to score"),
    "requests": (100, 10, "new users"),
}
"""Default, least and meaning."""


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure, print a table, and give its rows (design §8).

    Raises:
        UserError: usage, no dataset or run, a method that is no graph.
    """
    parser = Parser(
        prog="benchmark serving",
        description="One thread serves new users one by one: each with random fields, support and candidates. In eager"
        " (adapt and predict), as the exported program, as ONNX where the extra is installed, and beside them melu"
        " (adapt with its gradients and predict) with --steps. Variants take turns, user by user. Gives the median and"
        " the 95th percentile of the wall clock, and the median CPU time.",
    )
    parser.add_argument("--run", metavar="RUN", help="a run of cmml-*, whose best checkpoint is served")
    parser.add_argument("--data", metavar="DATASET", help="without --run: a method that is not trained, on its fields")
    able = [name for name, e in METHODS.items() if e.feed_forward]
    parser.add_argument(
        "--methods", nargs="+", default=["cmml-film"], metavar="METHOD", help="without --run [cmml-film]"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="FLAG[=VALUE]", help="flags of the method: encoder=gru")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5], metavar="K", help="inner steps of melu [1 5]")
    for name, (default, _, text) in _COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} [{default}]")
    args = parser.parse(argv)
    for name, (_, least, _) in _COUNTS.items():
        if getattr(args, name) < least:
            raise UserError(f"benchmark serving: --{name} must be at least {least}")
    if bool(args.run) == bool(args.data):
        raise UserError("benchmark serving: give either --run RUN or --data DATASET")
    for name in args.methods:
        if name not in able:
            raise UserError(f"benchmark serving: {name} cannot be exported; methods that can: {' '.join(able)}")
    process.prepare(1)
    where, methods = _trained(args.run) if args.run else _fresh(args.data, args.methods, args.set)
    if where[0].items < args.support + args.candidates:
        raise UserError(f"benchmark serving: {where[0].name} has {where[0].items:,} items; lower --candidates")
    rows = _measure(methods, where, args)
    _show(rows)
    return rows


def _trained(run: str) -> "tuple[_Place, dict[str, Method]]":
    from distmeta.parallel import assessment

    where = Location.of(run)
    config = rundir.stored(where)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, gpu=0.0))
    place = Location.of(config.data.data)
    options = protocols.protocol_options(config.data)
    table = tasktable.make(place, config.data.protocol, config.data.split_seed, options)
    if table.scenarios:
        raise UserError(f"{where}: serves scenarios; give a run whose tasks are users")
    dataset = table.seen(Dataset.open(place))
    return (dataset, place), {config.method: assessment.best_method(config, where, dataset, place, table)[1]}


def _fresh(data: str, names: Sequence[str], given: Sequence[str]) -> "tuple[_Place, dict[str, Method]]":
    settings = [Setting.of(text, "benchmark serving", ("data", "run", "resume", "retried")) for text in given]
    for s in settings:
        if not any(s.meant_for("", name) for name in names):
            raise UserError(f"benchmark serving: --set {s.text}: none of {' '.join(names)} has that flag")
    place = Location.of(data)
    dataset = Dataset.open(place)
    words = {name: [w for s in settings if s.meant_for("", name) for w in s.argv()] for name in names}
    return (dataset, place), {name: _built([name, *words[name]], dataset, place) for name in names}


def _built(words: Sequence[str], dataset: Dataset, place: Location) -> "Method":
    import torch

    from distmeta.data.loader import read_items
    from distmeta.parallel.update import build_method

    config = train.parse([*words, "--data", str(place)])
    return build_method(config, dataset, read_items(place, dataset), torch.device("cpu"))


def _variants(methods: "Mapping[str, Method]", where: _Place, steps: Sequence[int]) -> "dict[tuple[str, str], Serve]":
    """(method, variant) -> what serves a request."""
    import torch

    from distmeta.serving import export, onnxgraph

    found: dict[tuple[str, str], Serve] = {}
    for name, method in methods.items():
        program = export.exported(method)
        found[name, "eager"] = partial(_eager, method)
        found[name, "exported"] = _told(method, torch.no_grad()(program.module()))
        if not onnxgraph.missing():
            inputs = [i["name"] for i in export.described(method.dataset)]
            found[name, "onnx"] = _told(method, onnxgraph.Session(onnxgraph.converted(program, inputs)))
    for k in steps:
        found["melu", f"eager, {k} steps"] = partial(_eager, _built(["melu", "--steps", str(k)], *where))
    return found


def _told(method: "Method", serve: "Serve") -> "Serve":
    """The same, given the fields that the method knows alone."""
    names = [f.name for f in method.dataset.user_fields]
    return lambda user, *rest: serve({name: user[name] for name in names}, *rest)


def _eager(
    method: "Method", user: dict[str, Any], item: "Tensor", label: "Tensor", mask: "Tensor", candidate: "Tensor"
):
    """Scores [1, Q] by `adapt` and `predict`, of what an exported graph takes."""
    import torch

    from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

    bags = {name: Bag(v[0], v[1] if len(v) > 1 else None) for name, v in user.items()}

    def batch(item: "Tensor", label: "Tensor", known: bool) -> TaskBatch:
        place = torch.arange(item.shape[1]).unsqueeze(0)
        rows = Rows(place, label, torch.ones_like(place, dtype=torch.bool))
        none = Rows(place[:, :0], label[:, :0], rows.mask[:, :0])
        sides = (rows, none) if known else (none, rows)
        return TaskBatch(item[0], (TaskBlock(torch.zeros(1, dtype=torch.int64), bags, *sides),))

    return method.predict(method.adapt(batch(item, label, True)), batch(candidate, candidate * 0.0, False))[0]


def _request(dataset: Dataset, support: int, candidates: int, seed: int) -> tuple[Any, ...]:
    """A made user: fields, support and candidates drawn evenly, what `Served.forward` takes for one."""
    import torch

    g = torch.Generator().manual_seed(seed)
    user: dict[str, tuple[Tensor, ...]] = {}
    for f in dataset.user_fields:
        index = (
            torch.randint(f.size, (1, 1), generator=g) if f.type != "numeric" else torch.zeros(1, 1, dtype=torch.int64)
        )
        user[f.name] = (index,) if f.type == "categorical" else (index, torch.ones(1, 1))
    items = torch.randperm(dataset.items, generator=g)
    low, high = dataset.label.minimum, dataset.label.maximum
    label = torch.randint(int(low), int(high) + 1, (1, support), generator=g).float()
    chosen = items[: support + candidates].unsqueeze(0)
    return user, chosen[:, :support], label, torch.ones(1, support, dtype=torch.bool), chosen[:, support:]


def _measure(methods: "Mapping[str, Method]", where: _Place, args: argparse.Namespace) -> list[dict[str, Any]]:
    dataset, _ = where
    variants = _variants(methods, where, args.steps)
    wall: dict[tuple[str, str], list[float]] = {key: [] for key in variants}
    cpu: dict[tuple[str, str], list[float]] = {key: [] for key in variants}
    for seed in range(-_WARM, args.requests):
        request = _request(dataset, args.support, args.candidates, seed % (1 << 31))
        order = list(variants)
        at = seed % len(order)
        for key in order[at:] + order[:at]:  # who comes first finds the caches as another left them
            serve = variants[key]
            began, spent = time.perf_counter(), time.process_time()
            serve(*request)
            if seed >= 0:
                wall[key].append(1000 * (time.perf_counter() - began))
                cpu[key].append(1000 * (time.process_time() - spent))
    first = next(iter(variants))
    return [
        {
            "benchmark": "serving",
            "case": f"{dataset.name} {args.support} support rows, {args.candidates} candidates",
            "method": method,
            "variant": variant,
            "value": statistics.median(wall[method, variant]),
            "unit": "ms",
            "p95": float(np.percentile(wall[method, variant], 95)),
            "cpu_ms": statistics.median(cpu[method, variant]),
            "ratio_to": {}
            if (method, variant) == first
            else {" ".join(first): _ratio(wall[method, variant], wall[first])},
        }
        for method, variant in variants
    ]


def _ratio(mine: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, others, strict=True))


def _show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{rows[0]['case']}, one user at a time on one thread\n{'':<34} {'p50 ms':>8} {'p95 ms':>8} {'CPU ms':>8}")
    for r in rows:
        print(f"{r['method']:<14} {r['variant']:<19} {r['value']:>8.2f} {r['p95']:>8.2f} {r['cpu_ms']:>8.2f}")
