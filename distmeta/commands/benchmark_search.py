"""`benchmark search`: what a search's CPUs do, and whether half the training epochs find as good a config."""

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmeta.cli import Parser
from distmeta.commands import search
from distmeta.errors import UserError
from distmeta.storage import Location

VARIANTS: Mapping[str, Sequence[str]] = {
    "random": ("--sampler", "random", "--no-pruning"),
    "asha+tpe": ("--sampler", "tpe", "--pruning"),
}
"""What is compared, the first with every epoch of its trials, the others with half as many in all."""
_MOST = 10
"""Trials that a search with pruning may make for each one of the first variant's."""


@dataclass(frozen=True)
class Searched:
    """What one search came to."""

    epochs: int
    """Trained until it was over, or until the budget was spent."""
    best: float
    """Lowest validation error of the trials that were complete by then: of what the search would have chosen."""
    trials: int
    """That had ended by then."""
    share: float
    """Of the CPUs' time, spent in training and validation."""
    beside: float
    """Seconds of a trial's CPUs that went by beside that, for each trial."""


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure, print a table, and give its rows (design §8).

    Raises:
        UserError: usage, or no dataset at --data.
    """
    parser = Parser(
        prog="benchmark search",
        description="Tunes a method by random search without pruning, then by ASHA and TPE, which get half the training"
        " epochs: all that the trials of a search trained count, those of stopped and failed trials too. ASHA and TPE"
        " are asked for more trials until that is spent, and judged by the trials that were complete when it was. Both"
        " begin with the method's defaults and its papers' values. Gives of each the lowest validation error, the share"
        " of the CPUs' time spent in training and validation, and the seconds beside it for each trial: medians over"
        " the seeds. MovieLens-1M by the protocol melu takes an hour on two free cores.",
    )
    parser.add_argument("--data", metavar="DATASET", help="made by `python -m jobs.prepare`")
    parser.add_argument("--protocol", default="", help="what becomes a task, as of train")
    parser.add_argument("--method", default="melu", help="[melu]")
    parser.add_argument("--trials", type=int, default=40, metavar="N", help="of random search [40]")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of a trial, at most [20]")
    parser.add_argument("--grace", type=int, default=3, metavar="N", help="epochs before ASHA stops a trial [3]")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="searches of each [3]")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPUs of a trial [1]")
    parser.add_argument("--out", help="where the searches stay; those that are there are gone on with [nowhere]")
    parser.add_argument("--set", action="append", default=[], metavar="FLAG=VALUE", help="a flag of train")
    args = parser.parse(argv)
    if not args.data:
        raise UserError("benchmark search: give --data DATASET, made by `python -m jobs.prepare`")
    for name in ("trials", "epochs", "grace", "seeds", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"benchmark search: --{name} must be at least 1, not {getattr(args, name)}")
    found: dict[str, list[Searched]] = {name: [] for name in VARIANTS}
    with _folder(args.out) as out:
        for seed in range(args.seeds):
            budget = 0
            for name in VARIANTS:
                found[name].append(_searched(args, name, seed, out / f"{name}-{seed}", budget))
                budget = budget or found[name][-1].epochs // 2
    rows = _rows(args, found)
    for r in rows:
        versus = "".join(f"  {v:.3f} of {other}" for other, v in r["ratio_to"].items())
        print(f"{r['case']}  {r['variant']:<9} {r['value']:>8.4f} {r['unit']}{versus}")
    return rows


@contextlib.contextmanager
def _folder(out: str | None) -> Iterator[Location]:
    if out:
        yield Location.of(out).make_dir()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Location.of(folder)


def _searched(args: Any, variant: str, seed: int, out: Location, budget: int) -> Searched:
    """Run a search until its trials are done, or until they have trained `budget` epochs, where there is one."""
    asked, most = args.trials, _MOST * args.trials
    while True:
        _launch(args, variant, seed, out, asked)
        found = _read(Path(out.path), args, budget)
        if found.epochs >= budget or asked >= most:
            return found
        # as many more as the epochs that are left make, at what a trial has taken so far
        each = max(found.epochs, 1) / max(found.trials, 1)
        asked = min(most, asked + max(2, round((budget - found.epochs) / each)))


def _launch(args: Any, variant: str, seed: int, out: Location, trials: int) -> None:
    if (out / "search.json").exists():
        search.main(["--out", str(out), "--resume", "--trials", str(trials)])
        return
    words = [args.method, "--out", str(out), "--data", args.data, *VARIANTS[variant], "--trials", str(trials)]
    words += ["--protocol", args.protocol] if args.protocol else []
    for name, value in (("epochs", args.epochs), ("grace", args.grace), ("threads", args.threads), ("seed", seed)):
        words += [f"--{name}", str(value)]
    search.main([*words, *(word for text in args.set for word in ("--set", text))])


def _read(out: Path, args: Any, budget: int) -> Searched:
    """What the journal of a search says, as far as the budget goes."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    from distmeta.parallel import tally

    backend = JournalFileBackend(str(out / "journal.log"))
    study = optuna.load_study(study_name=args.method, storage=JournalStorage(backend))
    epochs, best, ended = spent(backend.read_logs(0), budget)
    if not ended:
        raise UserError(
            f"benchmark search: no trial was complete within half of random search's epochs ({budget}); use more"
            " --trials, or a smaller --grace"
        )
    return Searched(epochs, best, ended, *tally.spent(study, args.threads))


def spent(journal: Any, budget: int) -> tuple[int, float, int]:
    """Epochs trained, the lowest error of a complete trial, and how many trials had ended, at the end of a search's
    journal or when `budget` epochs were trained (0: no bound).

    Args:
        journal: what was written into it, in that order.
    """
    trained: set[tuple[int, int]] = set()
    best, ended = float("inf"), 0
    for entry in journal:
        if "intermediate_value" in entry:
            trained.add((entry["trial_id"], entry["step"]))
        elif entry.get("state") == 1 and entry.get("values"):  # complete
            best = min(best, entry["values"][0])
        ended += entry.get("state") in (1, 2, 3)
        if budget and len(trained) > budget:
            return budget, best, ended
    return len(trained), best, ended


def _rows(args: Any, found: Mapping[str, Sequence[Searched]]) -> list[dict[str, Any]]:
    what = [Location.of(args.data).name, args.protocol, args.method]
    case = f"{' '.join(filter(None, what))} {args.trials} x {args.epochs}"
    first = next(iter(found.values()))
    rows = []
    for name, mine in found.items():
        ratio = statistics.median(a.best / b.best for a, b in zip(mine, first, strict=True))
        kept = {
            "epochs": statistics.median(s.epochs for s in mine),
            "trials": statistics.median(s.trials for s in mine),
            "errors": [s.best for s in mine],
        }
        for unit, values, ratios in (
            ("validation error", [s.best for s in mine], {} if mine is first else {next(iter(found)): ratio}),
            ("of the CPUs' time in training", [s.share for s in mine], {}),
            ("s beside training a trial", [s.beside for s in mine], {}),
        ):
            row = {"benchmark": "search", "case": case, "variant": name, "value": statistics.median(values)}
            rows.append({**row, "unit": unit, "ratio_to": ratios, **kept})
    return rows
