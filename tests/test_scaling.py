"""`benchmark scaling`: a tiny measurement, and what it makes of the runs' own numbers."""

import json
from typing import Any

import pytest

from distmeta import cli
from distmeta.commands import scaling_runs
from distmeta.errors import RunError
from distmeta.process import cores


def run(began: float, ended: float, seconds: float, rates: list[float]) -> Any:
    lines = [{"seconds": seconds, "tasks_per_s": rate} for rate in rates]
    return scaling_runs.Run(lines, began, ended)


def test_independent_processes_are_measured_while_all_train():
    """One from 10 to 15 s, one from 12 to 17 s, epochs of 1 s, each at 100 tasks/s with the other, at 1000 alone."""
    early = run(8, 15, 1.0, [1000, 1000, 1000, 110, 100])
    late = run(8, 17, 1.0, [50, 100, 90, 1000, 1000])
    assert scaling_runs.speed([early, late]) == (110 + 100) / 2 + (100 + 90) / 2
    assert (early.start(), late.start()) == (2, 4)
    with pytest.raises(RunError, match="use more --epochs"):
        scaling_runs.speed([run(8, 13, 1.0, [100] * 3), late])


def test_workers_against_independent_processes(small, tmp_path, capsys):
    file = tmp_path / "rows.json"
    argv = ["--data", str(small), "--batch-size", "2", "--epochs", "6", "--turns", "1", "--json", str(file)]
    assert cli.main(["benchmark", "scaling", *argv]) == 0
    *speeds, bare, start = json.loads(file.read_text())
    assert [r["variant"] for r in speeds] == ["one", "independent", "workers", "one batch"]
    one, independent, *on_ray = speeds
    for workers in on_ray:
        assert workers["ratio_to"]["one"] == pytest.approx(workers["value"] / one["value"])
        assert workers["ratio_to"]["independent"] == pytest.approx(workers["value"] / independent["value"])
    for row in speeds:
        ms = row["step_ms"]
        assert ms["all"] == pytest.approx(sum(v for k, v in ms.items() if k != "all"))
        assert (ms["wait"] > 0) == (row in on_ray)
        assert min(ms["compute"], ms["exchange"], ms["optimizer"]) > 0
    assert start["added_s"] == pytest.approx(start["value"] - bare["value"])
    out = capsys.readouterr().out
    assert "2 workers" in out
    assert "of a bare fit()" in out


def test_nodes_against_one_node(small, tmp_path, capsys):
    file = tmp_path / "rows.json"
    argv = ["--data", str(small), "--batch-size", "2", "--epochs", "4", "--turns", "1", "--nodes", "2"]
    assert cli.main(["benchmark", "scaling", *argv, "--json", str(file)]) == 0
    one, two = json.loads(file.read_text())
    assert [r["variant"] for r in (one, two)] == ["one node", "2 nodes"]
    assert two["ratio_to"]["one node"] == pytest.approx(two["value"] / one["value"])
    assert one["same_parameters"]
    assert two["same_parameters"]
    assert "x one node" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nodes", "3"], "--workers 2 are not as many on each of 3 nodes"),
        (["--epochs", "3"], "--epochs must be at least 4"),
        ([], "give --data DATASET"),
        (
            ["--data", "nowhere", "--method", "bias"],
            "bias has a closed form, without steps to measure; methods that have: melu",
        ),
    ],
)
def test_bad_arguments(argv, words, capsys):
    assert cli.main(["benchmark", "scaling", *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_training_that_fails_says_why(small, capsys):
    n = cores() + 1
    argv = ["--data", str(small), "--batch-size", "200", "--epochs", "4", "--turns", "1", "--workers", str(n)]
    assert cli.main(["benchmark", "scaling", *argv]) == 2
    assert f"{n} workers of 1 CPU each need {n}, this machine has" in capsys.readouterr().err
