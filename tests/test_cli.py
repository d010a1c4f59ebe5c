"""The command line: exit statuses, one sentence each, and a help that needs neither torch nor ray."""

import errno
import json
import subprocess
import sys
import types

import pytest
import torch

from distmeta import cli
from distmeta.commands import benchmark
from distmeta.errors import RunError, UserError


def failing(capsys, argv: list[str], status: int = 2) -> str:
    """The sentence of a command that fails with `status`."""
    assert cli.main(argv) == status
    out = capsys.readouterr()
    assert out.err.startswith("error: ")
    assert out.err.count("\n") == 1, out.err
    return out.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["'trian'", "did you mean train?", "prepare train evaluate export benchmark"]),
        (["train", "mleu"], ["'mleu'", "did you mean melu?"]),
        (["train", "melu", "--epoch", "3"], ["--epoch", "did you mean --epochs?"]),
        (["train", "--bach-size=3"], ["--bach-size", "did you mean --batch-size?"]),
        (["train", "melu", "--embeding", "3"], ["--embeding", "did you mean --embedding?"]),
        (["train", "als", "--embedding", "3"], ["--embedding", "train als --help"]),
        (["train", "--lr", "0.1", "melu"], ["unexpected word melu", "train melu --help"]),
        (["train", "--epochs", "many"], ["--epochs", "invalid int value: 'many'"]),
        (["train", "--epochs"], ["--epochs", "expected one argument"]),
        (["train", "--epochs", "0"], ["--epochs must be at least 1"]),
        (["train", "--lr", "nan"], ["--lr must be a finite number"]),
        (["train", "--hidden", "8", "x"], ["--hidden", "invalid int value: 'x'"]),
        (["train", "--protocol", "cmml"], ["--protocol is 'cmml'", "did you mean cmml-user?"]),
        (["train", "--workers", "2:"], ["--workers", "2:", "a number of workers, or A:B"]),
        (["train", "--resume"], ["--resume needs --run"]),
        (["train", "--retried"], ["--retried needs --run"]),
        (["train", "--resume", "--run", "nowhere"], ["nowhere: no run here"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml: no such config file"]),
        (["train", "--data", "nowhere"], ["nowhere", "no dataset here", "jobs.prepare"]),
        (["train", "--data", "ftp://x/y"], ["ftp://x/y", "cannot be opened"]),
        (["evaluate"], ["--run"]),
        (["evaluate", "--run", "nowhere"], ["nowhere: no run here"]),
        (["evaluate", "--rnu", "x"], ["unknown argument --rnu", "did you mean --run?"]),
        (["train", "--hidden", "8", "0"], ["--hidden must be at least 1, not 0"]),
        (["train", "--embedding", "0"], ["--embedding must be at least 1"]),
        (["train", "--steps", "-1"], ["--steps must be at least 0"]),
        (["train", "als", "--factors", "-3"], ["--factors must be at least 0"]),
        (["train", "--seed", "9" * 20], ["--seed must be at most 9223372036854775807 in size"]),
        (["train", "--config", "."], ["is a folder where a file is expected"]),
        (["prepare", "synthetic", "--out", "x", "--noise", "inf"], ["--noise must be a finite number"]),
        (["benchmark", "adaption"], ["'adaption'", "did you mean adaptation?"]),
        (["benchmark", "input", "--user", "3"], ["--user", "did you mean --users?"]),
    ],
)
def test_misuse_is_one_sentence_and_2(capsys, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    message = failing(capsys, argv)
    assert [w for w in words if w not in message] == [], message
    assert list(tmp_path.iterdir()) == [], "nothing was made"


def test_the_board_needs_neither_torch_nor_ray_train():
    """They would cost its process three seconds and 300 MB at each start of workers."""
    code = "import sys, distmeta.parallel.board; assert not {'torch', 'ray.train'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_needs_neither_torch_nor_ray():
    """Every help in one process, with both imports forbidden."""
    code = """
import sys
sys.modules["torch"] = sys.modules["ray"] = None  # importing either raises ImportError
from distmeta import cli
for argv in ([], ["--help"], ["train", "--help"], ["train", "melu", "--help"], ["train", "als", "-h"],
             ["evaluate", "--help"], ["prepare", "--help"], ["benchmark", "--help"], ["reproduce", "--help"]):
    try:
        status = cli.main(argv)
    except SystemExit as e:
        status = e.code
    assert status == 0, (argv, status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--learn-rates" in done.stdout
    assert "--factors" in done.stdout


def test_bare_train_help_lists_methods_and_no_methods_options(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["train", "--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert "methods: melu metacs" in out
    assert "--batch-size" in out
    assert "--embedding" not in out


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("a row is bad"), 2, "error: a row is bad"),
        (RunError("a worker is lost"), 1, "error: a worker is lost"),
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), 1, "error: /some/file: Permission denied"),
        (MemoryError(), 1, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_statuses(capsys, monkeypatch, error, status, words):
    def main(argv: list[str]) -> int:
        raise error

    monkeypatch.setitem(sys.modules, "distmeta.commands.evaluate", types.SimpleNamespace(main=main))  # type: ignore[arg-type]
    assert cli.main(["evaluate"]) == status
    assert words in capsys.readouterr().err


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch):
    def main(argv: list[str]) -> int:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setitem(sys.modules, "distmeta.commands.evaluate", types.SimpleNamespace(main=main))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="of ours"):
        cli.main(["evaluate"])


def test_a_reader_that_leaves_early_is_no_traceback():
    code = "import sys; from distmeta import cli; sys.exit(cli.main(['train', '--help']))"
    reader = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert reader.stdout
    assert reader.stderr
    reader.stdout.close()
    assert "Traceback" not in reader.stderr.read()
    reader.wait(60)


def test_benchmark_writes_its_rows(capsys, monkeypatch, tmp_path):
    rows = [{"benchmark": "input", "case": "x", "value": 1.5}]
    seen = []

    def main(argv: list[str]) -> list[dict[str, object]]:
        seen.append(argv)
        return rows

    monkeypatch.setitem(sys.modules, "distmeta.commands.benchmark_input", types.SimpleNamespace(main=main))  # type: ignore[arg-type]
    file = tmp_path / "rows.json"
    assert cli.main(["benchmark", "input", "--users", "5", "--json", str(file), "--epochs", "2"]) == 0
    assert seen == [["--users", "5", "--epochs", "2"]]
    assert json.loads(file.read_text()) == rows
    assert set(benchmark.BENCHMARKS) == {"adaptation", "input", "methods", "neighbours", "scaling", "search", "serving"}
