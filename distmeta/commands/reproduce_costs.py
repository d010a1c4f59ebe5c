"""`reproduce cmml-fig2`: what training costs, method by method, each measured in a process of its own.

Time is CPU seconds of one thread, of whole meta-updates on batches made beforehand. Memory is how far the process's
resident set rises above what it was before: Linux keeps its peak (VmHWM), which is reset after one update with a
single task, so that the libraries, the parameters and the optimizer's moments are not counted but the graph of a batch
is. Rounds take turns; time is their median, memory their largest.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmeta import process
from distmeta.commands import train
from distmeta.data import protocols, tasktable
from distmeta.data.schema import Dataset
from distmeta.errors import RunError, UserError
from distmeta.storage import Location

if TYPE_CHECKING:
    from distmeta.data.tasktable import TaskTable
    from distmeta.tasks import TaskBatch

ROUNDS, BATCHES, WARM = 3, 30, 3
"""Turns of each row, batches that are measured in one, and batches before them."""
STEPS = (1, 5, 10, 20)
"""Inner steps that the figure has of the methods that take any."""


@dataclass(frozen=True)
class Timed:
    """One row: a method and flags of `train` for it."""

    label: str
    method: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Costs:
    """A paper's figure of what training costs."""

    name: str
    title: str
    dataset: str
    protocol: str
    batch_size: int
    ours: tuple[Timed, ...]
    paper: str

    @property
    def datasets(self) -> tuple[str, ...]:
        return (self.dataset,)


COSTS = {
    "cmml-fig2": Costs(
        "cmml-fig2",
        "CMML, Figure 2: memory and time of training",
        "movielens-1m",
        "cmml-user",
        32,
        (
            *(Timed(f"MeLU, {k} step{'s' * (k > 1)}", "melu", ("--steps", str(k))) for k in STEPS),
            *(
                Timed(f"s²Meta, {k} step{'s' * (k > 1)}", "s2meta", ("--steps", str(k), "--least-steps", str(k)))
                for k in STEPS
            ),
            *(
                Timed(f"CMML-FiLM, {e}", "cmml-film", ("--encoder", e, "--labels", "embedding", "--no-wide"))
                for e in ("gru", "mean")
            ),
        ),
        "time and memory grow with the inner steps; CMML (sequential encoder, dot, FiLM) is comparable with MeLU of one"
        " step (no numbers are printed).",
    )
}


def run(costs: Costs, place: Location, out: Location, methods: Sequence[str]) -> dict[str, Any]:
    """Measure the rows of these methods, and write OUT/NAME.svg, .html, .md and, last, .json, whose content it gives.

    Raises:
        UserError: the dataset has no such tasks, or this is no Linux. RunError: a process failed.
    """
    from distmeta.evaluation import costpage

    if not Path("/proc/self/clear_refs").exists():
        raise UserError(f"reproduce: {costs.name} reads its memory from /proc, which Linux has; run it there")
    out.make_dir()
    rows = [t for t in costs.ours if t.method in methods]
    asked = {t.label: _config_words(costs, t, place) for t in rows}
    dataset, table = _tasks(next(iter(asked.values())))
    turns: dict[str, list[dict[str, float]]] = {t.label: [] for t in rows}
    for k in range(ROUNDS):
        for t in rows:
            print(f"{costs.name}: round {k + 1} of {ROUNDS}, {t.label}", flush=True)
            turns[t.label].append(apart(asked[t.label]))
    train_counts = table.counts["train"]
    found = {
        "name": costs.name,
        "title": costs.title,
        "paper": costs.paper,
        "dataset": dataset.name,
        "protocol": costs.protocol,
        "batch_size": costs.batch_size,
        "rounds": ROUNDS,
        "batches": BATCHES,
        "split_hash": table.split_hash,
        "rows_a_user": train_counts["rows"] / train_counts["tasks"],
        "rows": [_row(t, turns[t.label]) for t in rows],
    }
    text = costpage.markdown(found)
    (out / f"{costs.name}.svg").write_bytes(costpage.sheet(found).encode())
    (out / f"{costs.name}.html").write_bytes(costpage.page(found).encode())
    (out / f"{costs.name}.md").write_bytes(text.encode())
    (out / f"{costs.name}.json").write_json(found)
    print(f"\n{text}\n{out / costs.name}.html, .svg, .md and .json")
    return found


def _row(t: Timed, turns: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    seconds = [turn["s_per_1000"] for turn in turns]
    return {
        "label": t.label,
        "method": t.method,
        "flags": list(t.flags),
        "s_per_1000": statistics.median(seconds),
        "s_per_1000_rounds": seconds,
        "peak_mb": max(turn["peak_mb"] for turn in turns),
        "peak_mb_rounds": [turn["peak_mb"] for turn in turns],
    }


def _config_words(costs: Costs, t: Timed, place: Location) -> list[str]:
    shared = ["--data", str(place), "--protocol", costs.protocol, "--batch-size", str(costs.batch_size)]
    return [t.method, *shared, "--threads", "1", *t.flags]


def _tasks(words: Sequence[str]) -> "tuple[Dataset, TaskTable]":
    config = train.parse(words)
    place = Location.of(config.data.data)
    options = protocols.protocol_options(config.data)
    table = tasktable.make(place, config.data.protocol, config.data.split_seed, options)
    return table.seen(Dataset.open(place)), table


def apart(words: Sequence[str]) -> dict[str, float]:
    """What `measure` gives in a process of its own; RunError with its last words where it fails."""
    code = f"from distmeta.commands import reproduce_costs; reproduce_costs.measure({list(words)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RunError(f"reproduce: measuring {words[0]} failed ({last}); free some memory and run it again")
    return json.loads(done.stdout.splitlines()[-1])


def measure(words: Sequence[str]) -> None:
    """Print, as JSON, the CPU seconds of 1,000 training users and the peak memory of updates in MB (10⁶ bytes).

    Args:
        words: what follows `train`.
    """
    import torch

    from distmeta.data.loader import Loader, read_items
    from distmeta.exchange import Exchange
    from distmeta.parallel.update import MetaUpdate, build_method, numerics

    config = train.parse(words)
    dataset, table = _tasks(words)
    items = read_items(Location.of(config.data.data), dataset)
    process.prepare(1)
    with numerics(replace(config.train, threads=1), torch.device("cpu")):
        method = build_method(config, dataset, items, torch.device("cpu"))
        loader = Loader(table, dataset, "train", config.train.batch_size)
        epochs = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
        batches = list(itertools.islice(epochs, WARM + BATCHES))
        update = MetaUpdate(method, config.train, Exchange(), loader.steps)
        _updates(update, [_first(batches[0])])
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what there is
        before = _kilobytes("VmRSS")
        _updates(update, batches[:WARM])
        began = time.process_time()
        _updates(update, batches[WARM:])
        seconds = time.process_time() - began
    users = sum(map(len, batches[WARM:]))
    peak = (_kilobytes("VmHWM") - before) * 1024 / 1e6
    print(json.dumps({"s_per_1000": 1000 * seconds / users, "peak_mb": peak}))


def _updates(update: Any, batches: "Iterable[TaskBatch]") -> None:
    for step, batch in enumerate(batches):
        update.local(batch)
        update.apply(batch, step)


def _first(batch: "TaskBatch") -> "TaskBatch":
    """The batch's first task alone."""
    import torch

    return replace(batch, blocks=(batch.blocks[0].take(torch.zeros(1, dtype=torch.int64)),))


def _kilobytes(key: str) -> int:
    """A line of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))
