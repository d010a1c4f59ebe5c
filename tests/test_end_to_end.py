"""Whole commands, as a person runs them: train, kill, go on, evaluate."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from distmeta import cli
from distmeta.parallel import rundir
from distmeta.storage import Location, writing

FLAGS = ["--batch-size", "16", "--threads", "1"]


def tensors(run: Path) -> dict[str, str]:
    """sha256 of every tensor file under a run."""
    files = sorted(run.rglob("*.safetensors"))
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def metrics(run: Path) -> list[dict[str, Any]]:
    keys = ("epoch", "step", "train_loss", "valid_mae", "valid_mse", "lr")
    return [{k: json.loads(line)[k] for k in keys} for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(run: Path, small: Location, *argv: str, method: str = "melu") -> int:
    return cli.main(["train", method, "--data", str(small), "--run", str(run), *FLAGS, *argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small) -> Path:
    """A run of two epochs that is done. Shared: change nothing."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(run, small, "--epochs", "2") == 0
    return run


def test_train_without_arguments(tmp_path):
    """`python -m jobs.train` in an empty folder: dataset, run, evaluation against the floors, report."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", "--epochs", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "no --data: made a small synthetic dataset" in done.stdout
    assert "epoch 2/2  train" in done.stdout
    assert "MAE minus that of" in done.stdout
    (run,) = (tmp_path / "runs").glob("melu-synthetic-*")
    assert {f.name for f in run.iterdir() if not f.name.startswith(".")} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "measured.arrow", "evaluation.json", "report.html",
        "run.json",
    }  # fmt: skip
    assert str(run / "report.html") in done.stdout
    found = json.loads((run / "evaluation.json").read_text())
    assert found["method"] == "melu"
    assert found["cohorts"]["all"]["n_tasks"] > 0
    assert set(found["floors"]) == set(found["paired"]) >= {"bias", "als"}
    summary = json.loads((run / "run.json").read_text())
    assert summary["status"] == "finished"
    assert summary["split_hash"] == found["split_hash"]
    assert summary["versions"].keys() >= {"python", "torch", "distmeta"}


def test_a_run_that_exists_is_not_overwritten(finished, small, capsys):
    before = {f: f.read_bytes() for f in finished.rglob("*") if f.is_file()}
    assert train(finished, small, "--epochs", "1") == 2
    assert "a run exists here; add --resume" in capsys.readouterr().err
    assert {f: f.read_bytes() for f in finished.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("flag", ["--resume", "--retried"])
def test_finished_run_resumed_says_so(finished, capsys, flag):
    before = {f: f.read_bytes() for f in finished.rglob("*") if f.is_file() and f.name != ".lock"}
    assert cli.main(["train", "--run", str(finished), flag]) == 0
    assert "was finished already (best step " in capsys.readouterr().out
    assert {f: f.read_bytes() for f in finished.rglob("*") if f.is_file() and f.name != ".lock"} == before


def test_evaluate_gives_the_same_numbers_again(finished, tmp_path, capsys):
    before = (finished / "evaluation.json").read_bytes()
    (finished / "evaluation.json").unlink()
    (finished / "report.html").unlink()
    assert cli.main(["evaluate", "--run", str(finished)]) == 0
    assert (finished / "evaluation.json").read_bytes() == before
    assert (finished / "report.html").exists()
    assert "unseen tasks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--lr", "0.5"], "was started with train.lr = 0.002, not 0.5"),
        (["train", "--steps", "3"], "was started with method_options.steps = 5, not 3"),
        (["train", "--split-seed", "1"], "was started with data.split_seed = 0, not 1"),
        (["train", "metacs"], "was started with method = 'melu', not 'metacs'"),
        (["train", "--epochs", "2", "--lr-decay", "0.5"], "was started with train.lr_decay = 1.0, not 0.5"),
    ],
)
def test_resume_with_other_settings_names_the_key(finished, capsys, argv, words):
    for flag in ("--resume", "--retried"):
        assert cli.main([*argv, "--run", str(finished), flag]) == 2
        assert words in capsys.readouterr().err


def test_retried_begins_where_nothing_is_kept(tmp_path, small, capsys):
    """No run, or the config.yaml alone of one that was killed or could not be, whose settings may then be mended."""
    run = tmp_path / "run"
    assert train(run, small, "--clusters", "9999", "--retried", method="hml") == 2
    assert {f.name for f in run.iterdir()} == {".lock", "config.yaml"}
    (tmp_path / "job.yaml").write_text(f"method: itemmean\ntrain: {{run: {run}, retried: true}}\n")
    argv = ["train", "--config", str(tmp_path / "job.yaml"), "--data", str(small)]
    assert cli.main(argv) == 0
    assert "was finished already" not in capsys.readouterr().out
    kept = yaml.safe_load((run / "config.yaml").read_text())["train"]
    assert (kept["retried"], kept["resume"]) == (False, False)
    assert cli.main(argv) == 0
    assert "was finished already" in capsys.readouterr().out


def test_more_epochs_are_the_same_as_at_once(finished, small, tmp_path):
    """Stopping early costs nothing: 1 epoch and then 2 end as 2 at once."""
    run = tmp_path / "run"
    assert train(run, small, "--epochs", "1") == 0
    assert cli.main(["train", "--run", str(run), "--resume", "--epochs", "2"]) == 0
    assert metrics(run) == metrics(finished)
    last = max(tensors(finished))
    assert tensors(run)[last] == tensors(finished)[last]
    assert json.loads((run / "run.json").read_text())["epochs"] == 2


def test_other_data_is_refused(finished, tmp_path, capsys):
    other = tmp_path / "other"
    assert cli.main(["prepare", "synthetic", "--users", "150", "--seed", "9", "--out", str(other)]) == 0
    for argv in (["train", "--resume"], ["evaluate"]):
        assert cli.main([*argv, "--run", str(finished), "--data", str(other)]) == 2
        assert "was trained on another split" in capsys.readouterr().err
    assert str(other) not in (finished / "config.yaml").read_text()


@pytest.mark.parametrize(("method", "flag"), [("melu", "--resume"), ("metacs", "--retried")])
def test_killed_and_gone_on_with(tmp_path, small, method, flag):
    """SIGKILL in the middle; `--resume` ends in the same bytes as the run that nothing happened to."""
    argv = [*FLAGS, "--epochs", "20", "--patience", "0", "--checkpoint-steps", "4", "--lr", "1e-4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, small, *argv, method=method) == 0
    command = [sys.executable, "-m", "jobs.train", method, "--data", str(small), "--run", str(parts), *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 60
        while not (parts / "metrics.jsonl").exists() or len(metrics(parts)) < 5:
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 5 <= len(metrics(parts)) < 20
    assert not (parts / "run.json").exists()
    assert cli.main(["train", "--run", str(parts), flag]) == 0
    assert tensors(parts) == tensors(whole)
    assert metrics(parts) == metrics(whole)
    evaluations = [json.loads((run / "evaluation.json").read_text()) for run in (whole, parts)]
    assert evaluations[0] == evaluations[1]


def test_disk_full_is_1_and_the_run_goes_on(tmp_path, finished, small, monkeypatch, capsys):
    run, write, left = tmp_path / "run", Location.write_bytes, [6]

    def full(self: Location, data: bytes) -> None:
        if self.path.startswith(str(run)):
            left[0] -= 1
        if left[0] < 0:
            with writing(self):
                raise OSError(28, "No space left on device")
        write(self, data)

    with monkeypatch.context() as m:
        m.setattr(Location, "write_bytes", full)
        assert train(run, small, "--epochs", "2") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no space left on the device; free some and run the command again (train: with --resume)" in error
    assert cli.main(["train", "--run", str(run), "--resume"]) == 0
    assert tensors(run) == tensors(finished)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a /proc, where nobody may make a folder")
def test_no_permission_is_2(small, capsys):
    assert train(Path("/proc/distmeta/run"), small) == 2
    error = capsys.readouterr().err
    assert "/proc/distmeta/run: cannot be written" in error
    assert error.count("\n") == 1


def test_one_driver_at_a_time(finished, capsys):
    with rundir.lock(Location.of(finished)):
        assert cli.main(["train", "--run", str(finished), "--resume"]) == 2
    assert f"is being trained by process {os.getpid()}" in capsys.readouterr().err


def test_config_of_a_run_starts_another(finished, tmp_path):
    """RUN/config.yaml with another --run repeats the run to the bit."""
    run = tmp_path / "again"
    assert cli.main(["train", "--config", str(finished / "config.yaml"), "--run", str(run)]) == 0
    assert tensors(run) == tensors(finished)


def test_closed_form_method(tmp_path, small, capsys):
    """A floor trained as a method differs from itself as a floor by nothing."""
    assert train(tmp_path / "run", small, method="bias") == 0
    assert "solved  valid mae" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["paired"]["bias"]["all"]["mae"] == pytest.approx([0, 0, 0], abs=1e-12)
    before = tensors(tmp_path / "run")
    assert cli.main(["train", "--run", str(tmp_path / "run"), "--resume"]) == 0
    assert tensors(tmp_path / "run") == before
