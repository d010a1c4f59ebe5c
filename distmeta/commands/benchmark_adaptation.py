"""`benchmark adaptation`: meta-gradients of one batch, by the engine, by torch.func.vmap and by a loop over tasks.

Four models: a plain MLP on given inputs (adaptation.md's table), and whole tasks with lookups from ids, shaped like
MovieLens-1M: MeLU (decision layers adapt), MetaCS (embeddings adapt as well) and Meta-SGD (MeLU with a learned step
for each parameter). Each case first checks in float64
that all variants have the same meta-gradient; then its variants take turns within this process.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distmeta.cli import Parser
from distmeta.config import TrainOptions
from distmeta.errors import RunError, UserError

if TYPE_CHECKING:
    import torch

    from distmeta.commands.adaptation_cases import Case

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
LARGE = (1024, 4096)
"""Tasks of further cases, which a GPU has room for."""
CHECKED = 5
"""Tasks of the float64 comparison."""
LOOPED = 256
"""Most tasks that a loop is waited for."""
LR = 0.01
TURN = 0.03
"""Seconds."""


@dataclass(frozen=True)
class Where:
    """What is computed on, and how exactly."""

    device: "torch.device"
    precision: str

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """Of the device: the GPU's, or cpu."""
        import torch

        return torch.cuda.get_device_name(self.device) if self.gpu else "cpu"

    def clock(self) -> float:
        """Seconds, once all that was asked of the device is done. On one thread of a CPU the process's own time, which
        others' programs disturb less."""
        import torch

        if self.gpu:
            torch.cuda.synchronize(self.device)
        return time.process_time() if not self.gpu and torch.get_num_threads() == 1 else time.perf_counter()

    def peak(self) -> float:
        """Operations a second of the device's own matrix product in this precision: the median of five."""
        import torch

        from distmeta.adaptation import precision

        size, taken = 8192 if self.gpu else 2048, []
        a = torch.randn(size, size, device=self.device)
        for _ in range(6):
            began = self.clock()
            precision.matmul(a, a)
            taken.append(self.clock() - began)
        return 2 * size**3 / statistics.median(taken[1:])


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure, print a table, and give its rows (design §8).

    Raises:
        UserError: usage, or --gpu without one. RunError: two variants disagree about a meta-gradient.
    """
    parser = Parser(prog="distmeta benchmark adaptation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats; under a minute")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads [1]")
    parser.add_argument("--repeats", type=int, metavar="N", help="turns of each variant [11; 5 with --quick]")
    parser.add_argument("--steps", type=int, nargs="+", metavar="K", help="inner steps [1 3 5; 1 5 with --quick]")
    parser.add_argument("--model", choices=("plain", "whole", "embeddings", "parameters"), help="only this model [all]")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, with larger batches too")
    parser.add_argument(
        "--precision", choices=("float32", "tf32", "bf16"), default="float32", help="of train [float32]"
    )
    args = parser.parse(argv)
    repeats = args.repeats if args.repeats is not None else (5 if args.quick else 11)
    steps = args.steps or ([1, 5] if args.quick else [1, 3, 5])
    for name, value in (("threads", args.threads), ("repeats", repeats), ("steps", min(steps))):
        if value < 1:
            raise UserError(f"benchmark adaptation: --{name} must be at least 1")
    from distmeta.parallel.update import device_of

    where = Where(device_of(TrainOptions(gpu=float(args.gpu))), args.precision)
    return run(steps, repeats, args.threads, args.quick, args.model, where)


def run(
    steps: Sequence[int], repeats: int, threads: int, quick: bool, only: str | None, where: Where
) -> list[dict[str, Any]]:
    """Rows of all cases; prints each when it is measured."""
    from distmeta import process
    from distmeta.adaptation import precision
    from distmeta.commands import adaptation_cases as cases

    process.prepare(threads)
    rows: list[dict[str, Any]] = []
    more = LARGE if where.gpu and not quick else ()
    with precision.taken(where.precision, where.device):
        peak = where.peak()
        print(f"{where.name}: {peak / 1e12:.2f} TFLOP/s of {where.precision} matrix products")
        for k in steps:
            if only in (None, "plain"):
                for sizes in PLAIN[:2] if quick else (*PLAIN, *((n, *PLAIN[1][1:]) for n in more)):
                    small = cases.plain(CHECKED, *sizes[1:], steps=k, double=True, device=where.device)
                    check(small.variants, str(sizes))
                    d, h = sizes[3:]
                    about = {"case": " x ".join(map(str, (*sizes[:3], k))), "model": f"plain {d}-{h}-{h}-1"}
                    made = cases.plain(*sizes, steps=k, device=where.device)
                    rows += show(measure(made, sizes[0], repeats, about, where, peak))
            for model in ("whole", "embeddings", "parameters"):
                if only in (None, model):
                    small = cases.whole(model, CHECKED, steps=k, double=True, device=where.device)
                    check(small.variants, model)
                    for tasks in WHOLE[:1] if quick else (*WHOLE, *more):
                        about = {"case": f"{tasks} x {cases.SUPPORT} x {cases.QUERY} x {k}", "model": model}
                        made = cases.whole(model, tasks, steps=k, device=where.device)
                        rows += show(measure(made, tasks, repeats, about, where, peak))
    return rows


def measure(
    made: "Case", tasks: int, repeats: int, about: dict[str, Any], where: Where, peak: float
) -> list[dict[str, Any]]:
    """Rows of one case: tasks a second of each variant, the median of `repeats` turns after one to warm up, and the
    share of the device's peak that the operations of plain autograd for as many tasks would need.

    A turn calls the variant once untimed, so that none pays for what the one before it left in the caches, and then
    for at least TURN seconds.
    """
    variants = _that_fit({n: v for n, v in made.variants.items() if n != "loop" or tasks <= LOOPED})
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, variant in variants.items():
            if name == "loop" and turn > max(3, repeats // 3):
                continue  # tens of times slower, and as steady
            if name != "loop":
                variant()
            calls, began = 0, where.clock()
            while not calls or where.clock() - began < TURN:
                variant()
                calls += 1
            seconds[name].append((where.clock() - began) / calls)
    rates = {name: tasks / statistics.median(taken[1:]) for name, taken in seconds.items()}
    operations = made.operations()
    return [
        {
            "benchmark": "adaptation",
            **about,
            "variant": name,
            "value": rate,
            "unit": "tasks/s",
            "ratio_to": {other: rate / r for other, r in rates.items() if other != name},
            "device": where.name,
            "precision": where.precision,
            "flops_per_task": operations,
            "peak_flops": peak,
            "percent_of_peak": 100 * operations * rate / peak,
        }
        for name, rate in rates.items()
    ]


def _that_fit(variants: Variants) -> Variants:
    """Those that the device has memory for, which private copies of tables for thousands of tasks may not have."""
    import torch

    found = {}
    for name, variant in variants.items():
        try:
            if name != "loop":
                variant()
            found[name] = variant
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
    return found


def check(variants: Variants, case: str, tolerance: float = 1e-9) -> None:
    """All variants' meta-gradients agree to `tolerance`, in float64, which no precision rounds.

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
    print(f"  {auto['percent_of_peak']:.1f}% of {auto['peak_flops'] / 1e9:,.0f} GFLOP/s", flush=True)
    return rows
