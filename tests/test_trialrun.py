"""A trial: what it trains on, what it tells, and how it ends."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import scenarioworld
import tiny
import torch

from distmeta import config as config_module
from distmeta.commands import benchmark_search
from distmeta.data.loader import Loader, read_items
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError
from distmeta.parallel import hosting, room, trainer, trialrun
from distmeta.parallel.stored import Stored
from distmeta.storage import Location


def stored_of(place: Location, memory: int = 1 << 30, **flags: Any) -> tuple[Any, Stored, TaskTable]:
    config, dataset, table = tiny.setting(place, "melu", epochs=2, patience=0, **flags)
    return config, Stored.read(table, dataset, place, memory), table


def asked(config: Any, run: Path, **more: Any) -> dict[str, Any]:
    plain = config_module.plain(config)
    plain["train"]["run"] = str(run)
    return {"run": run.name, "config": plain, "metric": "mae", "seeds": 1, **more}


def equal(a: Any, b: Any) -> bool:
    """Whether two things made of tensors are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if dataclasses.is_dataclass(a):
        return equal(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a is b is None or a == b


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """A cluster of this module's own."""
    with hosting.connected(1, 0.0, 60):
        import ray

        yield ray


def test_a_trial_trains_what_train_trains_from_the_files(tmp_path, small, store, monkeypatch):
    config, dataset, table = tiny.setting(small, "melu", epochs=2, patience=0)
    (tmp_path / "plain").mkdir()
    done = trainer.train(config, Location.of(tmp_path / "plain"), dataset, small, table, log=lambda _: None)
    shared = hosting.share(table, dataset, config, pytest.fail)
    stored = store.get(shared.stored)
    monkeypatch.setattr(TaskTable, "read", lambda *_: pytest.fail("read from the files"))
    told: list[dict[str, Any]] = []
    trialrun._train(asked(config, tmp_path / "trial"), stored, told.append)
    assert tiny.digests(tmp_path / "trial") == tiny.digests(tmp_path / "plain")
    assert [t["epoch"] for t in told] == [1, 2, 2]
    assert told[-1]["over"]
    assert told[-1][trialrun.OBJECTIVE] == done.best_mae
    with pytest.raises(ValueError, match="read-only"):  # the store's own memory, not a copy
        stored.table.splits["train"][0]["task"].to_numpy()[0] = 0


def test_scenarios_are_stored_whole(tmp_path, monkeypatch):
    scenarioworld.make(tmp_path / "world", themes=False)
    place = Location.of(tmp_path / "world")
    flags = {"protocol": "cmml-scenario", **scenarioworld.SMALL}
    _, dataset, table = tiny.setting(place, "cmml-film", **flags)
    stored = Stored.read(table, dataset, place, 1 << 30)
    plain = [list(Loader(table, dataset, split, 4).epoch(1)) for split in ("train", "valid")]
    items = read_items(place, dataset)
    for name in ("read", "users"):
        monkeypatch.setattr(TaskTable, name, lambda *_: pytest.fail("read from the files"))
    again = [list(Loader(stored.table, stored.dataset, split, 4).epoch(1)) for split in ("train", "valid")]
    assert sum(map(len, plain)) > 1
    assert equal(again, plain)
    assert equal(stored.items(), items)
    assert stored.table.split_hash == table.split_hash


def test_what_is_larger_than_the_budget_is_streamed_from_the_files(tmp_path, small, store):
    config, dataset, table = tiny.setting(small, "melu", memory_mb=1)
    lines: list[str] = []
    big = {**table.counts, "train": {"tasks": 10**6, "rows": 10**8}}
    shared = hosting.share(TaskTable(**{**vars(table), "counts": big}), dataset, config, lines.append)
    assert lines == ["the train tasks are larger than --memory-mb: each trial streams them from the files"]
    stored = store.get(shared.stored)
    assert sorted(stored.table.splits) == ["valid"]
    wanted = [(v, range(len(g))) for v, g in enumerate(table.groups("train")) if g]
    assert pa.concat_tables(stored.table.stream("train", wanted)).equals(
        pa.concat_tables(table.stream("train", wanted))
    )


def test_a_failing_trial_tells_its_reason(tmp_path, small, monkeypatch):
    from ray import tune

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", told.append)
    config, stored, _ = stored_of(small, lr=1e30, clip=0.0)
    trialrun.run(asked(config, tmp_path / "nan"), stored)
    assert "not finite" in told.pop()["failure"]
    config, stored, _ = stored_of(small)
    empty = Stored(stored.table, stored.dataset, stored.place, stored.fields.slice(0, 0))
    trialrun.run(asked(config, tmp_path / "broken"), empty)
    (last,) = told
    assert last["failure"].startswith(("IndexError: ", "RuntimeError: "))  # of no kind that is meant for users
    assert "over" not in last


def test_a_stopped_trial_goes_on_from_its_checkpoint(tmp_path, small):
    config, stored, _ = stored_of(small)
    told: list[dict[str, Any]] = []

    def stop(row: dict[str, Any]) -> None:
        told.append(row)
        raise SystemExit  # as Ray Tune ends a trial, in its report

    with pytest.raises(SystemExit):
        trialrun._train(asked(config, tmp_path / "run"), stored, stop)
    trialrun._train(asked(config, tmp_path / "run"), stored, told.append)
    trialrun._train(asked(config, tmp_path / "whole"), stored, lambda _: None)
    assert [t["epoch"] for t in told] == [1, 1, 2, 2]
    assert tiny.digests(tmp_path / "run") == tiny.digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "gpu", "fit"),
    [
        ([{"CPU": 2}], 0, 1, 0.0, 2),
        ([{"CPU": 2}], 1, 1, 0.0, 2),
        ([{"CPU": 2}], 2, 1, 0.0, 1),
        ([{"CPU": 2}], 3, 1, 0.0, 0),
        ([{"CPU": 3}, {"CPU": 3}], 1, 2, 0.0, 2),  # not the three that six CPUs would have room for
        ([{"CPU": 3}, {"CPU": 3}, {}], 2, 1, 0.0, 3),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8}], 2, 1, 1.0, 1),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 3, "GPU": 1}], 0, 1, 0.25, 11),  # the second has too few CPUs for a fourth
        ([{"CPU": 9, "GPU": 2}], 0, 1, 0.4, 4),  # a share is of one GPU: not five
        ([{"CPU": 9, "GPU": 1}], 0, 1, 0.1, 9),
        ([{"CPU": 99, "GPU": 1}], 0, 1, 0.3333, 3),
        ([{"CPU": 99, "GPU": 1}], 0, 1, 1 / 3, 3),
    ],
)
def test_as_many_trials_as_none_waits_for_another(nodes, workers, threads, gpu, fit):
    assert hosting.at_once(nodes, workers, threads, gpu) == fit


@pytest.mark.parametrize(
    ("nodes", "needed", "threads", "gpu", "said"),
    [
        ([{"CPU": 4}, {"CPU": 4}], 2, 4, 0, None),
        ([], 2, 1, 0, "2 workers need 2 CPUs, the cluster has 0"),
        (
            [{"CPU": 3}, {"CPU": 3}, {"CPU": 1}], 1, 4, 0,
            "1 worker needs 4 CPUs on one node, the cluster has 2 nodes of 3 CPUs, 1 node of 1 CPU: room for 0",
        ),
        ([{"CPU": 8, "GPU": 1}, {"CPU": 8}], 2, 4, 1, "2 workers need 2 GPUs, the cluster has 1"),
        (
            [{"CPU": 1, "GPU": 2}, {"CPU": 8}], 2, 2, 1,
            "2 workers need 2 CPUs and 1 GPU each on one node, the cluster has 1 node of 1 CPU and 2 GPUs,"
            " 1 node of 8 CPUs and 0 GPUs: room for 0",
        ),
    ],
)  # fmt: skip
def test_what_a_cluster_lacks(nodes, needed, threads, gpu, said):
    assert room.short(nodes, needed, threads, gpu) == said


def test_too_small_a_cluster_is_a_sentence(store):
    sentence = pytest.raises(UserError, match=r"99 workers need 99 CPUs.*fewer --workers-per-trial")
    with sentence, hosting.connected(1, 0.0, 0, 99):
        pytest.fail("connected")


def test_half_the_epochs_are_counted_as_they_were_trained():
    def epoch(trial: int, step: int) -> dict[str, Any]:
        return {"trial_id": trial, "step": step, "intermediate_value": 1.0}

    def end(trial: int, state: int, *values: float) -> dict[str, Any]:
        return {"trial_id": trial, "state": state, "values": list(values) or None}

    journal = [epoch(0, 1), epoch(1, 1), epoch(1, 1), end(1, 2), epoch(0, 2), end(0, 1, 0.7), epoch(2, 1)]
    journal += [end(2, 1, 0.5)]
    assert benchmark_search.spent(journal, 0) == (4, 0.5, 3)
    assert benchmark_search.spent(journal, 3) == (3, 0.7, 2)


def test_what_a_trial_holds_is_freed_and_no_other_trials(store):
    from ray.actor import exit_actor
    from ray.util import placement_group, placement_group_table

    from distmeta.parallel import leash

    class Controller:
        """Has the one method that is asked for."""

        def abort(self) -> None:
            exit_actor()

        def ready(self) -> bool:
            return True

    held = leash.create()
    made = {}
    for run in ("a/0001", "a/0001-seed1", "a/00010"):
        controller = store.remote(Controller).options(num_cpus=0).remote()
        group = placement_group([{"CPU": 0.25}])
        store.get([controller.ready.remote(), group.ready()])
        store.get(held.hold.remote(run, [controller], [group]))
        made[run] = controller, group
    assert store.get(held.free.remote("a/0001")) == 2
    assert store.get(held.free.remote("a/0001")) == 0
    left = [run for run, (_, group) in made.items() if placement_group_table(group)["state"] == "CREATED"]
    assert left == ["a/00010"]
    with pytest.raises(store.exceptions.RayActorError):
        store.get(made["a/0001"][0].ready.remote())
    assert store.get(made["a/00010"][0].ready.remote())
    store.get(held.free.remote("a/00010"))
