"""What a finished run costs, for `reproduce which`: training, a user's latency, memory; and whether it is exported."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distmeta import process
from distmeta.commands import reproduce_costs
from distmeta.commands.reproduce_runs import Run
from distmeta.data.loader import Loader
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError
from distmeta.methods.base import Method
from distmeta.parallel import assessment, rundir
from distmeta.parallel.validation import read_metrics
from distmeta.serving.export import Served
from distmeta.storage import Location
from distmeta.tasks import Rows, TaskBatch

if TYPE_CHECKING:
    from torch import Tensor

REQUESTS, WARM, CANDIDATES = 100, 5, 100
"""Test users that are served, where there are as many; of them that come once before, not counted; items that each has
scored."""


def of(runs: Sequence[Run], table: TaskTable, dataset: Dataset, place: Location) -> dict[str, dict[str, Any]]:
    """Label -> what the run costs: "train_s", "train_all_s", "latency_ms", "latency_p95_ms", "model_bytes",
    "user_bytes", "peak_mb" (None where there are no updates, or no Linux), "closed", "export", "requests" (how many
    users were served).

    Raises:
        UserError: a checkpoint is damaged. RunError: a process that measures memory failed.
    """
    process.prepare(1)
    seen = table.seen(dataset)
    methods = {r.label: assessment.best_method(rundir.stored(r.where), r.where, seen, place, table)[1] for r in runs}
    requests = _requests(table, seen)
    latency, user = _served(methods, requests)
    found = {}
    for run in runs:
        method, ms = methods[run.label], latency[run.label]
        to_best, in_all = _trained(run)
        found[run.label] = {
            "train_s": to_best,
            "train_all_s": in_all,
            "latency_ms": statistics.median(ms),
            "latency_p95_ms": float(np.percentile(ms, 95)),
            "model_bytes": _model_bytes(method),
            "user_bytes": user[run.label],
            "peak_mb": _peak(run, method),
            "closed": method.sweeps > 0,
            "export": _exportable(method),
            "requests": len(ms),
        }
    return found


def _trained(run: Run) -> tuple[float, float]:
    """CPU seconds of training, to the best checkpoint and in all."""
    lines, best = read_metrics(run.where), assessment.best_step(run.where)
    try:
        return sum(m["cpu_s"] for m in lines if m["step"] <= best), sum(m["cpu_s"] for m in lines)
    except KeyError:
        raise UserError(
            f"{run.where}: metrics.jsonl says no cpu_s (of an older version); delete the run to have it trained anew"
        ) from None


def _requests(table: TaskTable, dataset: Dataset) -> list[TaskBatch]:
    """Test users, one a batch, each with its support and items drawn from all others as the query."""
    loader = Loader(table, dataset, "test", 1, redraw=False, prefetch=0, most=REQUESTS)
    found = []
    for n, batch in enumerate(loader.evaluation()):
        (block,) = batch.blocks
        support = batch.items[block.support.item]
        others = torch.randperm(dataset.items, generator=torch.Generator().manual_seed(n))
        query = others[~torch.isin(others, support)][:CANDIDATES].unsqueeze(0)
        items, place = torch.unique(torch.cat((support, query), 1), return_inverse=True)
        s = support.shape[1]
        rows = Rows(place[:, s:], torch.zeros(query.shape), torch.ones(query.shape, dtype=torch.bool))
        known = dataclasses.replace(block.support, item=place[:, :s])
        found.append(
            dataclasses.replace(batch, items=items, blocks=(dataclasses.replace(block, support=known, query=rows),))
        )
    return found


@torch.no_grad()
def _served(
    methods: Mapping[str, Method], requests: Sequence[TaskBatch]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of each request, and the median bytes of a user's adapted state, by label; methods take turns."""
    ms: dict[str, list[float]] = {label: [] for label in methods}
    sizes: dict[str, list[int]] = {label: [] for label in methods}
    order = list(methods)
    for method in methods.values():
        method.eval()
    for n, batch in enumerate([*requests[:WARM], *requests]):
        at = n % len(order)
        for label in order[at:] + order[:at]:  # who comes first finds the caches as another left them
            method = methods[label]
            began = time.perf_counter()
            state = method.adapt(batch)
            method.predict(state, batch)
            took = 1000 * (time.perf_counter() - began)
            if n >= WARM:
                ms[label].append(took)
                sizes[label].append(_own_bytes(state, method, batch))
    return ms, {label: int(statistics.median(of)) for label, of in sizes.items()}


def _own_bytes(state: Any, method: Method, batch: TaskBatch) -> int:
    """Bytes of the tensors of a state that are neither the method's nor the request's, each storage once."""
    shared = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers(), *_tensors(batch))}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(state)}
    return sum(size for where, size in own.items() if where not in shared)


def _tensors(value: Any) -> "list[Tensor]":
    """All tensors that are reached through lists, tuples, dicts and the house's objects, layers left out."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif type(one).__module__.startswith("distmeta.") and not isinstance(one, torch.nn.Module):
            if id(one) not in seen:
                waiting += [getattr(one, name) for name in (*getattr(one, "__dict__", ()), *_slots(one))]
            seen.add(id(one))
    return found


def _slots(value: Any) -> list[str]:
    return [name for c in type(value).__mro__ for name in getattr(c, "__slots__", ()) if hasattr(value, name)]


def _model_bytes(method: Method) -> int:
    """Bytes of parameters, buffers and shared memories."""
    own = sum(t.numel() * t.element_size() for t in (*method.parameters(), *method.buffers()))
    return own + sum(a.nbytes for shared in method.shared.values() for a in shared.memory.snapshot().values())


def _peak(run: Run, method: Method) -> float | None:
    """MB that an update's peak lies above what was there before it, measured in a process of its own."""
    if method.sweeps or not Path("/proc/self/clear_refs").exists():
        return None
    words, at = list(run.argv), run.argv.index("--run")
    return reproduce_costs.apart([*words[:at], *words[at + 2 :]])["peak_mb"]


def _exportable(method: Method) -> bool:
    """Whether `jobs.export` makes one graph of it."""
    try:
        Served(method)
    except UserError:
        return False
    return True
