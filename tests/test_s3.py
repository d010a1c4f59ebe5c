"""Commands where an object store keeps the data: prepare, train (killed, started again), evaluate, export, search."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import s3server
import yaml

from distmeta import cli
from distmeta.commands import search_journal, search_study
from distmeta.errors import RunError, Unreachable, UserError
from distmeta.parallel import claim, rundir
from distmeta.storage import Location

FLAGS = ["--batch-size", "16", "--threads", "1", "--epochs", "9", "--patience", "0"]


@pytest.fixture(scope="module")
def server() -> Iterator[s3server.S3Server]:
    pytest.importorskip("moto", reason="needs the extra `test`")
    with s3server.serve() as found:
        yield found


@pytest.fixture
def store(server: s3server.S3Server, monkeypatch: pytest.MonkeyPatch) -> s3server.S3Server:
    """The server, which this process can reach."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life that are soon missed."""
    for name, seconds in (("BEAT_S", 0.05), ("SILENT_S", 0.4), ("SETTLE_S", 0.05)):
        monkeypatch.setattr(claim, name, seconds)


@pytest.fixture(scope="module")
def data(server: s3server.S3Server) -> str:
    """A synthetic dataset in the bucket. Shared: add task tables to it, change nothing."""
    with pytest.MonkeyPatch.context() as m:
        for name, value in server.env.items():
            m.setenv(name, value)
        assert cli.main(["prepare", "synthetic", "--users", "99", "--items", "60", "--out", "s3://bucket/small"]) == 0
    return "s3://bucket/small"


def copied(place: Location, to: Path) -> Path:
    """A folder of the bucket on this machine."""
    for name in place.below():
        if not (place / name).is_dir():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((place / name).read_bytes())
    return to


def test_a_run_in_a_bucket_is_one_on_a_disk(store, data, quick, tmp_path, capsys):
    """Killed in the middle and started again by the same command, it ends in the same files; then what comes after."""
    argv = ["train", "cmml-linear", *FLAGS, "--no-floors", "--retried"]
    disk, run = copied(Location.of(data), tmp_path / "small"), Location.of("s3://bucket/runs/a")
    assert cli.main([*argv, "--data", str(disk), "--run", str(tmp_path / "run")]) == 0
    there = [*argv, "--data", data, "--run", str(run)]
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.train", *there[1:]], stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while sum(r.startswith("PUT") and r.endswith("a/metrics.jsonl") for r in store.requests()) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert not rundir.finished(run)
    before = len(store.requests())
    assert cli.main(there) == 0
    said = capsys.readouterr().out
    assert "going on from step" in said
    assert f"taking over from process {process.pid}" in said
    asked = [r for r in store.requests()[before:] if "/tasks/" in r and "/train/" in r]
    assert len(asked) <= 3 * 16, "what fits into memory is read once, not once an epoch"
    found = copied(run, tmp_path / "copy")
    checkpoints = sorted(f.relative_to(found) for f in found.rglob("*.safetensors"))
    assert len(checkpoints) >= 4
    for file in (*checkpoints, Path("evaluation.json")):
        assert (found / file).read_bytes() == (tmp_path / "run" / file).read_bytes(), file
    assert not (run / ".lock").exists()
    assert cli.main(there) == 0
    assert "was finished already" in capsys.readouterr().out
    assert cli.main(["export", "--run", str(run), "--out", "s3://bucket/exports/linear.pt2"]) == 0
    assert (Location.of("s3://bucket/exports") / "linear.pt2.json").read_json()
    (run / "report.html").remove()
    assert cli.main(["evaluate", "--run", str(run)]) == 0
    assert (run / "report.html").exists()


def test_raw_files_and_a_config_in_a_bucket(store, tmp_path):
    """MovieLens' own layout: the same dataset as from a disk; and a run that a YAML in the bucket describes."""
    ratings = [f"{u}::{i}::{1 + (u * i) % 5}::{978300000 + 60 * i}" for u in range(1, 9) for i in range(1, 13)]
    files = {
        "ratings.dat": ratings,
        "users.dat": [f"{u}::{'FM'[u % 2]}::{18 + u}::{u}::{10000 + u}" for u in range(1, 9)],
        "movies.dat": [f"{i}::Film {i} ({1980 + i})::{'Drama|Comedy' if i % 2 else 'Action'}" for i in range(1, 13)],
    }
    raw = Location.of("s3://bucket/raw files")
    for name, lines in files.items():
        text = "".join(f"{line}\n" for line in lines).encode("latin-1")
        (tmp_path / name).write_bytes(text)
        (raw / name).write_bytes(text)
    for place, out in ((tmp_path, tmp_path / "out"), (raw, "s3://bucket/ml")):
        assert cli.main(["prepare", "movielens-1m", "--raw", str(place), "--out", str(out)]) == 0
    made = copied(Location.of("s3://bucket/ml"), tmp_path / "copy")
    for file in (f for f in (tmp_path / "out").rglob("*") if f.is_file()):
        assert (made / file.relative_to(tmp_path / "out")).read_bytes() == file.read_bytes()
    settings = {"method": "itemmean", "data": {"data": "s3://bucket/ml"}, "train": {"floors": False, "threads": 1}}
    Location.of("s3://bucket/job.yaml").write_bytes(yaml.safe_dump(settings).encode())
    assert cli.main(["train", "--config", "s3://bucket/job.yaml", "--run", "s3://bucket/runs/ml"]) == 0
    assert cli.main(["prepare", "synthetic", "--out", "s3://bucket/raw%20files"]) == 2


def test_a_uri_keeps_what_it_says(store, data, monkeypatch):
    """The way to the server stands in the URI: a run's own config.yaml is enough to open it again, with no endpoint in
    the environment; and who unpickles a place opens it anew."""
    query = f"?endpoint_override={store.endpoint.removeprefix('http://')}&scheme=http"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    run = Location.of(f"s3://bucket/runs/a place é{query}")
    again = ["train", "itemmean", "--data", data + query, "--run", str(run), "--no-floors", "--threads", "1"]
    assert cli.main(again) == 0
    kept = rundir.stored(run)
    assert Location.of(kept.train.run) == run
    assert kept.data.data == data + query
    assert cli.main(["train", "--run", kept.train.run, "--resume"]) == 0
    child = pickle.loads(pickle.dumps(run / "checkpoints"))
    assert child == run / "checkpoints"
    assert child.parent == run
    assert [c for c in run.children() if c.name == "checkpoints"] == [child]
    assert child.children()


def test_a_search_goes_on_from_its_journal(store, monkeypatch):
    """A study in parts is the one in a file, also after many of them became one, and a kill in between."""
    monkeypatch.setattr(search_journal, "MOST", 5)
    out = Location.of("s3://bucket/searches/a")
    for launch in range(3):
        study = search_study.opened(out, "melu", "random", 3, [])
        assert len(study.trials) == 2 * launch
        for n in range(2):
            trial = study.ask()
            trial.suggest_float("lr", 1e-3, 1e-1)
            trial.report(0.5, 1)
            study.tell(trial, float(launch + n))
        if launch == 1:  # killed when the merged part was there, and those in it not yet deleted
            folder = out / "journal"
            first = json.dumps(next(iter(search_journal.PartsJournal(folder).read_logs(0))))
            (folder / "000000000-000000001.jsonl").write_bytes(f"{first}\n".encode())
    assert [t.value for t in search_study.opened(out, "melu", "random", 3, []).trials] == [0, 1, 1, 2, 2, 3]
    parts = [c for c in (out / "journal").children() if c.name.endswith(".jsonl")]
    assert len(parts) <= 7
    assert optuna.load_study(study_name="melu", storage=study._storage).best_value == 0
    for part in parts:
        part.write_bytes(b"{\n")
    with pytest.raises(UserError, match=r"journal/0.*jsonl: is damaged .*; start a new search"):
        search_study.opened(out, "melu", "random", 3, [])


def test_one_driver_at_a_time(store, quick, monkeypatch):
    """While one gives signs of life no other begins; a silent one is taken over from, and learns of it."""
    run = Location.of("s3://bucket/runs/driven")
    said: list[str] = []
    monkeypatch.setattr(claim, "_ended", lambda owner: False)  # as on another machine
    with rundir.lock(run):
        with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} on"), rundir.lock(run):
            pass
        assert (run / ".lock").exists()
    assert not (run / ".lock").exists()
    gone = claim.Claim(run / ".lock")
    gone.write()
    with rundir.lock(run, said.append) as check:
        check()
        gone.write()  # it was only away
        time.sleep(1.0)
        with pytest.raises(RunError, match="another process took this run over"):
            check()
    assert [line.split(": ")[1][:11] for line in said] == ["was driven ", "taking over"]
    assert (run / ".lock").read_json()["name"] == gone.mine["name"]


SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--data", "s3://nobucket/x"], "s3://nobucket/x: there is no bucket nobucket; make it"),
        (["--data", "s3://bucket/x"], "s3://bucket/x: no dataset here (dataset.json is missing)"),
        (["--data", "s3://"], "has no bucket; write it like s3://bucket/folder"),
        (["--data", "s3a://bucket/x"], "s3a://bucket/x: cannot be opened (Unrecognized filesystem type"),
        (["--data", f"s3://AKIA:{SECRET}@bucket/x"], "s3://…@bucket/x: a URI with keys in it"),
        (["--data", f"s3://bucket/x?secret_key={SECRET}"], "s3://bucket/x: cannot be opened (Unexpected query"),
        (["--run", "s3://bucket/x?endpoint_override=http%3A//127.0.0.1%3A9"], "A9: the object store does not answer"),
        (["--config", "s3://nobucket/a.yaml"], "there is no bucket nobucket"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_is_a_sentence(store, argv, sentence, capsys):
    assert cli.main(["train", "itemmean", *argv]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert SECRET not in error


def test_a_server_that_is_gone_or_refuses(store, data, monkeypatch, capsys, tmp_path):
    """Before the command has begun, and when it is under way."""
    run = Location.of("s3://bucket/runs/refused")
    try:
        store.call("POST", "/moto-api/reset-auth", b"0")  # from now on keys are looked at
        with pytest.raises(
            UserError, match=r"runs/refused/x: access is refused \(INVALID_ACCESS_KEY_ID\); set AWS_ACC"
        ):
            (run / "x").write_bytes(b"1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
        assert cli.main(["evaluate", "--run", str(run)]) == 2
        error = capsys.readouterr().err
        assert "runs/refused: access is refused (INVALID_ACCESS_KEY_ID); set AWS_ACCESS_KEY_ID" in error
        assert cli.main(["prepare", "synthetic", "--out", "s3://bucket/new"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    finally:
        store.call("POST", "/moto-api/reset-auth", b"inf")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"at http://127.0.0.1:9 does not answer .*then run the command again"):
        Location.of(str(run))


def test_a_node_that_does_not_see_the_tasks_says_so(store, data):
    """Not that they are damaged and to be deleted; and one without keys is told so, not that it cannot unpickle."""
    from distmeta.data import tasktable
    from distmeta.parallel import delivery

    table = tasktable.make(Location.of(data), "cmml-user", 0, {})
    elsewhere = replace(table, location=Location.of("/mnt/elsewhere/tasks"))
    parts = [delivery.Part("train", 0), delivery.Part("train", 0, [0])]
    for part in parts:
        assert sum(map(len, delivery._reader(table, part, table.columns())())) == table.sizes("train")[0]
        with pytest.raises(UserError, match=r"/mnt/elsewhere/tasks: the node .* does not see this task table; put the"):
            list(delivery._reader(elsewhere, part, table.columns())())
    sent = pickle.dumps(table)
    try:
        store.call("POST", "/moto-api/reset-auth", b"0")
        with pytest.raises(OSError) as caught:
            pickle.loads(sent).read("train")
    finally:
        store.call("POST", "/moto-api/reset-auth", b"inf")
    assert "access is refused" in str(delivery.sentence(caught.value))
