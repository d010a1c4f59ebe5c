"""The loader: which tasks stand in which batch, what is support and query, and what a batch's tensors hold."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from unpacking import drawn, stored, unpacked

from distmeta.data import tasktable
from distmeta.data.collate import BLOCK_LEAST, BLOCK_MOST, BLOCK_WORTH, Collator, block_bounds
from distmeta.data.loader import Loader, read_items
from distmeta.data.schema import Dataset
from distmeta.data.taskmaker import FIXED
from distmeta.data.tasktable import TaskTable
from distmeta.draws import hashed
from distmeta.errors import UserError
from distmeta.storage import Location
from distmeta.tasks import TaskBatch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Location:
    where = tmp_path_factory.mktemp("tiny") / "data"
    handmade.make(where)
    return Location.of(where)


@pytest.fixture(scope="module")
def table(data: Location) -> TaskTable:
    return tasktable.make(data, "cmml-user", 0, {})


@pytest.fixture(scope="module")
def dataset(data: Location) -> Dataset:
    return Dataset.open(data)


@pytest.mark.parametrize("most", [100, 13])
def test_training_batches_are_what_the_definition_says(data: Location, dataset: Dataset, most: int) -> None:
    """Every batch of two epochs in plain Python: order, episode and query draw, padding, masks, labels."""
    table = tasktable.make(data, "cmml-user", 0, {"max_ratings": most})
    rows = stored(table, "train")
    assert any(len(r["item"]) > 2 * 13 for r in rows.values())
    shards = [t["task"].to_pylist() for t in table.read("train", range(table.shards))]
    loader = Loader(table, dataset, "train", 7, seed=3)
    for epoch in (0, 1):
        permuted = [sorted(s, key=lambda t: int(hashed(3, epoch, t, purpose="order"))) for s in shards]
        dealt = [s[k] for k in range(max(map(len, permuted))) for s in permuted if k < len(s)]
        batches = list(loader.epoch(epoch))
        assert len(batches) == loader.steps
        for b, batch in enumerate(batches):
            assert (batch.seed, batch.epoch) == (3, epoch)
            expected = {t: drawn(rows[t], 3, epoch, most) for t in dealt[7 * b : 7 * b + 7]}
            assert unpacked(batch) == expected
            assert len(batch) == len(expected)


def test_evaluation_has_stored_roles_every_task_once(table: TaskTable, dataset: Dataset) -> None:
    loader = Loader(table, dataset, "test", 5)
    found: dict[int, Any] = {}
    for batch in loader.evaluation():
        found |= unpacked(batch)
    rows = stored(table, "test")
    assert found.keys() == rows.keys()
    for task, (support, query) in found.items():
        r = rows[task]
        both = list(zip(r["item"], r["label"], strict=True))
        assert support == [x for x, role in zip(both, r["role"], strict=True) if role == 0]
        assert query == [x for x, role in zip(both, r["role"], strict=True) if role == 1]
    assert dict(loader.tasks().iter_rows()) == {t: r["cohort"] for t, r in rows.items()}


def test_batch_does_not_depend_on_the_workers(table: TaskTable, dataset: Dataset) -> None:
    """Batch b of all workers together is that of one worker; also when a worker has none of its tasks."""
    whole = [unpacked(b) for b in Loader(table, dataset, "train", 4, seed=1).epoch(2)]
    empty = 0
    for world in (2, 3, table.shards):
        loaders = [Loader(table, dataset, "train", 4, seed=1, rank=r, world=world) for r in range(world)]
        assert {(w.steps, w.n_tasks) for w in loaders} == {(len(whole), sum(map(len, whole)))}
        for b, parts in enumerate(zip(*(w.epoch(2) for w in loaders), strict=True)):
            union: dict[int, Any] = {}
            for part in parts:
                mine = unpacked(part)
                empty += not mine and not len(part.items) and part.blocks == ()
                assert not union.keys() & mine.keys()
                union |= mine
            assert union == whole[b]
    assert empty
    with pytest.raises(UserError, match=f"17 workers for {table.shards} shards"):
        Loader(table, dataset, "train", 4, world=17)


def test_epochs_differ_resume_does_not(table: TaskTable, dataset: Dataset) -> None:
    """Each epoch has every task once, in another order and with another query; from batch k on = the tail."""
    loader = Loader(table, dataset, "train", 6)
    epochs = [[unpacked(b) for b in loader.epoch(e)] for e in (0, 1)]
    merged = [{t: v for b in batches for t, v in b.items()} for batches in epochs]
    assert merged[0].keys() == merged[1].keys() == stored(table, "train").keys()
    assert [set(b) for b in epochs[0]] != [set(b) for b in epochs[1]]
    changed = [t for t in merged[0] if merged[0][t] != merged[1][t]]
    assert len(changed) > 0.8 * len(merged[0])
    fresh = Loader(table, dataset, "train", 6)
    assert [unpacked(b) for b in fresh.epoch(1, start=3)] == epochs[1][3:]
    assert not list(fresh.epoch(1, start=loader.steps))
    fixed = Loader(table, dataset, "train", 6, redraw=False)
    for e in (0, 1):
        assert {t: v for b in fixed.epoch(e) for t, v in unpacked(b).items()} == merged[0]


def test_drawn_query_is_uniform_over_rows() -> None:
    """Over 4,000 epochs each of 25 rows is query 40 % of the time (binomial, 5 sd), and the rest is support."""
    n, epochs = 25, 4000
    keys = hashed(0, np.arange(epochs)[:, None], 77, np.arange(n), purpose="query")
    share = (keys.argsort(axis=1).argsort(axis=1) < 10).mean(axis=0)
    assert np.abs(share - 0.4).max() < 5 * np.sqrt(0.24 / epochs)


def test_user_and_item_fields_become_bags(data: Location, table: TaskTable, dataset: Dataset) -> None:
    """Each kind of field, known and unknown, for users (through batches) and items, against raw values."""
    users = pl.read_parquet(f"{data.path}/users/part-00000.parquet")
    fields = {f.name: f for f in dataset.user_fields}
    age = fields["age"]
    seen = set()
    for batch in Loader(table, dataset, "train", 9).epoch(0):
        for block in batch:
            assert set(block.user) == set(fields)
            for i, task in enumerate(block.task.tolist()):
                row = users.row(task // 8, named=True)
                seen.add(task // 8)
                gender, tags, ages = (block.user[k] for k in ("gender", "tags", "age"))
                assert gender.weight is None
                assert gender.index[i].tolist() == [row["gender"]]
                value = 0.0 if row["age"] is None else (row["age"] - age.mean) / age.std
                assert ages.index[i].tolist() == [0]
                assert ages.weight is not None
                assert tags.weight is not None
                assert ages.weight[i].tolist() == pytest.approx([value], abs=1e-6)
                bag = [(k, w) for k, w in zip(tags.index[i].tolist(), tags.weight[i].tolist(), strict=True) if w]
                share = 1 / max(len(row["tags"]), 1)
                assert bag == [(k, pytest.approx(share)) for k in row["tags"] or [0]]
    assert {3, 5} & seen
    items = read_items(data, dataset)
    assert items["year"].index.shape == (handmade.ITEMS, 1)
    assert items["year"].weight is None
    assert items["year"].index[7].item() == 0
    weight = items["genres"].weight
    assert weight is not None
    assert torch.allclose(weight.sum(1), torch.ones(handmade.ITEMS))
    assert items["genres"].index[0].tolist() == [0, 0]
    price = items["price"].weight
    assert price is not None
    assert abs(price.mean().item()) < 1e-6
    assert price.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_blocks_keep_their_bounds() -> None:
    """Sorted lengths of many kinds: blocks cover all tasks and pad little; 32 to 128 each, but for very long tasks."""
    for n in (1, 5, 31, 32, 33, 64, 129, 150, 256, 1000):
        for purpose, most in (("short", 6), ("long", 400), ("equal", 1)):
            length = np.sort(3 + (hashed(np.arange(n), purpose=purpose) % np.uint64(most)).astype(np.int64))
            bounds = block_bounds(length)
            assert [0, *(b for _, b in bounds)] == [*(a for a, _ in bounds), n]
            sizes = [b - a for a, b in bounds]
            assert max(sizes) <= BLOCK_MOST
            assert purpose == "long" or min(sizes) >= min(n, BLOCK_LEAST)
            for a, b in bounds:
                half = (b - a) // 2
                assert half * (length[b - 1] - length[a + max(half, 1) - 1]) < BLOCK_WORTH
                if b - a >= 2 * BLOCK_LEAST:  # not forced to its size by the least one
                    assert length[b - BLOCK_LEAST] <= 1.25 * length[a] + 4
    assert block_bounds(np.zeros(0, np.int64)) == []


def test_one_user_one_rating_and_empty_splits(tmp_path: Path) -> None:
    """Splits without tasks give no batch; a task whose rows are all support has an empty query."""
    handmade.make(tmp_path / "two", n=np.array([1, 2]))
    data = Location.of(tmp_path / "two")
    dataset = Dataset.open(data)
    table = tasktable.make(data, "cmml-user", next(s for s in range(9) if _trains(data, s)), {})
    valid = Loader(table, dataset, "valid", 4)
    assert (valid.n_tasks, valid.steps, list(valid.epoch(0)), list(valid.evaluation())) == (0, 0, [], [])
    assert len(valid.tasks()) == 0
    (batch,) = Loader(table, dataset, "train", 4).epoch(0)
    ((support, query),) = unpacked(batch).values()
    assert (len(support), len(query)) == (1, 1)
    part = Path(table.location.path) / table.files[0]["path"]
    one = pq.read_table(part)
    lists = {k: pa.array([v[:1] for v in one[k].to_pylist()], one[k].type) for k in ("item", "label", "time", "role")}
    for name, column in lists.items():
        one = one.set_column(one.column_names.index(name), name, column)
    pq.write_table(one, part)
    (batch,) = Loader(table, dataset, "train", 4).epoch(0)
    (block,) = batch
    assert block.support.mask.tolist() == [[True]]
    assert block.query.item.shape == block.query.mask.shape == (1, 0)


def _trains(data: Location, seed: int) -> bool:
    """Whether the user with two ratings is a training user under this split seed (else there is no table)."""
    try:
        tasktable.make(data, "cmml-user", seed, {})
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: f.unlink(), "this part is missing"),
        (lambda f: f.write_bytes(b"PAR1 no"), "not readable as Parquet"),
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), "not readable as Parquet"),
        (lambda f: _rewrite(f, lambda t: t.slice(1)), "rows where its manifest counts"),
        (lambda f: _rewrite(f, lambda t: t.drop_columns(["label"])), "column label is missing"),
        (lambda f: _rewrite(f, lambda t: _replace(t, "item", 10**6)), "an item is not among the dataset's 50"),
        (lambda f: _rewrite(f, lambda t: _replace(t, "role", 3)), "roles are neither 0 and 1 nor 2 throughout"),
        (lambda f: _rewrite(f, lambda t: _replace(t, "gender", 9)), "field gender has index 9"),
    ],
)
def test_damaged_part_is_named(tmp_path: Path, data: Location, table: TaskTable, damage: Any, says: str) -> None:
    copy = tmp_path / "table"
    shutil.copytree(table.location.path, copy)
    broken = TaskTable.open(Location.of(copy))
    part = next(f["path"] for f in broken.files if f["split"] == "train")
    damage(copy / part)
    with pytest.raises(UserError, match=f"{copy}.*{says}.*(delete .*table|prepare)"):
        Loader(broken, Dataset.open(data), "train", 8)


def _rewrite(file: Path, change: Any) -> None:
    pq.write_table(change(pq.read_table(file)), file)


def _replace(t: pa.Table, name: str, value: int) -> pa.Table:
    """The table with `value` as the first value of a column (of its first list)."""
    values = t[name].to_pylist()
    if isinstance(values[0], list):
        values[0][0] = value
    else:
        values[0] = value
    return t.set_column(t.column_names.index(name), name, pa.array(values, t[name].type))


def test_a_flipped_bit_never_passes_for_other_data(tmp_path: Path, table: TaskTable) -> None:
    """Without the pages' checksums a third of all flipped bits were read as other numbers, without a word."""
    shutil.copytree(table.location.path, tmp_path / "table")
    copy = TaskTable.open(Location.of(tmp_path / "table"))
    part = next(f for f in copy.files if f["split"] == "train")
    file, columns = tmp_path / "table" / part["path"], [*FIXED, "gender"]
    good, whole = file.read_bytes(), copy.read("train", [part["shard"]], columns)
    pages = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    said = []
    for place in range(4, pages, 7):
        file.write_bytes(good[:place] + bytes([good[place] ^ 64]) + good[place + 1 :])
        try:
            assert copy.read("train", [part["shard"]], columns) == whole, f"byte {place}"
        except UserError as e:
            said.append(str(e))
    assert len(said) > pages / 7 / 2
    assert all(file.name in sentence for sentence in said)


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "distmeta-prefetch"]


def test_prefetch_ends_early_and_hands_over_errors(
    table: TaskTable, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, real, calls = Loader(table, dataset, "train", 2, prefetch=1), Collator.batch, []

    def counted(self: Collator, chosen: Any, epoch: int) -> TaskBatch:
        calls.append(epoch)
        return real(self, chosen, epoch)

    monkeypatch.setattr(Collator, "batch", counted)
    batches = loader.epoch(0)
    next(batches)
    assert threads()
    batches.close()  # type: ignore[attr-defined]
    assert not threads()
    assert len(calls) <= 4 < loader.steps  # the one used, one ready, one waiting for room, one under way
    whole = [unpacked(b) for b in loader.epoch(0)]
    assert not threads()
    assert [unpacked(b) for b in Loader(table, dataset, "train", 2, prefetch=0).epoch(0)] == whole

    made = iter(range(3))

    def failing(self: Collator, chosen: Any, epoch: int) -> TaskBatch:
        if next(made, None) is None:
            raise RuntimeError("collating went wrong")
        return real(self, chosen, epoch)

    monkeypatch.setattr(Collator, "batch", failing)
    got: list[TaskBatch] = []
    with pytest.raises(RuntimeError, match="collating went wrong"):
        got.extend(loader.epoch(0))
    assert [unpacked(b) for b in got] == whole[:3]
    assert not threads()


def test_waiting_is_counted_and_prefetch_hides_it(
    table: TaskTable, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collating takes 10 ms, training 40 ms: without a thread all of it is waited for, with one only the first."""
    real = Collator.batch

    def slow(self: Collator, chosen: Any, epoch: int) -> TaskBatch:
        time.sleep(0.01)
        return real(self, chosen, epoch)

    monkeypatch.setattr(Collator, "batch", slow)
    waits = []
    for prefetch in (0, 2):
        loader = Loader(table, dataset, "train", 4, prefetch=prefetch)
        for _ in loader.epoch(0):
            time.sleep(0.04)
        waits.append(loader.wait_seconds / loader.steps)
    assert waits[0] >= 0.01
    assert waits[1] < waits[0] / 2
