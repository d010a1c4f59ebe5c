"""Epochs that are parts of a pass, and validation on some tasks: the same whoever reads, and wherever one stops."""

from pathlib import Path
from typing import Any

import handmade
import numpy as np
import pytest
import scenarioworld
import tiny
import torch
from test_streaming import budget, flat
from unpacking import stored, unpacked

from distmeta.data import taskmaker, tasktable
from distmeta.data.epochs import Epochs
from distmeta.data.loader import Loader
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.draws import hashed
from distmeta.errors import UserError
from distmeta.parallel import checkpoint, trainer
from distmeta.parallel.update import MetaUpdate
from distmeta.parallel.validation import read_metrics
from distmeta.storage import Location

BATCH = 7


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskTable, Dataset]:
    """300 users in 3 shards of row groups of at most 12 tasks."""
    where = tmp_path_factory.mktemp("epochs") / "data"
    handmade.make(where, n=3 + (hashed(np.arange(300), purpose="count") % np.uint64(30)).astype(int))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taskmaker, "GROUP_TASKS", 12)
        table = tasktable.make(Location.of(where), "cmml-user", 0, {}, shards=3)
    return table, Dataset.open(Location.of(where))


def bound(read: tuple[TaskTable, Dataset], streamed: bool, split: str = "train") -> int | None:
    return budget(*read, 1, split) if streamed else None


@pytest.mark.parametrize("whole", [1, 2, 5, 12, 97])
def test_parts_cut_a_pass_into_like_pieces(whole: int) -> None:
    for parts in range(1, whole + 1):
        epochs = Epochs(whole, parts)
        steps = [epochs.steps(e) for e in range(3 * parts)]
        assert max(steps) - min(steps) <= 1 <= min(steps)
        assert sum(steps[:parts]) == whole == round(parts * epochs.mean)
        ends = [sum(steps[: e + 1]) for e in range(3 * parts)]
        every = range(1, 3 * whole + 1)
        assert [epochs.ended(step) for step in every] == (np.searchsorted(ends, every) + 1).tolist()
        for e in range(3 * parts):
            number, first, end = epochs.at(e)
            assert (number, number * whole + first, number * whole + end) == (e // parts, ends[e] - steps[e], ends[e])


def test_an_epoch_holds_no_more_tasks_than_asked() -> None:
    for most in range(8, 120):
        epochs = Epochs.of(100, 13, 8, most)
        assert max(epochs.steps(e) for e in range(epochs.parts)) * 8 <= most or most >= 100
    assert Epochs.of(100, 13, 8, 0) == Epochs.of(100, 13, 8, 100) == Epochs.of(100, 13, 8, 10**9) == Epochs(13)
    with pytest.raises(UserError, match="--epoch-tasks 7: a meta-update takes --batch-size 8"):
        Epochs.of(100, 13, 8, 7)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_parts_put_together_are_the_pass(read: tuple[TaskTable, Dataset], streamed: bool, world: int) -> None:
    """Every tensor of two passes, in order; from the middle of a part on: its tail."""
    for rank in range(world):
        given: dict[str, Any] = {"seed": 1, "rank": rank, "world": world, "memory": bound(read, streamed)}
        usual, cut = Loader(*read, "train", BATCH, **given), Loader(*read, "train", BATCH, **given, epoch_tasks=50)
        assert (bool(usual.note), bool(cut.note)) == (streamed, streamed)
        assert cut.epochs.parts > 3
        whole = [flat(b) for e in (0, 1) for b in usual.epoch(e)]
        parts = [[flat(b) for b in cut.epoch(e)] for e in range(2 * cut.epochs.parts)]
        assert [b for part in parts for b in part] == whole
        for e in (0, 1, cut.epochs.parts + 2):
            assert len(parts[e]) == cut.epochs.steps(e) <= 50 // BATCH
            for start in (1, len(parts[e]) - 1, len(parts[e])):
                assert [flat(b) for b in cut.epoch(e, start)] == parts[e][start:]


def test_a_part_reads_only_its_pools(read: tuple[TaskTable, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    stream = TaskTable.stream

    def counting(self: TaskTable, split: str, wanted: Any, columns: Any = None) -> Any:
        return stream(self, split, (asked.append(w[0]) or w for w in wanted), columns)

    monkeypatch.setattr(TaskTable, "stream", counting)
    loader = Loader(*read, "train", BATCH, memory=bound(read, True), epoch_tasks=BATCH, prefetch=0)
    assert len(list(loader.epoch(3))) == 1
    assert 0 < len(asked) <= 2 * read[0].shards  # one pool, or the two that the batch lies across
    assert sum(len(shard) for shard in read[0].groups("train")) > 4 * read[0].shards


def test_parts_of_scenarios_episodes(tmp_path: Path) -> None:
    """A pass is all draws of all scenarios; parts go across draws."""
    scenarioworld.make(tmp_path / "data", themes=True)
    place = Location.of(tmp_path / "data")
    table = tasktable.make(place, "cmml-scenario", 0, scenarioworld.SMALL)
    dataset = table.seen(Dataset.open(place))
    usual, cut = (Loader(table, dataset, "train", 4, seed=2, epoch_tasks=n) for n in (0, 8))
    assert cut.epochs.parts > 3
    whole = [flat(b) for e in (0, 1) for b in usual.epoch(e)]
    assert [flat(b) for e in range(2 * cut.epochs.parts) for b in cut.epoch(e)] == whole
    every = scenarioworld.stored(table, "valid")
    some = [b for r in (0, 1) for b in Loader(table, dataset, "valid", 1, rank=r, world=2, most=1).evaluation()]
    tasks = [t for batch in some for block in batch for t in block.task.tolist()]
    assert len(tasks) == 1 < len(every)
    assert every.keys() >= set(tasks)


@pytest.mark.parametrize("streamed", [False, True])
def test_some_validation_tasks_are_the_same_for_all(read: tuple[TaskTable, Dataset], streamed: bool) -> None:
    """For every seed and number of workers, whole or streamed; each as it is among all, in the same order."""
    memory = bound(read, streamed, "valid")
    whole = [t for b in Loader(*read, "valid", 1).evaluation() for t in unpacked(b).items()]

    def some(most: int, world: int = 1, seed: int = 0) -> dict[int, Any]:
        loaders = [
            Loader(*read, "valid", 1, seed=seed, rank=r, world=world, memory=memory, most=most) for r in range(world)
        ]
        assert all(loader.n_tasks == min(most, len(whole)) for loader in loaders)
        return dict(t for loader in loaders for b in loader.evaluation() for t in unpacked(b).items())

    for most in (1, 5, 11, len(whole) - 1):
        chosen = some(most)
        assert len(chosen) == most
        assert chosen == {t: rows for t, rows in whole if t in chosen}
        assert some(most, 2) == some(most, 3) == chosen == some(most, 1, seed=9)
    assert list(some(len(whole))) == list(some(10**6)) == [t for t, _ in whole]
    low = {t for t, _ in whole} - {t for t, _ in whole[:11]}
    assert low & some(11).keys()  # not simply the first ones stored
    assert some(5).keys() < some(11).keys()


def test_too_many_validation_tasks_for_the_budget(read: tuple[TaskTable, Dataset]) -> None:
    with pytest.raises(UserError, match="of its valid tasks take 1 MB, more than --memory-mb 0; take fewer"):
        Loader(*read, "valid", 4, memory=1000, most=12)


# ---- training


def last(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters and moments of the newest checkpoint."""
    where = Location.of(run)
    found = checkpoint.newest(where)
    assert found
    return {part: checkpoint.load(where, found, part) for part in ("params", "optimizer")}


def same(a: Path, b: Path) -> bool:
    x, y = last(a), last(b)
    assert {p: v.keys() for p, v in x.items()} == {p: v.keys() for p, v in y.items()}
    return all(t.equal(y[part][name]) for part, tensors in x.items() for name, t in tensors.items())


@pytest.mark.parametrize("world", [0, 2])
def test_a_run_in_parts_learns_what_a_run_in_passes_does(tmp_path, small, monkeypatch, world) -> None:
    """After two passes the same parameters and moments, bit for bit; a line and a validation for each part."""
    tiny.register(monkeypatch)
    usual = tiny.run_of(tmp_path / "passes", small, world, epochs=2, patience=0)
    _, dataset, table = tiny.setting(small, "tiny")
    parts = Loader(table, dataset, "train", 16, epoch_tasks=48).epochs.parts
    assert parts == 3
    flags: dict[str, Any] = {"epoch_tasks": 48, "valid_tasks": 5, "patience": 0}
    cut = tiny.run_of(tmp_path / "parts", small, world, epochs=2 * parts, **flags)
    assert (cut.steps, cut.epochs) == (usual.steps, 2 * parts)
    assert same(tmp_path / "parts", tmp_path / "passes")
    lines = read_metrics(Location.of(tmp_path / "parts"))
    steps = Epochs(usual.steps // 2, parts)
    assert [line["step"] for line in lines] == [steps.before(e + 1) for e in range(2 * parts)]
    assert len({line["valid_mae"] for line in lines}) == 2 * parts
    tiny.run_of(tmp_path / "all", small, world, epochs=2, patience=0, epoch_tasks=10**6, valid_tasks=10**6)
    assert tiny.digests(tmp_path / "all") == tiny.digests(tmp_path / "passes")


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 4, 7, 20])
def test_stopped_within_a_part_and_resumed(tmp_path, small, monkeypatch, stop) -> None:
    tiny.register(monkeypatch)
    flags: dict[str, Any] = {"epochs": 12, "epoch_tasks": 48, "valid_tasks": 5, "patience": 0, "checkpoint_steps": 2}
    tiny.run_of(tmp_path / "whole", small, 0, **flags)
    apply = MetaUpdate.apply

    def stopping(self: MetaUpdate, batch: Any, step: int) -> Any:
        if step == stop:
            raise Stop
        return apply(self, batch, step)

    with monkeypatch.context() as m:
        m.setattr(MetaUpdate, "apply", stopping)
        with pytest.raises(Stop):
            tiny.run_of(tmp_path / "parts", small, 0, **flags)
    outcome = tiny.run_of(tmp_path / "parts", small, 0, **flags)
    assert outcome.epochs == 12
    assert tiny.digests(tmp_path / "parts") == tiny.digests(tmp_path / "whole")


def test_some_validation_tasks_judge_the_same_with_more_workers(tmp_path, small, monkeypatch) -> None:
    tiny.register(monkeypatch)
    tiny.in_float64(monkeypatch)
    found = []
    for world in (1, 2):
        tiny.run_of(tmp_path / str(world), small, world, epochs=3, epoch_tasks=64, valid_tasks=7)
        found.append([line["valid_mae"] for line in read_metrics(Location.of(tmp_path / str(world)))])
    assert found[0] == pytest.approx(found[1], abs=1e-12)


def test_methods_in_closed_form_say_that_they_take_all(tmp_path, small) -> None:
    config, dataset, table = tiny.setting(small, "bias", epoch_tasks=32)
    said: list[str] = []
    trainer.train(config, Location.of(tmp_path / "run").make_dir(), dataset, small, table, log=said.append)
    assert said[0] == "--epoch-tasks 32: bias is solved from all training tasks, in sweeps"
    (line,) = read_metrics(Location.of(tmp_path / "run"))
    assert line["step"] == 6
    assert len(stored(table, "train")) == table.counts["train"]["tasks"]


def test_clusters_are_surveyed_on_as_many_tasks_as_a_part_has(tmp_path, small) -> None:
    flags: dict[str, Any] = {"epochs": 4, "epoch_tasks": 48, "clusters": 2, "warm_epochs": 1}
    config, dataset, table = tiny.setting(small, "hml", **flags)
    trainer.train(config, Location.of(tmp_path / "run").make_dir(), dataset, small, table, log=lambda _: None)
    surveys = [line["clusters"] for line in read_metrics(Location.of(tmp_path / "run")) if "clusters" in line]
    assert len(surveys) == 4
    assert all(sum(survey["sizes"]) == 48 for survey in surveys)
    assert all(survey["churn"] is not None for survey in surveys[1:])  # the same tasks each time
