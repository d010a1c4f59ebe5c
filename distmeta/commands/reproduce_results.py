"""What `reproduce` keeps of its runs and tables: small JSON without data of users or paths, for the report.

RESULTS/
  runs/RUN.json     a finished run: settings, split, versions, time, metrics by cohort
  TABLE.json        a table, a study, a costs page or `which-NAME`: its numbers, its runs and the command that made it
  report.md, report.html, NAME.svg    made of these alone
"""

import datetime
import importlib.metadata
import json
import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distmeta
from distmeta import config as config_module
from distmeta import process
from distmeta.errors import UserError
from distmeta.evaluation.papertables import PREPARE
from distmeta.storage import Location

if TYPE_CHECKING:
    import argparse

    from distmeta.commands.reproduce_call import Asked
    from distmeta.commands.reproduce_runs import Run
    from distmeta.commands.settings import Setting

FORMAT = 1
KINDS = ("table", "study", "costs", "which")
_DIGITS = 6
"""Significant digits that are kept."""

Made = Mapping[str, Any]
"""A kept file's content."""


def keep_run(results: Location, run: "Run", rows: Sequence[str]) -> None:
    """RESULTS/runs/RUN.json of a finished run.

    Args:
        rows: the rows that it stands for, `TABLE: LABEL`; those that the file has of the same run stay.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    summary = (run.where / "run.json").read_json("delete it, and the next call finishes the run")
    evaluation = (run.where / "evaluation.json").read_json(
        f"make it again with `python -m jobs.evaluate --run {run.where}`"
    )
    file = results / "runs" / f"{run.where.name}.json"
    found = {
        "format": FORMAT,
        "kind": "run",
        "name": run.where.name,
        "rows": sorted(rows),
        "method": run.config.method,
        "dataset": {"name": run.dataset, **_counts(summary["dataset"])},
        "protocol": run.config.data.protocol,
        "split_seed": run.seed,
        "split_hash": summary["split_hash"],
        "seed": run.config.train.seed,
        "config": config_module.apart(run.config),
        **{key: summary[key] for key in ("epochs", "steps", "best_step", "ended", "seconds")},
        "cohorts": evaluation["cohorts"],
        "date": _date(run.where / "run.json"),
        **_here(summary["versions"]),
    }
    before = _before(file)
    if before.get("date") == found["date"] and before.get("split_hash") == found["split_hash"]:
        kept = {
            key: before[key] for key in ("versions", "commit", "cores") if key in before
        }  # the machine that made it
        found |= {**kept, "rows": sorted({*before.get("rows", ()), *rows})}
    write(file, found)


def keep(results: Location, kind: str, found: Made, command: str, runs: Iterable["Run"] = ()) -> None:
    """RESULTS/NAME.json of what was made of these runs."""
    kept = sorted({run.where.name for run in runs})
    dates = [_before(results / "runs" / f"{name}.json").get("date", "") for name in kept]
    date = max([d for d in dates if d], default=_today())
    named = {"name": found.get("table") or found.get("study") or found["name"]}
    more = {"command": command, "runs": kept, "date": date, **_here({})}
    write(results / f"{named['name']}.json", {"format": FORMAT, "kind": kind, **named, **found, **more})


def load(results: Location) -> list[Made]:
    """All that is kept but the single runs, by name.

    Raises:
        UserError: there is nothing, or a file is damaged.
    """
    found = []
    for file in results.children():
        if file.name.endswith(".json"):
            made = file.read_json(_mend(file))
            if not isinstance(made, dict) or made.get("format") != FORMAT or made.get("kind") not in KINDS:
                raise damaged(file)
            found.append(made)
    if not found:
        raise UserError(
            f"{results}: no results here; make some with `python -m jobs.reproduce all --data movielens-1m=data/ml-1m`,"
            " or give another --results"
        )
    return found


def damaged(file: Location) -> UserError:
    """The sentence about a file that does not hold what this version keeps."""
    return UserError(f"{file}: holds no result that this version reads; {_mend(file)}")


def _mend(file: Location) -> str:
    return f"delete it and make it again with `python -m jobs.reproduce {file.name.removesuffix('.json')} --data …`"


def write(file: Location, value: Made) -> None:
    """The file in one piece: short numbers, no path of this machine."""
    file.parent.make_dir()
    text = json.dumps(short(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    file.write_bytes((text + "\n").encode())


def short(value: Any) -> Any:
    """The same with floats of few digits, and of paths and URIs their last part alone."""
    if isinstance(value, dict):
        return {key: short(v) for key, v in value.items() if key != "location"}
    if isinstance(value, list | tuple):
        return [short(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return _placeless(value) if isinstance(value, str) else value


def _placeless(text: str) -> str:
    """A word that is an absolute path or a URI without where it lies."""
    return text.rstrip("/").rsplit("/", 1)[-1] if os.path.isabs(text) or "://" in text.partition(" ")[0] else text


def command(
    one: "Asked", args: "argparse.Namespace", places: Mapping[str, Location], settings: Sequence["Setting"]
) -> str:
    """The words that make this table alone; data sets lie where `PREPARE` puts them.

    Args:
        settings: of the call, those that reach this table.
    """
    data = [f"{name}={_usual(name)}" for name in one.datasets if name in places]
    data += [f"{name}=none" for name in one.datasets if name not in places and f"{name}=none" in args.data]
    words = ["python", "-m", "jobs.reproduce", one.name, "--data", *data]
    methods = [m for m in args.methods if m in {o.method for o in one.ours}]
    given = {"methods": methods, "set": [_said(s) for s in settings], "panels": args.panels}
    for flag, values in given.items():
        words += [f"--{flag}", *values] if values else []
    for flag in ("seeds", "epochs", "workers", "threads"):
        words += [f"--{flag}", str(getattr(args, flag))] if getattr(args, flag) is not None else []
    return shlex.join(words)


def _said(setting: "Setting") -> str:
    head, equals, _ = setting.text.partition("=")
    return f"{head}{equals}{','.join(map(_placeless, setting.values))}"


def _usual(name: str) -> str:
    """Where a data set lies after the command that makes it."""
    return PREPARE.get(name, "").partition("--out ")[2].partition(" ")[0] or f"data/{name}"


def _counts(dataset: Made) -> dict[str, Any]:
    return {key: dataset[key] for key in ("users", "items", "interactions")}


def _before(file: Location) -> dict[str, Any]:
    """What a file holds; nothing where it is missing or damaged, as it is then made anew."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _date(file: Location) -> str:
    """The day (UTC) on which a file was written."""
    written = file.fs.get_file_info(file.path).mtime
    return written.astimezone(datetime.UTC).date().isoformat() if written else _today()


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _here(versions: Mapping[str, str]) -> dict[str, Any]:
    """What numbers depend on besides the settings: versions, the commit, the cores."""
    from distmeta.parallel.checkpoint import versions as of_checkpoint

    told = dict(versions) or of_checkpoint()
    found: dict[str, Any] = {"versions": {**told, "ray": importlib.metadata.version("ray")}, "cores": process.cores()}
    if commit := _commit():
        found["commit"] = commit
    return found


def _commit() -> str:
    """The commit of the code that runs, with + where files differ from it; "" outside a checkout of its own."""
    root = Path(distmeta.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    asked = ("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "-uno", "--", "distmeta")
    try:
        done = [subprocess.run(["git", "-C", str(root), *a], capture_output=True, text=True, check=True) for a in asked]
    except (OSError, subprocess.CalledProcessError):
        return ""
    head, changed = (d.stdout.strip() for d in done)
    return head + ("+" if changed else "")
