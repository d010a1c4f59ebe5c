"""`ray job submit` against a head that is started as a user would start it; everything in processes of their own.

No Ray in this process.
"""

import hashlib
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from emulation import REPO, TOKEN, Head, descendants, environment, free_ports, head, until

from distmeta.parallel import checkpoint
from distmeta.storage import Location

SENT = ("distmeta", "jobs", "tune")
"""What `ray job submit` is to send of a checkout."""
TRAIN = ["train", "melu", "--threads", "1", "--batch-size", "8", "--patience", "0", "--epochs", "40"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as a user has it: the code, and beside it what must not be sent."""
    to = tmp_path_factory.mktemp("tree")
    for name in (*SENT, "tests"):
        shutil.copytree(REPO / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml"):
        shutil.copy(REPO / name, to / name)
    for name in ("runs/a/params.safetensors", "data/ml-1m/ratings.dat", ".venv/lib/x.py", "shop.parquet", ".git/x"):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text("not code")
    return to


@pytest.fixture(scope="module")
def undisturbed(small: Location, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """A run on a cluster of its own, for a user without a home, that goes on while other tests wait."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "file").write_text("")
    env = environment(folder / "file" / "home")  # a home that not even root can make
    run = folder / "run"
    words = [sys.executable, "-m", "jobs.train", *TRAIN[1:], "--data", str(small), "--run", str(run), "--workers", "2"]
    process = subprocess.Popen(words, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish() -> Path:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        assert "Traceback" not in output
        until(lambda: not descendants(env), f"left running: {descendants(env)}", 20)
        return run

    yield finish
    process.kill()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head with token authentication."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").touch(0o600)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    with head(home, RAY_AUTH_MODE="token") as running:
        yield running


def job(*words: str) -> list[str]:
    return [sys.executable, "-m", f"jobs.{words[0]}", *words[1:]]


def tensors(run: Path) -> dict[str, str]:
    files = sorted(run.glob("checkpoints/*/*.safetensors"))
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def assert_whole(run: Path) -> None:
    """Every checkpoint that counts can be read; the one that a killed worker was writing has no manifest."""
    where = Location.of(run)
    for step in checkpoint.complete(where):
        for part in ("params", "optimizer"):
            assert checkpoint.load(where, checkpoint.read(where, step), part)


def test_a_stopped_job_goes_on_to_the_same_parameters(undisturbed, guarded, small, tree, tmp_path):
    run = tmp_path / "run"
    words = [*job(*TRAIN), "--data", str(small), "--run", str(run), "--workers", "2"]
    status, output = guarded.submit(tree, *words, options=("--no-wait", "--submission-id", "first"))
    assert status == 0, output
    until(lambda: list(run.glob("checkpoints/*/checkpoint.json")), "no checkpoint", 240)
    assert guarded.ray("job", "stop", "first").returncode == 0
    assert "'first' was stopped" in guarded.ray("job", "status", "first").stdout
    log = guarded.ray("job", "logs", "first").stdout
    assert "epoch 1/40" in log
    assert "terminated" in log
    assert "Traceback" not in log
    assert not (run / "run.json").exists()
    assert_whole(run)
    until(lambda: not [p for p in descendants(guarded.env) if "RayTrain" in p or "jobs.train" in p], "workers live on")

    status, output = guarded.submit(tree, *job("train", "--run", str(run), "--resume", "--workers", "2"))
    assert status == 0, output
    assert "epoch 40/40" in output
    assert "epoch 1/40" not in output
    assert "succeeded" in output
    assert tensors(run) == tensors(undisturbed()) != {}


def test_a_failing_job_says_why_and_sends_code_only(guarded, tree, small, tmp_path):
    missing, run = tmp_path / "missing", tmp_path / "run"
    shell = "; ".join(
        [
            "find . -type f",
            *(
                " ".join([*job(*words), "&& echo wrong"])
                for words in (
                    ["train"],
                    ["train", "--run", str(run)],
                    ["train", "--data", str(small), "--run", "here"],
                    ["train", "--run", "here", "--resume"],
                    ["prepare", "synthetic", "--out", "here"],
                    ["evaluate", "--run", "here"],
                )
            ),
            "exec " + " ".join([*job(*TRAIN), "--data", str(missing), "--run", str(run), "--workers", "2"]),
        ]
    )
    status, output = guarded.submit(tree, "sh", "-c", shell)
    assert status == 1, output
    assert "failed with exit code 2" in output
    assert f"error: {missing}: no dataset here" in output
    relative = [line for line in output.splitlines() if line.startswith("error: --") and "absolute" in line]
    flags = [line.removeprefix("error: ").split()[0] for line in relative]
    assert flags[:6] == ["--run", "--data", "--run", "--run", "--out", "--run"], output
    assert "wrong" not in output.split("Running entrypoint")[1].split("\n", 1)[1]
    assert "Traceback" not in output
    assert not run.exists()
    sent = {line.removeprefix("./") for line in output.splitlines() if line.startswith("./")}
    files = [f for name in SENT for f in (tree / name).rglob("*") if f.is_file() and f.suffix != ".svg"]
    code = {str(f.relative_to(tree)) for f in files if (tree / "jobs" / "results") not in f.parents}
    assert code <= sent
    assert sent - code <= {".gitignore", ".rayignore", "pyproject.toml"} | {s for s in sent if "__pycache__" in s}


@pytest.mark.parametrize(
    ("auth", "words"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, ["wants a token", "RAY_AUTH_TOKEN"]),
        ({"RAY_AUTH_TOKEN": "f" * 64}, ["refuses this token", "RAY_AUTH_TOKEN"]),
        ({"HOME": "/nonexistent"}, ["RAY_AUTH_MODE=token", "couldn't find", "RAY_AUTH_TOKEN_PATH"]),
        ({"RAY_AUTH_MODE": "tokens"}, ["RAY_AUTH_MODE=tokens", "neither"]),
    ],
    ids=["none", "wrong", "not found", "mode"],
)
def test_without_the_token_nothing_is_let_in(guarded, small, tree, tmp_path, auth, words):
    run = tmp_path / "run"
    train = [*job(*TRAIN), "--data", str(small), "--run", str(run), "--workers", "2"]
    env = {**guarded.env, "RAY_ADDRESS": guarded.gcs, **auth}
    done = subprocess.run(train, cwd=REPO, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert [w for w in words if w not in done.stderr] == [], done.stderr
    if len(auth) == 1 and "RAY_AUTH_MODE" in auth:
        refused = guarded.ray("job", "submit", "--working-dir", str(tree), "--", "true", **auth)
        assert refused.returncode != 0
        assert "401" in refused.stdout + refused.stderr or "uthentication" in refused.stdout + refused.stderr


def test_another_version_than_the_clusters(guarded, small, tmp_path):
    code = "import sys, ray; ray.__version__ = '2.59.0'; from distmeta import cli; sys.exit(cli.main(sys.argv[1:]))"
    words = [*TRAIN, "--data", str(small), "--run", str(tmp_path / "run"), "--workers", "2"]
    env = {**guarded.env, "RAY_ADDRESS": guarded.gcs}
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    found = re.fullmatch(
        r"error: RAY_ADDRESS=\S+: the cluster has Ray (\S+) and Python (\S+), this process Ray (\S+) and Python (\S+),"
        r" which must be the same; .*`ray job submit`\n",
        done.stderr,
    )
    assert found, done.stderr
    ray, python = metadata.version("ray"), platform.python_version()
    assert found.groups() == (ray, python, "2.59.0", python)


def test_where_no_cluster_answers(small, tmp_path):
    train = [*job(*TRAIN), "--data", str(small), "--run", str(tmp_path / "run"), "--workers", "2"]
    for address, words in (
        (f"127.0.0.1:{free_ports(1)[0]}", "no Ray cluster answers there"),
        ("http://127.0.0.1:8265", "ray job submit --address"),
    ):
        env = environment(tmp_path, RAY_ADDRESS=address)
        done = subprocess.run(train, cwd=REPO, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: RAY_ADDRESS={address}: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_ctrl_c_ends_a_cluster_of_our_own(small, tmp_path):
    env = environment(tmp_path)
    words = [*job(*TRAIN), "--data", str(small), "--run", str(tmp_path / "run"), "--workers", "1", "--epochs", "4000"]
    process = subprocess.Popen(
        words, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stdout
        assert any(line.startswith("epoch 1/") for line in process.stdout)
        assert [p for p in descendants(env) if "raylet" in p], "the mark finds what it is to find"
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == 130
    assert output.endswith("interrupted\n")
    assert "Traceback" not in output
    until(lambda: not descendants(env), f"left running: {descendants(env)}", 20)
    assert_whole(tmp_path / "run")


def test_a_search_without_authentication(tree, tmp_path):
    made, out = tmp_path / "made", tmp_path / "out"
    prepare = " ".join(job("prepare", "synthetic", "--users", "40", "--out", str(made)))
    search = f"{sys.executable} -m tune.search bias --data {made} --trials 3 --out"
    with head(tmp_path, RAY_AUTH_MODE="disabled") as running:
        status, output = running.submit(tree, "sh", "-c", f"{prepare} && {search} {out}; {search} here")
    assert status == 1, output
    assert "bias: best validation mae" in output
    assert "Traceback" not in output
    assert (out / "bias" / "best.yaml").exists()
    assert sorted(p.name for p in (out / "bias").glob("*/run.json")) != []
    assert [line for line in output.splitlines() if line.startswith("error: --out here") and "absolute" in line]
