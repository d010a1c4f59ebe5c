"""Training with a shared state: any number of workers, stopped, elastic, its server lost; assessment; bad input."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import digests, last, run_of

from distmeta.data.loader import Loader, read_items
from distmeta.errors import RunError, UserError
from distmeta.evaluation import evaluate as evaluation
from distmeta.exchange import Exchange
from distmeta.parallel import checkpoint, trainer
from distmeta.parallel.assessment import assess
from distmeta.parallel.shared import Servers
from distmeta.parallel.state import Server, StateError, StateLost
from distmeta.parallel.update import MetaUpdate, build_method
from distmeta.parallel.validation import read_metrics
from distmeta.storage import Location

NAME = "traces"


def by_key(state: dict[str, torch.Tensor]) -> dict[int, tuple[float, int]]:
    """What a part `state` of any number of shards remembers."""
    heads = sorted({name.rpartition(".")[0] for name in state})
    rows = (zip(*(state[f"{head}.{k}"].tolist() for k in ("key", "value", "count")), strict=True) for head in heads)
    return {k: (value, count) for each in rows for k, value, count in each}


@pytest.fixture
def remembering(monkeypatch) -> type[tiny.Tiny]:
    return tiny.register(monkeypatch, tiny.Remembering)


@pytest.fixture
def in_float64(monkeypatch) -> None:
    tiny.in_float64(monkeypatch)


@pytest.mark.usefixtures("remembering", "in_float64")
@pytest.mark.parametrize("more", [{}, {"staleness": 2}, {"state_shards": 2, "staleness": 1}], ids=str)
def test_any_number_of_workers_trains_the_same(tmp_path, small, more):
    """Invariant 2, float64 1e-9: without a server, by 1, 2, 3 and 5 workers, of whom some have no task at times."""
    flags: dict[str, Any] = {"epochs": 2, "batch_size": 6, **more}
    alone = run_of(tmp_path / "0", small, 0, **flags)
    assert alone.steps > 20
    wanted = last(tmp_path / "0")
    keys = by_key(wanted["state"])
    assert len(keys) == 11
    assert sum(count for _, count in keys.values()) == 2 * len(tasks_of(small))
    for world in (1, 2, 3, 5):
        shards = flags.get("state_shards", 1)
        run_of(tmp_path / str(world), small, world, Servers([Server(20) for _ in range(shards)]), **flags)
        found = last(tmp_path / str(world))
        for part in ("params", "optimizer"):
            torch.testing.assert_close(found[part], wanted[part], rtol=1e-9, atol=1e-9)
        assert by_key(found["state"]).keys() == keys.keys()
        for k, (value, count) in by_key(found["state"]).items():
            assert (value, count) == (pytest.approx(keys[k][0], rel=1e-9), keys[k][1])
        reports = [read_metrics(Location.of(tmp_path / n))[-1][NAME] for n in ("0", str(world))]
        assert reports[0] == reports[1]
    loaders = [Loader(*loaded(small), "train", 6, rank=r, world=5) for r in range(5)]
    assert not all(len(batch) for loader in loaders for batch in loader.epoch(0)), "every worker had tasks always"


def loaded(small: Location) -> tuple[Any, Any]:
    _, dataset, table = tiny.setting(small, "melu")
    return table, dataset


def tasks_of(small: Location) -> list[int]:
    return Loader(*loaded(small), "train", 6).tasks()["task"].to_list()


@pytest.mark.usefixtures("remembering", "in_float64")
def test_elastic(tmp_path, small):
    """Begun by two workers, gone on with by none but this process, then by three: float64 1e-9."""
    run_of(tmp_path / "whole", small, 1, epochs=4)
    for world, epochs in ((2, 1), (0, 2), (3, 4)):
        run_of(tmp_path / "parts", small, world, epochs=epochs)
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("remembering")
def test_what_is_remembered_counts(tmp_path, small, monkeypatch):
    """What the tests of whole runs stand on: without the memory's answers training ends elsewhere."""
    run_of(tmp_path / "with", small, 0, epochs=1)
    monkeypatch.setattr(tiny.Traces, "merge", lambda self, writes: None)
    run_of(tmp_path / "without", small, 0, epochs=1)
    a, b = (last(tmp_path / n)["params"]["weight"] for n in ("with", "without"))
    assert not torch.allclose(a, b, rtol=1e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 3, 6, 9, 13])
@pytest.mark.parametrize(("world", "flags"), [(0, {}), (2, {}), (2, {"staleness": 1, "state_shards": 2})], ids=str)
@pytest.mark.usefixtures("remembering")
def test_stopped_anywhere_and_gone_on_with_ends_the_same(tmp_path, small, monkeypatch, world, flags, stop):
    """9 updates an epoch, checkpoints every 4: the same bits, the part `state` included."""
    flags = {"epochs": 2, "checkpoint_steps": 4, **flags}
    shards = flags.get("state_shards", 1)
    run_of(tmp_path / "whole", small, world, Servers([Server(20) for _ in range(shards)]), **flags)
    apply = MetaUpdate.apply

    def stopping(self: MetaUpdate, batch: Any, step: int) -> tuple[float, float]:
        if step == stop:
            raise Stop
        return apply(self, batch, step)

    servers = Servers([Server(20) for _ in range(shards)])  # which the stopped group leaves behind
    with monkeypatch.context() as m:
        m.setattr(MetaUpdate, "apply", stopping)
        with pytest.raises(Stop):
            run_of(tmp_path / "parts", small, world, servers, **flags)
    run_of(tmp_path / "parts", small, world, servers, **flags)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert any("state-" in name for name in digests(tmp_path / "whole"))
    reports = [[row[NAME] for row in read_metrics(Location.of(tmp_path / n))] for n in ("parts", "whole")]
    assert reports[0] == reports[1]


class Mortal(Servers):
    """The server is started anew, empty, before the call number `death`."""

    def __init__(self, death: int) -> None:
        super().__init__([Server(20)])
        self.left, self.lock = death, threading.Lock()
        self.said: list[str] = []

    def begin(self, method: str, each: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        with self.lock:
            self.left -= 1
            if not self.left:
                dead, self.servers = self.servers, [Server(20)]
                for hosted in dead[0]._hosted.values():
                    hosted.close()  # who waits there meets its death at once
        try:
            return super().begin(method, each)
        except StateLost as e:
            self.said.append(str(e))
            raise


@pytest.mark.usefixtures("remembering")
@pytest.mark.parametrize("death", [11, 30, 45])
def test_a_lost_server_is_refilled(tmp_path, small, death):
    """The workers that meet it say which state was lost; the next group ends in the same bits."""
    flags: dict[str, Any] = {"epochs": 2, "checkpoint_steps": 4}
    run_of(tmp_path / "whole", small, 2, **flags)
    servers = Mortal(death)
    with pytest.raises(StateError):
        run_of(tmp_path / "parts", small, 2, servers, **flags)
    assert servers.said[0].startswith("the shared state traces was lost: its server")
    run_of(tmp_path / "parts", small, 2, servers, **flags)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


@pytest.mark.parametrize("world", [0, 2])
def test_not_finite_with_a_memory_ends_all_with_one_sentence(tmp_path, small, remembering, world):
    """One task a step: the other worker has none, reads nothing and must not be waited for."""
    poisoned = tasks_of(small)[3]
    remembering.poison = (poisoned, "gradient")
    with pytest.raises(RunError, match=f"the gradient of task {poisoned} is not finite"):
        run_of(tmp_path, small, world, Servers([Server(5)]), batch_size=1)


@pytest.mark.usefixtures("remembering")
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("shards", [1, 2])
def test_assessment_remembers_what_the_best_checkpoint_does(tmp_path, small, world, shards):
    config, dataset, table = tiny.setting(small, "tiny", epochs=1, state_shards=shards)
    run = Location.of(tmp_path)
    trainer.train(config, run, dataset, small, table, log=lambda _: None)
    done = tiny.together(world, lambda e: assess(config, run, dataset, small, table, e))
    method = build_method(config, dataset, read_items(small, dataset), torch.device("cpu"))
    found = checkpoint.newest(run)
    assert found
    checkpoint.restore_params(run, found, method, "tiny")
    forgetful = evaluation.evaluate(method, table, dataset).tasks["abs_sum"].to_numpy()
    method.shared[NAME].restore(
        {k.partition(".")[2]: v.numpy() for k, v in checkpoint.load(run, found, "state").items()}
    )
    wanted = evaluation.evaluate(method, table, dataset).tasks["abs_sum"].to_numpy()
    assert not np.allclose(forgetful, wanted, rtol=1e-3)
    for f in done:
        np.testing.assert_allclose(np.sort(f.result().method.tasks["abs_sum"].to_numpy()), np.sort(wanted), rtol=1e-6)


# ---- what cannot be


def test_a_checkpoint_of_a_method_without_memories_has_no_state(tmp_path, small, monkeypatch):
    tiny.register(monkeypatch)
    run_of(tmp_path, small, 0, epochs=1)
    assert {f.name for f in tmp_path.rglob("*.safetensors")} == {
        "params-00000.safetensors",
        "optimizer-00000.safetensors",
    }
    assert NAME not in read_metrics(Location.of(tmp_path))[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("traces.count"), "traces is not this method's \\(KeyError: 'count'\\)"),
        (lambda s: s.update({"traces.count": s["traces.count"][1:]}), "traces is not this method's \\(ValueError: "),
        (lambda s: s.update({"index.count": torch.zeros(2)}), "index is not this method's \\(KeyError: "),
        (lambda s: s.clear(), "traces is not this method's \\(KeyError: "),
    ],
    ids=["key", "length", "unknown", "none"],
)
@pytest.mark.usefixtures("remembering")
def test_a_state_that_is_not_this_methods_is_refused(tmp_path, small, change, said):
    run_of(tmp_path, small, 0, epochs=1)
    run = Location.of(tmp_path)
    found, parts = checkpoint.newest(run), last(tmp_path)
    assert found
    change(parts["state"])
    given = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name not in ("location", "files")}
    checkpoint.save(run, parts, **given)
    with pytest.raises(UserError, match=rf"step-\d+: its shared state {said}.*start a new run"):
        run_of(tmp_path, small, 0, epochs=2)


@pytest.mark.usefixtures("remembering")
def test_a_run_keeps_its_shards_and_its_staleness(tmp_path, small):
    run_of(tmp_path, small, 0, epochs=1)
    changes: list[dict[str, Any]] = [{"staleness": 1}, {"state_shards": 2}]
    for flag in changes:
        with pytest.raises(UserError, match=f"train.{next(iter(flag))} is .*undo the change, or start a new run"):
            run_of(tmp_path, small, 0, epochs=2, **flag)


@pytest.mark.usefixtures("remembering")
def test_a_memory_that_cannot_be_spread(tmp_path, small, monkeypatch):
    monkeypatch.setattr(tiny.Traces, "part", tiny.Memory.part)
    with pytest.raises(UserError, match="--state-shards 2: Traces is not made for several shards; leave it at 1"):
        run_of(tmp_path, small, 0, state_shards=2)


@pytest.mark.usefixtures("remembering")
def test_workers_without_a_server_are_refused(tmp_path, small):
    class Alone(Exchange):
        world = 2

    config, dataset, table = tiny.setting(small, "tiny")
    with pytest.raises(ValueError, match="2 workers share a state; they need a server of it"):
        trainer.train(config, Location.of(tmp_path), dataset, small, table, Alone())
