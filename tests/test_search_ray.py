"""A search through Ray Tune: killed with -9 in the middle, it goes on, and ends in what `train` makes of its winner."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from nodes import Nodes, command
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from distmeta import cli

TRIALS, EPOCHS, GRACE = 4, 12, 4
QUICK = ["--set", "melu:steps=1", "--set", "melu:batch-size=16", "--set", "melu:patience=0"]


def at_work(nodes: Nodes) -> list[int]:
    """The processes that trials train in, oldest first."""
    return nodes._processes(b"ray::ImplicitFunc")


def studies(out: Path) -> dict[str, list[FrozenTrial]]:
    """The trials of each method, read as Optuna's own tools read them."""
    if not (out / "journal.log").exists():
        return {}
    try:
        storage = JournalStorage(JournalFileBackend(str(out / "journal.log")))
        return {s.study_name: storage.get_all_trials(s._study_id) for s in storage.get_all_studies()}
    except (ValueError, KeyError):  # half a line, of a process at work
        return {}


def under_way(out: Path) -> FrozenTrial | None:
    """A trial in the middle of its first seed, once another has ended."""
    trials = studies(out).get("melu", [])
    running = [t for t in trials if not t.state.is_finished() and 1 < len(t.intermediate_values) < EPOCHS]
    return running[0] if running and any(t.state.is_finished() for t in trials) else None


def working(nodes: Nodes, out: Path) -> int | None:
    """A process in the first seed of a trial that nothing is about to stop: ASHA looks at it after GRACE epochs."""
    for trial in studies(out).get("melu", []):
        done = len(trial.intermediate_values)
        if not trial.state.is_finished() and (done < GRACE - 1 or GRACE < done < EPOCHS - 1):
            lock = out / f"melu/{trial.number:04d}/.lock"
            holder = re.search(r"\d+", lock.read_text()) if lock.exists() else None
            if holder and int(holder.group()) in at_work(nodes):
                return int(holder.group())
    return None


def kill_in_the_middle(nodes: Nodes, argv: list[str], out: Path) -> FrozenTrial:
    """Run a search in a process of its own until a trial is under way, and kill both; the trial as it was then."""
    env = {**os.environ, "RAY_ADDRESS": nodes.address}
    driver = subprocess.Popen([sys.executable, "-m", "tune.search", *argv], env=env, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (found := under_way(out)):
            assert driver.poll() is None, f"the search ended with {driver.returncode} before"
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.02)
        victims = at_work(nodes)
        assert victims
    finally:
        driver.kill()
        driver.wait()
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_killed_and_resumed(tmp_path, small, nodes, capfd):
    """What has ended is not made again, what was interrupted goes on from its checkpoint, each in its place."""
    out = tmp_path / "out"
    argv = ["melu", "bias", "--data", str(small), "--trials", str(TRIALS), "--epochs", str(EPOCHS), "--seeds", "2"]
    cut = kill_in_the_middle(nodes, [*argv, *QUICK, "--grace", str(GRACE), "--out", str(out)], out)
    ended = [t for t in studies(out)["melu"] if t.state.is_finished()]
    logs = {t.number: (out / f"melu/{t.number:04d}/log.txt").read_bytes() for t in ended}

    with command("search", "--out", str(out), "--resume") as search:
        found: list[int] = []
        search.wait(lambda: found.extend(filter(None, [working(nodes, out)])) or found)
        os.kill(found[0], signal.SIGKILL)  # of one trial: the search goes on, and so does the trial
    said = capfd.readouterr()
    assert search.status == 0, said.err
    assert "its process was lost; another goes on in its place" in said.out
    assert not said.err

    for method in ("melu", "bias"):
        trials = studies(out)[method]
        assert [t.number for t in trials] == list(range(TRIALS))  # none lost, none made twice
        assert all(t.state.is_finished() and not t.user_attrs.get("failure") for t in trials)
        assert sorted(r.name for r in (out / method).glob("????")) == [f"{n:04d}" for n in range(TRIALS)]
        winner = check_winner(tmp_path, out, method)
        check_seeds(out, method)
        if method == "melu":
            assert [trials[t.number] for t in ended] == ended
            assert trials[cut.number].intermediate_values.items() >= cut.intermediate_values.items()
            logs.pop(winner, None)  # it was evaluated
    assert logs == {n: (out / f"melu/{n:04d}/log.txt").read_bytes() for n in logs}
    log = (out / f"melu/{cut.number:04d}/log.txt").read_text()
    assert int(re.findall(r"going on from step \d+ \(epoch (\d+)", log)[0]) >= len(cut.intermediate_values)
    assert not (out / ".ray").exists()


def check_winner(tmp_path: Path, out: Path, method: str) -> int:
    """It alone was evaluated on test, and `train --config best.yaml` comes to the same, bit for bit. Its number."""
    table = pl.read_parquet(out / method / "trials.parquet")
    best = table.filter(pl.col("state") == "complete").sort("error", "number").row(0, named=True)
    assert [f.parent.name for f in (out / method).glob("*/evaluation.json")] == [best["run"]]
    words = ["train", "--config", str(out / method / "best.yaml"), "--run", str(tmp_path / method)]
    assert cli.main(words) == 0
    alone, searched = rows(tmp_path / method), rows(out / method / best["run"])
    assert [r["valid_mae"] for r in alone] == [r["valid_mae"] for r in searched]
    return best["number"]


def check_seeds(out: Path, method: str) -> None:
    """The value of a trial that was not stopped is the mean of its seeds; of others there is but one."""
    table = pl.read_parquet(out / method / "trials.parquet")
    for run, state, error, deviation in table.select("run", "state", "error", "deviation").iter_rows():
        first, other = rows(out / method / run), rows(out / method / f"{run}-seed1")
        if state == "pruned":
            assert (bool(other), deviation, len(first)) == (False, None, GRACE)
            continue
        found = [min(r["valid_mae"] for r in told) for told in (first, other)]
        assert error == pytest.approx(sum(found) / 2)
        assert deviation == pytest.approx(abs(found[0] - found[1]) / 2**0.5)


def test_failing_trials(tmp_path, small, nodes, capfd):
    """Each is recorded with its reason, and the search goes on until more fail than may."""
    argv = ["search", "melu", "--data", str(small), "--epochs", "2", "--trials", "4", "--out", str(tmp_path / "out")]
    argv += [*QUICK, "--set", "lr=1e30", "--set", "clip=0", "--set", "weight-decay=0", "--failures", "0.25"]
    assert cli.main(argv) == 1
    said = capfd.readouterr()
    (sentence,) = [line for line in said.err.splitlines() if line]
    assert re.search(r"error: melu: 2 of 4 trials failed, more than --failures 0.25 allows; .*is not finite", sentence)
    assert len(re.findall(r"^melu  failed \d{4}: .*is not finite", said.out, re.MULTILINE)) == 2
    table = pl.read_parquet(tmp_path / "out/melu/trials.parquet")
    assert table["state"].to_list() == ["fail"] * 2
    assert all("is not finite" in reason for reason in table["failure"])
