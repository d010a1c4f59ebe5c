"""The training loop against a plain one, split over workers, stopped anywhere and gone on with."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from distmeta import config as config_module
from distmeta.data.loader import read_items
from distmeta.data.schema import Dataset, Field, Label
from distmeta.errors import RunError, UserError
from distmeta.exchange import Exchange
from distmeta.parallel import checkpoint, trainer
from distmeta.parallel.progress import Progress, clock, number
from distmeta.parallel.timing import PHASES
from distmeta.parallel.update import MetaUpdate, build_method
from distmeta.parallel.validation import read_metrics, validate
from distmeta.storage import Location

DATASET = Dataset("none", Label("rating", 1, 5), (), (Field("a", "categorical", 2),), 0, 20, 0)
TIMES = {"seconds", "tasks_per_s", "wait_s", "cpu_s", *(f"{p}_s" for p in PHASES)}
WORKERS = {"world", "skew", "exchange_wait_s", "step_ms", "mean_s"}


def run_of(where: Path, small: Location, method: str, log: Any = lambda _: None, **flags: Any) -> trainer.Outcome:
    """Train into `where`, or go on with what is there."""
    config, dataset, table = tiny.setting(small, method, **flags)
    return trainer.train(config, Location.of(where).make_dir(), dataset, small, table, log=log)


def digests(run: Path) -> dict[str, str]:
    """sha256 of every tensor file of a run."""
    return {
        str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(run.rglob("*.safetensors"))
    }


def lines(run: Path) -> list[dict[str, Any]]:
    """The run's metrics but for the times and the workers."""
    return [{k: v for k, v in row.items() if k not in TIMES | WORKERS} for row in read_metrics(Location.of(run))]


def fresh_tiny() -> tiny.Tiny:
    torch.manual_seed(3)
    return tiny.Tiny(tiny.TinyOptions(), DATASET, {}).double()


def options(**flags: Any) -> config_module.TrainOptions:
    return config_module.build(config_module.TrainOptions, flags, "test")


# ---- one update


def test_update_is_the_textbook_one():
    """Mean loss over the tasks, clipped by norm, torch's own AdamW along a cosine: float64, 5 steps."""
    o = options(lr=0.1, lr_decay=0.2, weight_decay=0.01, clip=0.5, epochs=5)
    method, plain = fresh_tiny(), fresh_tiny()
    update = MetaUpdate(method, o, Exchange(), steps=1)
    theirs = torch.optim.AdamW(plain.parameters(), lr=o.lr, weight_decay=o.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=5, eta_min=o.lr * o.lr_decay)
    clipped = 0
    for step in range(5):
        batch = tiny.batch(9, seed=step).to("cpu", torch.float64)
        update.local(batch)
        loss, count = update.apply(batch, step)
        mean = plain.loss(batch).mean()
        theirs.zero_grad()
        mean.backward()
        plain.unused.grad = torch.zeros(2, dtype=torch.float64)  # the trainer's zero: weight decay applies
        norm = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm().item()
        if norm > o.clip:  # torch.nn.utils.clip_grad_norm_ divides by the norm + 1e-6
            clipped += 1
            for p in plain.parameters():
                p.grad = None if p.grad is None else p.grad * (o.clip / norm)
        theirs.step()
        schedule.step()
        assert loss / count == pytest.approx(mean.item(), rel=1e-12)
        for (name, a), b in zip(method.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    assert clipped, "no gradient was clipped: the test shows too little"


def test_rate_runs_along_a_cosine():
    update = MetaUpdate(fresh_tiny(), options(lr=2.0, lr_decay=0.5, epochs=4), Exchange(), steps=5)
    assert [update.rate(s) for s in (0, 10, 20)] == pytest.approx([2.0, 1.5, 1.0])
    constant = MetaUpdate(fresh_tiny(), options(lr=2.0, epochs=4), Exchange(), steps=5)
    assert {constant.rate(s) for s in range(20)} == {2.0}


@pytest.mark.parametrize("parts", [(4, 5), (9, 0), (1, 8)])
def test_two_halves_are_one_whole(parts):
    """Workers' buffers add up to the update of the whole batch; one without tasks adds zeros. float64, 1e-12."""
    o = options(lr=0.1, clip=0.5)
    whole, *workers = (MetaUpdate(fresh_tiny(), o, Exchange(), steps=3) for _ in range(3))
    for step in range(3):
        batch = tiny.batch(9, seed=step).to("cpu", torch.float64)
        (block,) = batch.blocks
        whole.local(batch)
        expected = whole.apply(batch, step)
        halves = []
        for worker, keep in zip(workers, (slice(0, parts[0]), slice(parts[0], 9)), strict=True):
            sides = [type(s)(s.item[keep], s.label[keep], s.mask[keep]) for s in (block.support, block.query)]
            mine = type(block)(block.task[keep], {}, *sides)
            halves.append(type(batch)(batch.items, (mine,) if len(mine.task) else ()))
            worker.local(halves[-1])
        total = sum((w.flat for w in workers), torch.zeros(()))
        for worker, half in zip(workers, halves, strict=True):
            worker.flat.copy_(total)
            assert worker.apply(half, step) == pytest.approx(expected, rel=1e-12)
    for worker in workers:
        for a, b in zip(worker.params.values(), whole.params.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_task_anywhere_changes_nothing():
    method = fresh_tiny()
    update = MetaUpdate(method, options(lr=0.1, weight_decay=0.5), Exchange(), steps=1)
    before = {n: p.clone() for n, p in method.named_parameters()}
    update.local(tiny.batch(0, 0))
    assert update.apply(tiny.batch(0, 0), 0) == (0.0, 0.0)
    for n, p in method.named_parameters():
        assert torch.equal(p, before[n])


# ---- whole runs


@pytest.mark.parametrize("method", ["melu", "bias", "als"])
def test_two_workers_train_what_one_trains(tmp_path, small, method):
    run_of(tmp_path / "one", small, method, epochs=2)
    config, dataset, table = tiny.setting(small, method, epochs=2)
    run = Location.of(tmp_path / "two").make_dir()
    said: dict[int, list[str]] = {0: [], 1: []}
    done = tiny.together(
        2, lambda exchange: trainer.train(config, run, dataset, small, table, exchange, said[exchange.rank].append)
    )
    assert dataclasses.replace(done[0].result(), seconds=0) == dataclasses.replace(done[1].result(), seconds=0)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert {k: v for k, v in a.items() if v is not None} == pytest.approx(
            {k: v for k, v in b.items() if v is not None}, rel=1e-5
        )
    assert said[0]
    assert not said[1], "only the driver speaks"


def test_same_seed_same_bits_other_seed_others(tmp_path, small):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_of(tmp_path / name, small, "melu", epochs=2, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert digests(tmp_path / "a").keys() == digests(tmp_path / "c").keys()
    assert lines(tmp_path / "a")[0]["train_loss"] != lines(tmp_path / "c")[0]["train_loss"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 4, 9, 13, 20])
@pytest.mark.parametrize("method", ["melu", "tiny"])
def test_stopped_anywhere_and_gone_on_with_ends_the_same(tmp_path, small, monkeypatch, method, stop):
    """9 updates an epoch, checkpoints every 4 and at epochs' ends: stops before, at and between them."""
    tiny.register(monkeypatch)
    flags = {"epochs": 3, "checkpoint_steps": 4, "lr_decay": 0.3}
    run_of(tmp_path / "whole", small, method, **flags)
    apply = MetaUpdate.apply

    def stopping(self: MetaUpdate, batch: Any, step: int) -> tuple[float, float]:
        if step == stop:
            raise Stop
        return apply(self, batch, step)

    with monkeypatch.context() as m:
        m.setattr(MetaUpdate, "apply", stopping)
        with pytest.raises(Stop):
            run_of(tmp_path / "parts", small, method, **flags)
    outcome = run_of(tmp_path / "parts", small, method, **flags)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert outcome.steps == lines(tmp_path / "whole")[-1]["step"] > 20


def test_a_line_written_before_its_checkpoint_is_not_doubled(tmp_path, small, monkeypatch):
    """Killed between the epoch's line and its checkpoint, the epoch is done again and keeps one line."""

    def killed(*_: Any, **__: Any) -> None:
        raise Stop

    run_of(tmp_path / "parts", small, "melu", epochs=1)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save", killed)
        with pytest.raises(Stop):
            run_of(tmp_path / "parts", small, "melu", epochs=2)
    assert len(lines(tmp_path / "parts")) == 2
    run_of(tmp_path / "parts", small, "melu", epochs=2)
    run_of(tmp_path / "whole", small, "melu", epochs=2)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_patience_best_and_retention(tmp_path, small, monkeypatch):
    """The best epoch's checkpoint outlives the last two; patience counts epochs without a better error."""
    errors = iter([0.9, 0.5, 0.6, 0.5, 0.7, 0.1, 0.2, 0.2, 0.2, 0.2])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(errors), 1.0))
    outcome = run_of(tmp_path / "run", small, "melu", epochs=10, patience=3)
    steps = outcome.steps // 5
    assert (outcome.ended, outcome.epochs, outcome.best_step, outcome.best_mae) == ("patience", 5, 2 * steps, 0.5)
    assert checkpoint.complete(Location.of(tmp_path / "run")) == [2 * steps, 4 * steps, 5 * steps]
    more = run_of(tmp_path / "run", small, "melu", epochs=10, patience=4)
    assert (more.ended, more.epochs, more.best_step, more.best_mae) == ("patience", 10, 6 * steps, 0.1)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_names_epoch_step_and_task(tmp_path, small, monkeypatch, what):
    fresh = tiny.register(monkeypatch)
    run_of(tmp_path / "run", small, "tiny", epochs=1)
    before = digests(tmp_path / "run")
    _, dataset, table = tiny.setting(small, "tiny")
    poisoned = int(trainer.Loader(table, dataset, "train", 16).tasks()["task"][5])
    fresh.poison = (poisoned, what)
    with pytest.raises(RunError) as e:
        run_of(tmp_path / "run", small, "tiny", epochs=3)
    step = before and checkpoint.complete(Location.of(tmp_path / "run"))[-1]
    for words in ("epoch 2, step ", f"the {what} of task {poisoned} is not finite", f"step {step} is kept", "--lr"):
        assert words in str(e.value)
    assert digests(tmp_path / "run") == before
    assert len(lines(tmp_path / "run")) == 1


def test_not_finite_validation_ends_the_run(tmp_path, small, monkeypatch):
    monkeypatch.setattr(trainer, "validate", lambda *_: (math.nan, math.nan))
    with pytest.raises(RunError, match="epoch 1: predictions for the validation tasks are not finite"):
        run_of(tmp_path / "run", small, "melu", epochs=3)
    assert checkpoint.complete(Location.of(tmp_path / "run")) == []


def test_validation_is_the_mean_over_tasks_of_clipped_errors():
    """Against plain Python, with padding and predictions outside of the scale."""
    method = fresh_tiny().float()
    with torch.no_grad():
        method.offset.fill_(3.0)
    batches = [tiny.batch(5, 1), tiny.batch(3, 2, first=5), tiny.batch(0, 3)]
    maes, mses = [], []
    for b in batches:
        for block, scores in zip(b, method.predict(method.adapt(b), b), strict=True):
            for row, label, mask in zip(scores.tolist(), block.query.label.tolist(), block.query.mask, strict=True):
                e = [min(max(s, 1), 5) - y for s, y, m in zip(row, label, mask.tolist(), strict=True) if m]
                maes.append(sum(map(abs, e)) / len(e))
                mses.append(sum(x * x for x in e) / len(e))
    found = validate(method, batches, DATASET.label, Exchange(), torch.device("cpu"))
    assert found == pytest.approx((sum(maes) / 8, sum(mses) / 8), rel=1e-6)
    assert all(map(math.isnan, validate(method, [], DATASET.label, Exchange(), torch.device("cpu"))))


def test_gpu_where_there_is_none(tmp_path, small):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="--gpu: torch sees no GPU"):
        run_of(tmp_path, small, "melu", gpu=True)


def test_training_leaves_torch_as_it_was(tmp_path, small):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    run_of(tmp_path, small, "melu", epochs=1, threads=2)
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_metrics_line_says_what_the_format_promises(tmp_path, small):
    run_of(tmp_path, small, "melu", epochs=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows] == [1, 2]
    wanted = {"epoch", "step", "train_loss", "valid_mae", "valid_mse", "lr", *TIMES, *WORKERS}
    for row in rows:
        assert set(row) == wanted
        assert row["world"] == 1
        assert row["exchange_wait_s"] == 0.0
        assert set(row["step_ms"]) == {"input", "adapt", "backward", "exchange", "optimizer", "checkpoint"}
        assert all(0 <= a <= b <= c for a, b, c in row["step_ms"].values())
        numbers = [*(row[k] for k in wanted - {"step_ms", "skew", "mean_s"}), *row["skew"], *row["mean_s"].values()]
        numbers += [ms for three in row["step_ms"].values() for ms in three]
        assert all(isinstance(v, int | float) and math.isfinite(v) for v in numbers)
        busy = sum(row[f"{p}_s"] for p in ("input", "adapt", "backward", "optimizer"))
        assert row["skew"] == pytest.approx([busy], rel=0.02, abs=1e-3)  # but for finding that there is no more batch


# ---- the screen


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_rewritten_on_a_terminal_and_plain_in_a_file(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for stream, expected in ((Screen(), 10), (io.StringIO(), 0)):
        said: list[str] = []
        now[0] = 0.0
        progress = Progress(said.append, stream)
        for _ in range(200):
            now[0] += 0.1
            progress.within(lambda: "half way")
        assert stream.getvalue().count("\rhalf way") == pytest.approx(expected, abs=1)
        assert said == []
        progress.line("epoch 1")
        assert said == ["epoch 1"]
    with contextlib.redirect_stdout(io.StringIO()):
        now[0] += 61
        progress.within(lambda: "still there")
    assert said == ["epoch 1", "still there"]


def test_numbers_and_clocks():
    assert [number(x) for x in (0.8124, 1.2345, -0.25, 0.9996, 0.0)] == [".812", "1.234", "-.250", "1.000", ".000"]
    assert [clock(s) for s in (0, 42, 61, 3723)] == ["0:00", "0:42", "1:01", "1:02:03"]


# ---- fields


def test_a_method_does_not_know_the_fields_left_out(small):
    config, dataset, _ = tiny.setting(small, "melu", leave_out=("region",))
    method: Any = build_method(config, dataset, read_items(small, dataset), torch.device("cpu"))
    known = {f.name for f in (*dataset.user_fields, *dataset.item_fields)}
    assert {*method.embedding.user_names, *method.embedding.item_names} == known - {"region"} < known
    config, *_ = tiny.setting(small, "melu", leave_out=("regin",))
    with pytest.raises(UserError, match=r"--leave-out regin: .* has no such field \(did you mean region\?\)"):
        build_method(config, dataset, read_items(small, dataset), torch.device("cpu"))
