"""Splits above the memory budget: the same batches from pools of row groups, within the budget, with exact resume."""

import contextlib
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from unpacking import drawn, stored, unpacked

from distmeta.data import pools, taskmaker, tasktable
from distmeta.data.loader import Loader
from distmeta.data.prefetch import ahead
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.draws import hashed
from distmeta.errors import UserError
from distmeta.parallel import trainer
from distmeta.storage import Location

USERS, SHARDS, TASKS, BATCH = 400, 3, 12, 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """400 users; row groups of at most 12 tasks and 200 rows, so that a shard has many, of different sizes."""
    where = tmp_path_factory.mktemp("streamed") / "data"
    handmade.make(where, n=3 + (hashed(np.arange(USERS), purpose="count") % np.uint64(30)).astype(int), part_rows=1500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taskmaker, "GROUP_TASKS", TASKS)
        patch.setattr(taskmaker, "GROUP_ROWS", 200)
        tasktable.make(Location.of(where), "cmml-user", 0, {}, shards=SHARDS)
    return Location.of(where)


@pytest.fixture(scope="module")
def table(data: Location) -> TaskTable:
    return tasktable.make(data, "cmml-user", 0, {}, shards=SHARDS)


@pytest.fixture(scope="module")
def dataset(data: Location) -> Dataset:
    return Dataset.open(data)


def budget(table: TaskTable, dataset: Dataset, window: int, split: str = "train") -> int:
    """Bytes that just allow pools of `window` groups a shard."""
    filled = [shard for shard in table.groups(split) if shard]
    return 2 * window * len(filled) * max(pools.estimate(*g, dataset) for shard in filled for g in shard)


def order(table: TaskTable, seed: int, epoch: int | None, window: int, split: str = "train") -> list[int]:
    """The definition, in plain Python: the task ids of an epoch, or of an evaluation (None), by position."""
    groups = []
    for v, (part, sizes) in enumerate(zip(table.read(split), table.groups(split), strict=True)):
        tasks = iter(part["task"].to_pylist())
        cut = [[next(tasks) for _ in range(n)] for n, _ in sizes]
        if epoch is not None:
            keys = [int(hashed(seed, epoch, v, g, purpose="groups")) for g in range(len(cut))]
            cut = [cut[g] for g in sorted(range(len(cut)), key=keys.__getitem__)]
        groups.append(cut)
    whole: list[int] = []
    for first in range(0, max(map(len, groups)), window):
        pool = [[t for g in shard[first : first + window] for t in g] for shard in groups]
        if epoch is not None:
            pool = [sorted(s, key=lambda t: int(hashed(seed, epoch, t, purpose="order"))) for s in pool]
        whole += [s[k] for k in range(max(map(len, pool))) for s in pool if k < len(s)]
    return whole


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("size", [BATCH, 100])
def test_streamed_batches_are_what_the_definition_says(
    table: TaskTable, dataset: Dataset, window: int, size: int
) -> None:
    """Pools, order within, batches across pools (of 100 across several), episodes, every value; two epochs."""
    rows = stored(table, "train")
    loader = Loader(table, dataset, "train", size, seed=3, memory=budget(table, dataset, window))
    found = []
    for epoch in (0, 1):
        expected = order(table, 3, epoch, window)
        assert sorted(expected) == sorted(rows)
        batches = list(loader.epoch(epoch))
        assert len(batches) == loader.steps == -(-len(rows) // size)
        for b, batch in enumerate(batches):
            assert (batch.seed, batch.epoch) == (3, epoch)
            assert unpacked(batch) == {t: drawn(rows[t], 3, epoch, 100) for t in expected[size * b : size * (b + 1)]}
        found.append(expected)
    assert found[0] != found[1]
    early, late = (set(o[: len(o) // 4]) for o in found)
    assert len(early & late) < len(early) / 2  # epochs begin with other groups, not only in other orders


def test_workers_share_a_streamed_batch(table: TaskTable, dataset: Dataset) -> None:
    def loader(rank: int, world: int) -> Loader:
        return Loader(table, dataset, "train", BATCH, seed=1, rank=rank, world=world, memory=budget(table, dataset, 1))

    whole = [unpacked(b) for b in loader(0, 1).epoch(2)]
    for world in (2, 3):
        loaders = [loader(r, world) for r in range(world)]
        for b, parts in enumerate(zip(*(w.epoch(2) for w in loaders), strict=True)):
            tasks = [unpacked(part) for part in parts]
            assert sum(map(len, tasks)) == len(whole[b])
            assert {t: v for part in tasks for t, v in part.items()} == whole[b]


def flat(value: Any) -> list[Any]:
    """All tensors of a batch, as lists, with their shapes."""
    if isinstance(value, torch.Tensor):
        return [tuple(value.shape), value.tolist()]
    if isinstance(value, dict | tuple):
        return [flat(v) for v in (value.values() if isinstance(value, dict) else value)]
    return [flat(v) for v in vars(value).values()] if hasattr(value, "__dict__") else [value]


def test_resumed_at_any_batch_reads_only_what_is_left(
    table: TaskTable, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From batch k on every tensor is that of the tail, padding included, and pools before it are not read."""
    memory = budget(table, dataset, 1)
    read: list[int] = []
    real = tasktable.read_part
    monkeypatch.setattr(tasktable, "read_part", lambda *a: read.append(len(a[4])) or real(*a))
    loader = Loader(table, dataset, "train", BATCH, memory=memory)
    assert not read
    whole = [flat(b) for b in loader.epoch(1)]
    groups = sum(map(len, table.groups("train")))
    assert sum(read) == groups
    skipped = []
    for start in range(loader.steps + 1):
        read.clear()
        assert [flat(b) for b in Loader(table, dataset, "train", BATCH, memory=memory).epoch(1, start)] == whole[start:]
        skipped.append(groups - sum(read))
    assert skipped == sorted(skipped)
    assert (skipped[0], skipped[-1]) == (0, groups)
    assert skipped[loader.steps // 2] > groups / 3


def test_what_fits_is_one_pool_in_the_usual_order(table: TaskTable, dataset: Dataset) -> None:
    count = table.counts["train"]
    exact = pools.estimate(count["tasks"], count["rows"], dataset)
    usual = Loader(table, dataset, "train", BATCH)
    fits, streamed = (Loader(table, dataset, "train", BATCH, memory=m) for m in (exact, exact - 1))
    assert (usual.note, fits.note) == ("", "")
    assert "streamed in" in streamed.note
    assert f"(--memory-mb {(exact - 1) // 2**20})" in streamed.note
    whole = [flat(b) for b in usual.epoch(1)]
    assert [flat(b) for b in fits.epoch(1)] == whole
    assert [flat(b) for b in streamed.epoch(1)] != whole
    assert streamed.steps == usual.steps


def test_streamed_evaluation_has_every_task_once(table: TaskTable, dataset: Dataset) -> None:
    """In stored order, pool by pool, the same way each time, with what the unstreamed one holds of each task."""
    memory = budget(table, dataset, 1, "test")
    streamed, usual = Loader(table, dataset, "test", 5, memory=memory), Loader(table, dataset, "test", 5)
    assert streamed.note
    batches = [unpacked(b) for b in streamed.evaluation()]
    expected = order(table, 0, None, 1, "test")
    assert [set(b) for b in batches] == [set(expected[k : k + 5]) for k in range(0, len(expected), 5)]
    both = [{t: v for b in found for t, v in b.items()} for found in (batches, map(unpacked, usual.evaluation()))]
    assert both[0] == both[1]
    assert streamed.tasks().equals(usual.tasks())


def test_row_groups_bound_what_is_read_and_cut_nothing(data: Location, table: TaskTable, tmp_path: Path) -> None:
    """Groups are as large as both limits allow, whatever the parts of interactions/; tasks and their order stay."""
    for v, sizes in enumerate(table.groups("train")):
        (part,) = table.read("train", [v])
        rows = [len(x) for x in part["item"].to_pylist()]
        assert sum(n for n, _ in sizes) == len(rows)
        at = 0
        for n, total in sizes:
            assert (n, total) == (min(n, TASKS), sum(rows[at : at + n]))
            assert total <= 200
            at += n
            assert at == len(rows) or n == TASKS or total + rows[at] > 200
    shutil.copytree(data.path, tmp_path / "data", ignore=shutil.ignore_patterns("tasks"))
    plain = tasktable.make(Location.of(tmp_path / "data"), "cmml-user", 0, {}, shards=SHARDS)
    assert [len(g) for g in plain.groups("train")] == [1] * SHARDS
    assert plain.split_hash == table.split_hash
    for split in ("train", "valid", "test"):
        assert plain.read(split) == table.read(split)


def test_a_task_longer_than_a_group_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskmaker, "GROUP_ROWS", 4)
    lists = [[1] * n for n in (5, 0, 4, 1, 3, 9, 9)]
    tasks = pa.table({"item": pa.array(lists, pa.list_(pa.int32()))})
    assert taskmaker._groups(tasks) == [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7)]


# ---- what goes wrong


def _other_groups(part: Path) -> None:
    pq.write_table(pq.read_table(part), part, row_group_size=5)


def _flip(part: Path) -> None:
    whole = part.read_bytes()
    part.write_bytes(whole[:4] + bytes(b ^ 64 for b in whole[4:-2000]) + whole[-2000:])


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "{part}: this part is missing; delete"),
        (lambda f: f.write_bytes(f.read_bytes()[:-50]), "{part}: not readable as Parquet"),
        (lambda f: f.write_bytes(b""), "{part}: not readable as Parquet"),
        (_flip, "{part}: not readable as Parquet"),
        (lambda f: pq.write_table(pq.read_table(f).slice(1), f), "{part}: .* rows where its manifest counts"),
        (_other_groups, "{table}: the parts of split train changed while they were read"),
    ],
)
def test_a_part_damaged_under_way_ends_the_epoch_with_its_name(
    tmp_path: Path, table: TaskTable, dataset: Dataset, damage: Callable[[Path], None], says: str, prefetch: int
) -> None:
    """A part goes bad between two batches: no batch is made of what it held, and the sentence names it."""
    shutil.copytree(table.location.path, tmp_path / "table")
    copy = TaskTable.open(Location.of(tmp_path / "table"))
    part = tmp_path / "table" / next(f["path"] for f in copy.files if f["split"] == "train")
    loader = Loader(copy, dataset, "train", BATCH, prefetch=prefetch, memory=budget(copy, dataset, 1))
    expected = [unpacked(b) for b in loader.epoch(0)]
    batches = loader.epoch(0)
    got = [unpacked(next(batches))]
    damaged = shutil.copy(part, tmp_path / "damaged")
    damage(damaged)
    if damaged.exists():
        damaged.replace(part)  # at once: the next pool is being read
    else:
        part.unlink()
    with pytest.raises(UserError, match=says.format(part=part, table=tmp_path / "table")):
        got.extend(unpacked(b) for b in batches)
    assert got == expected[: len(got)]
    assert len(got) < len(expected)
    assert not threads()


def test_a_budget_too_small_says_what_is_needed(table: TaskTable, dataset: Dataset) -> None:
    least = budget(table, dataset, 1)
    with pytest.raises(UserError, match=r"train tasks .* takes 1 MB, more than --memory-mb 0; give --memory-mb 1"):
        Loader(table, dataset, "train", BATCH, memory=least - 1)
    Loader(table, dataset, "train", BATCH, memory=least)


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "distmeta-prefetch"]


def test_ahead_stays_within_its_room_and_ends_what_it_runs() -> None:
    """Never more than `most` made and not taken; an error comes after the values before it; closing closes."""
    made, closed = [], []

    def values(fails_at: int) -> Generator[int]:
        try:
            for i in range(9):
                if i == fails_at:
                    raise RuntimeError("no more")
                made.append(i)
                yield i
        finally:
            closed.append(True)

    for most in (1, 3):
        made.clear()
        taken = ahead(values(9), most)
        for i, value in enumerate(taken):
            assert value == i
            time.sleep(0.01)
            assert len(made) == min(i + 1 + most, 9)
    assert len(closed) == 2
    got: list[int] = []
    with pytest.raises(RuntimeError, match="no more"):
        got.extend(ahead(values(4), 2))
    assert got == [0, 1, 2, 3]
    with contextlib.closing(ahead(values(9), 2)) as early:
        assert next(early) == 0
    assert len(closed) == 4
    assert not threads()


# ---- within the budget


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Location, TaskTable, Dataset]:
    """20,000 users in row groups of 80 tasks: many times what its smallest budget is."""
    where = tmp_path_factory.mktemp("large") / "data"
    handmade.make(where, n=20 + (hashed(np.arange(20_000), purpose="count") % np.uint64(30)).astype(int))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taskmaker, "GROUP_TASKS", 80)
        table = tasktable.make(Location.of(where), "cmml-user", 0, {}, shards=4)
    return Location.of(where), table, Dataset.open(where)


def test_memory_stays_within_the_budget(large: tuple[Location, TaskTable, Dataset]) -> None:
    """Arrow's and numpy's peaks together, over two epochs and a resume, of a table 10 times the budget; batches
    included. Kept whole, the same table takes more than five times as much."""
    _, table, dataset = large
    memory = budget(table, dataset, 1)
    count = table.counts["train"]
    assert pools.estimate(count["tasks"], count["rows"], dataset) > 10 * memory
    streamed = peak(lambda: Loader(table, dataset, "train", 16, memory=memory))
    assert streamed < memory
    assert peak(lambda: Loader(table, dataset, "train", 16)) > 5 * streamed


def peak(make: Callable[[], Loader]) -> int:
    """Bytes that Arrow and numpy hold at most, each at its own peak, while a loader is made and used.

    The lesser of two uses: once in a while Python's own table of strings grows, by megabytes.
    """
    usual, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    numpy = []
    pa.set_memory_pool(counted)
    tracemalloc.start()
    try:
        for _ in range(2):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            loader = make()
            for epoch, start in ((0, 0), (1, loader.steps // 2)):
                for _ in loader.epoch(epoch, start):
                    pass
            del loader  # what it holds is freed by the pool that counts, which must still be there
            numpy.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    return counted.max_memory() + min(numpy)


def test_next_pool_is_read_while_one_is_used_and_no_more(table: TaskTable, dataset: Dataset) -> None:
    """While batches of pool p are taken slowly, pool p + 1 is read and p + 2 is not."""
    asked: list[int] = []

    class Watched(TaskTable):
        def stream(self, split: str, wanted: Any, columns: Any = None) -> Any:
            def noted() -> Any:
                for shard, groups in wanted:
                    asked.append(shard)
                    yield shard, groups

            return super().stream(split, noted(), columns)

    watched = Watched(**vars(table))
    loader = Loader(watched, dataset, "train", 1, prefetch=1, memory=budget(table, dataset, 1))
    ends = [p.end for p in loader._plan.pools(0, 0)]
    for step, _ in enumerate(loader.epoch(0)):
        time.sleep(0.004)
        # the batch used and two more are made: the pool of the last of these is in use
        pool = int(np.searchsorted(ends, min(step + 2, loader.steps - 1), side="right"))
        assert len(asked) <= SHARDS * (pool + 2)
        if step == 5:
            assert len(asked) == SHARDS * 2
    assert len(asked) == sum(map(len, table.groups("train")))


def test_training_streams_says_so_and_goes_on_exactly(
    tmp_path: Path, large: tuple[Location, TaskTable, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with --memory-mb 1, killed within its second epoch and resumed: the same parameters, bit for bit."""
    tiny.register(monkeypatch)
    place, table, _ = large
    said: list[str] = []

    def run(where: Path) -> list[bytes]:
        config, dataset, _ = tiny.setting(place, "tiny", epochs=2, memory_mb=1, checkpoint_steps=20, batch_size=256)
        trainer.train(config, Location.of(where).make_dir(), dataset, place, table, log=said.append)
        return [f.read_bytes() for f in sorted(where.rglob("*.safetensors"))]

    whole = run(tmp_path / "whole")
    assert any(s.startswith("train: ") and s.endswith("(--memory-mb 1)") for s in said)
    real, batches = Loader.epoch, []

    def killed(self: Loader, epoch: int, start: int = 0) -> Any:
        for batch in real(self, epoch, start):
            if epoch == 1 and len(batches) == self.steps + self.steps // 2:
                raise KeyboardInterrupt
            batches.append(batch)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    assert run(tmp_path / "killed") == whole
    assert any(s.startswith("going on from step") for s in said)
