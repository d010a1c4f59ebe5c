"""The only parser: `python -m jobs.X …` and `distmeta X …` both come here. Imports neither torch nor ray."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from distmeta.errors import RunError, Unreachable, UserError
from distmeta.fields import nearest

COMMANDS = {
    "prepare": "turn raw files into a dataset, or a dataset into tasks",
    "train": "meta-train a method, evaluate it against the floors, write the report",
    "evaluate": "evaluate a run again and rewrite its report",
    "export": "a trained feed-forward method as one graph, to be served without this package",
    "benchmark": "measure this machine: adaptation, input",
    "search": "tune methods on validation, with Ray Tune and Optuna",
    "reproduce": "a paper's tables and parameter studies: its rows and ours side by side",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence naming the nearest flag; a prefix is never taken for a flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`; UserError on anything unknown, naming the nearest flag."""
        known = [s for a in self._actions for s in a.option_strings]
        try:
            values, unknown = self.parse_known_args(argv)
        except UserError:
            # a misspelt flag is the cause, not the required one that is missing for it
            unknown = [w for w in argv if w.startswith("--") and w.split("=")[0] not in known]
            if not unknown:
                raise
            values = argparse.Namespace()
        if unknown:
            word = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
            kind = "unknown argument" if word.startswith("-") else "unexpected word"
            self.error(f"{kind} {word}{nearest(word, known)}")
        return values


def main(argv: Sequence[str]) -> int:
    """Run one command; the exit status: 0, 2 for usage and bad input, 1 for a run that failed."""
    return guarded(lambda: _command(argv))


def _command(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: distmeta COMMAND [...]\n\n"
            + "\n".join(f"  {n:<10} {h}" for n, h in COMMANDS.items())
            + "\n\n`distmeta COMMAND --help` explains each."
        )
        return 0
    if argv[0] not in COMMANDS:
        near = nearest(argv[0], COMMANDS)
        raise UserError(f"unknown command {argv[0]!r}{near}; commands: {' '.join(COMMANDS)}")
    command = importlib.import_module(f"distmeta.commands.{argv[0]}")
    return command.main(list(argv[1:])) or 0


def guarded(work: Callable[[], int]) -> int:
    """What `work` returns; for what it raises, a sentence on standard error and the exit status of `main`."""
    try:
        return work()
    except (UserError, RunError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, UserError) else 1
    except BrokenPipeError:
        # whoever read the output has left: no second complaint when the interpreter flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not _out_of_memory(e):
            raise
        print("error: out of memory; try a smaller --batch-size or model, or a machine with more", file=sys.stderr)
        return 1
    except OSError as e:
        from distmeta import remote

        said = remote.explained(e) or f"{e.filename or e.__class__.__name__}: {e.strerror or e}"
        print(f"error: {said}", file=sys.stderr)
        return 2 if isinstance(said, UserError) and not isinstance(said, Unreachable) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _out_of_memory(e: RuntimeError) -> bool:
    """Whether torch (on a CPU or a GPU) or Arrow found no memory; by name, as neither is imported here."""
    return type(e).__name__ in ("OutOfMemoryError", "ArrowMemoryError") or "can't allocate memory" in str(e)


def console() -> None:
    """Entry point of the `distmeta` script."""
    sys.exit(main(sys.argv[1:]))
