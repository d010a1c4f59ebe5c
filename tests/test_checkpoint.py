"""Checkpoints: what is saved comes back; whatever is broken is named, with the mend, and nothing else is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from distmeta.errors import RunError, UserError
from distmeta.parallel import checkpoint, rundir, trainer
from distmeta.parallel.validation import read_metrics
from distmeta.storage import Location, writing


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small) -> Path:
    """A run of melu with several complete checkpoints; to be copied, not changed."""
    where = tmp_path_factory.mktemp("trained") / "run"
    config, dataset, table = tiny.setting(small, "melu", epochs=2, checkpoint_steps=4)
    trainer.train(config, Location.of(where).make_dir(), dataset, small, table, log=lambda _: None)
    return where


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def go_on(run: Path, small: Location, epochs: int = 3, method: str = "melu", **flags: Any) -> trainer.Outcome:
    config, dataset, table = tiny.setting(small, method, epochs=epochs, checkpoint_steps=4, **flags)
    return trainer.train(config, Location.of(run), dataset, small, table, log=lambda _: None)


def newest_folder(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the manifest as one does who knows its digest."""
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest |= changes
    manifest.pop("sha256")
    manifest["sha256"] = checkpoint._digest(manifest)
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


def replace_tensors(folder: Path, part: str, change: Any) -> None:
    """Write other tensors, their checksum right."""
    run, step = Location.of(folder.parent.parent), int(folder.name[5:])
    found = checkpoint.read(run, step)
    tensors = {p: checkpoint.load(run, found, p) for p in ("params", "optimizer")}
    change(tensors[part])
    checkpoint.save(
        run, tensors, method=found.method, step=step, cursor=found.cursor, progress=found.progress,
        config=found.config, split_hash=found.split_hash,
    )  # fmt: skip


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


PARAMS, MOMENTS, MANIFEST = "params-00000.safetensors", "optimizer-00000.safetensors", "checkpoint.json"


def test_what_is_saved_comes_back(tmp_path):
    where = Location.of(tmp_path)
    tensors = {"a.weight": torch.randn(3, 4).t(), "b": torch.tensor(2.5, dtype=torch.float64), "c": torch.zeros(0, 2)}
    progress = {"best": 0.1 + 0.2, "loss": 1e-300, "best_step": None}
    given = {
        "method": "x",
        "cursor": {"epoch": 1, "batch": 2},
        "progress": progress,
        "config": {"a": [1]},
        "split_hash": "s",
    }
    checkpoint.save(where, {"params": tensors}, step=7, **given)
    found = checkpoint.newest(where)
    assert found is not None
    assert {k: getattr(found, k) for k in given} == given
    loaded = checkpoint.load(where, found, "params")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert checkpoint.newest(Location.of(tmp_path / "nothing")) is None


def test_no_pickle_in_a_run(run):
    names = {f.name.rpartition(".")[2] for f in run.rglob("*") if f.is_file()}
    assert names == {"safetensors", "json", "jsonl"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda f: flip(f / PARAMS, -1), [PARAMS, "damaged", "sha256"]),
        (lambda f: flip(f / MOMENTS, 20), [MOMENTS, "damaged"]),
        (lambda f: (f / PARAMS).write_bytes((f / PARAMS).read_bytes()[:100]), [PARAMS, "damaged"]),
        (lambda f: (f / PARAMS).write_bytes(b""), [PARAMS, "damaged"]),
        (lambda f: (f / MOMENTS).unlink(), [MOMENTS, "missing"]),
        (lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:200]), [MANIFEST, "damaged"]),
        (lambda f: (f / MANIFEST).write_text(""), [MANIFEST, "damaged"]),
        (lambda f: (f / MANIFEST).write_text("[1]"), [MANIFEST, "damaged"]),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), [MANIFEST, "damaged"]),
        (
            lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"epoch": 2', '"epoch": 1')),
            [MANIFEST, "damaged"],
        ),
        (lambda f: rewrite(f, step=1), [MANIFEST, "damaged"]),
        (lambda f: rewrite(f, cursor=[1]), [MANIFEST, "damaged (no cursor"]),
        (lambda f: folder_instead(f / PARAMS), [PARAMS, "not a readable file"]),
    ],
    ids=["params bit", "moments bit", "cut", "empty", "gone", "manifest cut", "manifest empty", "list", "bytes",
         "edited", "other step", "list for a mapping", "folder"],
)  # fmt: skip
def test_damage_is_named_and_the_mend_works(run, small, fault, words):
    """The sentence names the file and which folder to delete; done so, the run goes on from the older step."""
    folder = newest_folder(run)
    older = checkpoint.complete(Location.of(run))[-2]
    fault(folder)
    kept = {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and folder not in f.parents}
    with pytest.raises(UserError) as e:
        go_on(run, small)
    for word in [*words, f"delete that folder ({folder}) to go on from step {older}"]:
        assert word in str(e.value)
    assert {f: f.read_bytes() for f in kept} == kept, "nothing else was touched"
    shutil.rmtree(folder)
    assert go_on(run, small).epochs == 3


def folder_instead(file):
    file.unlink()
    file.mkdir()


def test_the_only_checkpoint_damaged(run, small):
    for folder in sorted((run / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(folder)
    flip(newest_folder(run) / PARAMS, -1)
    with pytest.raises(UserError, match="to start from the beginning"):
        go_on(run, small)


def test_one_without_manifest_does_not_count_and_is_swept_up(run, small):
    steps = checkpoint.complete(Location.of(run))
    (newest_folder(run) / MANIFEST).unlink()
    assert checkpoint.complete(Location.of(run)) == steps[:-1]
    half = run / "checkpoints" / "step-000000999"
    half.mkdir()
    (half / PARAMS).write_bytes(b"half")
    assert go_on(run, small).epochs == 3
    assert not half.exists()
    assert all((f / MANIFEST).exists() for f in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda f: rewrite(f, format=99), ["format version 99", "reads 1"]),
        (lambda f: rewrite(f, method="metacs"), ["holds metacs, not melu"]),
        (lambda f: rewrite(f, split_hash="0" * 64), ["another split", "--data"]),
        (lambda f: rewrite(f, cursor={"epoch": 1}), ["cursor or progress is of another distmeta (batch)"]),
        (lambda f: rewrite(f, progress={"mood": 1}), ["cursor or progress is of another distmeta", "mood"]),
        (lambda f: rewrite(f, progress={"phases": {"compute": 1.0}}), ["progress is of another distmeta (adapt)"]),
        (lambda f: rewrite(f, config={"train.lr": 0.25}), ["config.yaml: train.lr is 0.002", "trained with 0.25"]),
        (lambda f: replace_tensors(f, "params", lambda t: t.pop("log_rate")), ["no tensor log_rate"]),
        (lambda f: replace_tensors(f, "params", lambda t: t.update(x=torch.ones(1))), ["tensor x is unknown"]),
        (
            lambda f: replace_tensors(f, "params", lambda t: t.update(log_rate=torch.ones(9))),
            ["tensor log_rate is torch.float32 [9], not torch.float32 [3]"],
        ),
        (
            lambda f: replace_tensors(f, "params", lambda t: t.update(log_rate=t["log_rate"].double())),
            ["tensor log_rate is torch.float64"],
        ),
        (
            lambda f: replace_tensors(f, "optimizer", lambda t: t.pop("log_rate.exp_avg")),
            ["no tensor log_rate.exp_avg"],
        ),
    ],
    ids=["format", "method", "split", "cursor", "progress", "phases", "config", "missing", "unknown", "shape",
         "dtype", "moment"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(run, small, fault, words):
    fault(newest_folder(run))
    with pytest.raises(UserError) as e:
        go_on(run, small)
    assert "\n" not in str(e.value)
    assert [w for w in words if w not in str(e.value)] == [], str(e.value)


def test_a_step_that_is_not_there(run):
    with pytest.raises(UserError, match=r"step-000012345.*no such checkpoint; complete are the steps \["):
        checkpoint.read(Location.of(run), 12345)


def test_damaged_metrics_are_named(run, small):
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON; delete that line"):
        go_on(run, small)


@pytest.mark.parametrize("kth", range(1, 12))
def test_full_disk_keeps_the_checkpoint_before(tmp_path, trained, small, monkeypatch, kth):
    """Whichever write finds the disk full: a sentence, every complete checkpoint whole, and the resumed run equal."""
    run, write, count = tmp_path / "run", Location.write_bytes, 0
    run.mkdir()

    def full(self: Location, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == kth:
            with writing(self):
                raise OSError(28, "No space left on device")
        write(self, data)

    with monkeypatch.context() as m:
        m.setattr(Location, "write_bytes", full)
        with pytest.raises(RunError, match=r"no space left on the device; .*--resume"):
            go_on(run, small, epochs=2)
    where = Location.of(run)
    for step in checkpoint.complete(where):
        found = checkpoint.read(where, step)
        for part in ("params", "optimizer"):
            checkpoint.load(where, found, part)
    assert not list(run.rglob("*.tmp-*"))
    go_on(run, small, epochs=2)
    tensors = {f.relative_to(trained): f.read_bytes() for f in trained.rglob("*.safetensors")}
    assert {f.relative_to(run): f.read_bytes() for f in run.rglob("*.safetensors")} == tensors


def test_a_finished_run_is_not_trained_again(run, small):
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    outcome = go_on(run, small, epochs=2)
    assert outcome.epochs == 2
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before
    assert len(read_metrics(Location.of(run))) == 2


# ---- who may drive a run


def test_lock_is_held_named_and_left(tmp_path):
    where = Location.of(tmp_path)
    said: list[str] = []
    second = rundir.lock(where, said.append)
    with (
        rundir.lock(where, said.append),
        pytest.raises(UserError, match=r"is being trained by process \d+ on \S+; wait, end it, or"),
    ):
        second.__enter__()
    with rundir.lock(where, said.append):
        assert said == []


def test_lock_of_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 4194305, "host": "gone"}')
    said: list[str] = []
    with rundir.lock(Location.of(tmp_path), said.append):
        assert "taking over from process 4194305 on gone" in said[0]
        assert json.loads((tmp_path / ".lock").read_text())["pid"] != 4194305


def test_new_run_wants_an_empty_place(tmp_path):
    rundir.check_new(Location.of(tmp_path / "nowhere"))
    rundir.check_new(Location.of(tmp_path))
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds other things \(thesis.tex\)"):
        rundir.check_new(Location.of(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        rundir.check_new(Location.of(tmp_path / "thesis.tex"))
    (tmp_path / "config.yaml").write_text("method: melu\n")
    with pytest.raises(UserError, match="add --resume"):
        rundir.check_new(Location.of(tmp_path))
    with pytest.raises(UserError, match="no run here"):
        rundir.stored(Location.of(tmp_path / "nowhere"))


def test_a_run_that_failed_before_it_kept_anything_is_no_obstacle(tmp_path):
    for name in (".lock", "config.yaml", "config.yaml.tmp-7"):
        (tmp_path / name).write_text("")
    rundir.check_new(Location.of(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="a run exists here; add --resume"):
        rundir.check_new(Location.of(tmp_path))


def test_the_default_place_stays_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = rundir.default("melu", "../my shop/2024")
    assert where.path.startswith(str(tmp_path / "runs" / "melu-..-my-shop-2024-"))
