"""`benchmark adaptation`: meta-gradients of one batch, by the engine, by torch.func.vmap and by a loop over tasks.

Four models: a plain MLP on given inputs (adaptation.md's table), and whole tasks with lookups from ids, shaped like
MovieLens-1M: MeLU (decision layers adapt), MetaCS (embeddings adapt as well) and Meta-SGD (MeLU with a learned step
for each parameter). Each case first checks in float64
that all variants have the same meta-gradient; then its variants take turns within this process.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from distmeta.cli import Parser
from distmeta.errors import RunError, UserError

Variants = dict[str, Callable[[], Sequence[Any]]]
PLAIN = (
    (32, 30, 10, 256, 64),
    (256, 15, 5, 256, 64),
    (256, 15, 5, 200, 128),
    (256, 30, 10, 256, 64),
    (32, 60, 10, 256, 64),
)
"""Tasks, support rows, query rows, inputs, hidden width."""
WHOLE = (32, 256)
CHECKED = 5
"""Tasks of the float64 comparison."""
LR = 0.01
TURN = 0.03
"""Seconds."""


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure, print a table, and give its rows (design §8).

    Raises:
        UserError: usage. RunError: two variants disagree about a meta-gradient.
    """
    parser = Parser(prog="distmeta benchmark adaptation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats; under a minute")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads [1]")
    parser.add_argument("--repeats", type=int, metavar="N", help="turns of each variant [11; 5 with --quick]")
    parser.add_argument("--steps", type=int, nargs="+", metavar="K", help="inner steps [1 3 5; 1 5 with --quick]")
    parser.add_argument("--model", choices=("plain", "whole", "embeddings", "parameters"), help="only this model [all]")
    args = parser.parse(argv)
    repeats = args.repeats if args.repeats is not None else (5 if args.quick else 11)
    steps = args.steps or ([1, 5] if args.quick else [1, 3, 5])
    for name, value in (("threads", args.threads), ("repeats", repeats), ("steps", min(steps))):
        if value < 1:
            raise UserError(f"benchmark adaptation: --{name} must be at least 1")
    return run(steps, repeats, args.threads, args.quick, args.model)


def run(steps: Sequence[int], repeats: int, threads: int, quick: bool, only: str | None) -> list[dict[str, Any]]:
    """Rows of all cases; prints each when it is measured."""
    from distmeta import process
    from distmeta.commands import adaptation_cases as cases

    process.prepare(threads)
    rows: list[dict[str, Any]] = []
    for k in steps:
        if only in (None, "plain"):
            for sizes in PLAIN[:2] if quick else PLAIN:
                check(cases.plain(CHECKED, *sizes[1:], steps=k, double=True), str(sizes))
                d, h = sizes[3:]
                case = {"case": " x ".join(map(str, (*sizes[:3], k))), "model": f"plain {d}-{h}-{h}-1"}
                rows += show(measure(cases.plain(*sizes, steps=k), sizes[0], repeats, case))
        for model in ("whole", "embeddings", "parameters"):
            if only in (None, model):
                check(cases.whole(model, CHECKED, steps=k, double=True).variants, model)
                for tasks in WHOLE[:1] if quick else WHOLE:
                    rows += show(whole(model, tasks, k, repeats))
    return rows


def whole(model: str, tasks: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one whole-task case, with the share of the machine's peak that the loop's operations would need."""
    from distmeta.commands import adaptation_cases as cases

    made = cases.whole(model, tasks, steps=steps)
    case = {"case": f"{tasks} x {cases.SUPPORT} x {cases.QUERY} x {steps}", "model": model}
    rows = measure(made.variants, tasks, repeats, case)
    operations, peak = made.operations(), peak_rate()
    for row in rows:
        row |= {
            "flops_per_task": operations,
            "peak_flops": peak,
            "percent_of_peak": 100 * operations * row["value"] / peak,
        }
    return rows


def measure(variants: Variants, tasks: int, repeats: int, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Tasks a second of each variant: the median of `repeats` turns after one to warm up.

    A turn calls the variant once untimed, so that none pays for what the one before it left in the caches, and then
    for at least TURN seconds. On one thread it is the process's own time that counts: others' programs disturb less.
    """
    import torch

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, variant in variants.items():
            if name == "loop" and turn > max(3, repeats // 3):
                continue  # tens of times slower, and as steady
            if name != "loop":
                variant()
            calls, began = 0, clock()
            while not calls or clock() - began < TURN:
                variant()
                calls += 1
            seconds[name].append((clock() - began) / calls)
    rates = {name: tasks / statistics.median(taken[1:]) for name, taken in seconds.items()}
    return [
        {
            "benchmark": "adaptation",
            **case,
            "variant": name,
            "value": rate,
            "unit": "tasks/s",
            "ratio_to": {other: rate / r for other, r in rates.items() if other != name},
        }
        for name, rate in rates.items()
    ]


def peak_rate(size: int = 2048) -> float:
    """Operations a second of the machine's own float32 matrix product: the median of five."""
    import torch

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    a, taken = torch.randn(size, size), []
    for _ in range(6):
        began = clock()
        torch.mm(a, a)
        taken.append(clock() - began)
    return 2 * size**3 / statistics.median(taken[1:])


def check(variants: Variants, case: str, tolerance: float = 1e-9) -> None:
    """All variants' meta-gradients agree to `tolerance`, in float64.

    Raises:
        RunError: they do not.
    """
    reference = variants["loop"]()
    for name, variant in variants.items():
        for a, b in zip(variant(), reference, strict=True):
            worst = float((a - b).abs().max())
            if not worst <= tolerance * max(1.0, float(b.abs().max())):
                raise RunError(f"benchmark adaptation: {name} and loop differ by {worst:.2g} in case {case}")


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print one case's rows, and give them back."""
    first = rows[0]
    print(f"{first['model']:<19} {first['case']:<18}", end="")
    for row in rows:
        print(f" {row['variant']} {row['value']:>7,.0f}", end="")
    auto = next(r for r in rows if r["variant"] == "auto")
    for other in ("vmap", "vmap rows", "loop"):
        if other in auto["ratio_to"]:
            print(f"  x{other} {auto['ratio_to'][other]:.2f}", end="")
    if "percent_of_peak" in auto:
        print(f"  {auto['percent_of_peak']:.0f}% of {auto['peak_flops'] / 1e9:.0f} GFLOP/s", end="")
    print(flush=True)
    return rows
