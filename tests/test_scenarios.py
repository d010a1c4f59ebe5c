"""Scenario tasks: what the protocol stores, what the loader draws of it, and which lists are ranked."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scenarioworld as world
import torch

from distmeta import draws
from distmeta.commands.prepare import main as prepare
from distmeta.commands.train import main as train
from distmeta.data import pools, tasktable
from distmeta.data.absent import Taken
from distmeta.data.loader import Loader
from distmeta.data.protocols import DRAWN, OFFERED, QUERY, SUPPORT
from distmeta.data.protocols import scenario as protocol
from distmeta.data.scenarios import training_pairs
from distmeta.data.schema import Dataset, Label
from distmeta.data.taskmaker import _hashable
from distmeta.data.tasktable import TaskTable
from distmeta.data.write import write_dataset
from distmeta.errors import UserError
from distmeta.storage import Location


@pytest.fixture(scope="module", params=["genres", "themes"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Location:
    where = tmp_path_factory.mktemp(request.param) / "data"
    world.make(where, themes=request.param == "themes")
    return Location.of(where)


@pytest.fixture(scope="module")
def table(data: Location) -> TaskTable:
    return tasktable.make(data, "cmml-scenario", 0, world.SMALL)


@pytest.fixture(scope="module")
def dataset(data: Location) -> Dataset:
    return Dataset.open(data)


def test_tasks_are_what_loops_over_the_rows_find(data: Location, table: TaskTable) -> None:
    """Positives, items and sizes of every scenario; support and query of the tested ones, their users disjoint."""
    every = world.positives(data.path)
    scenarios = world.kept(every)
    assert 8 <= len(scenarios) < len(every)
    assert table.notes["scenarios"].endswith(f": {len(every)}, of which {len(scenarios)} are used")
    assert sum(table.dropped.values()) == len(every) - len(scenarios)
    found = {split: world.stored(table, split) for split in ("train", "valid", "test")}
    n_test = len(scenarios) - round(232 / 306 * len(scenarios))
    assert [len(tasks) for tasks in found.values()] == [
        len(scenarios) - n_test - (n_valid := round(0.1 * (len(scenarios) - n_test))), n_valid, n_test
    ]  # fmt: skip
    left = Counter(frozenset(pairs) for pairs in scenarios.values())
    for task in found["train"].values():
        assert set(task["role"]) == {DRAWN}
        assert set(task["label"]) == {1.0}
        rows = list(zip(task["user"], task["item"], strict=True))
        assert rows == sorted(set(rows))
        left[frozenset(rows)] -= 1
    for task in (*found["valid"].values(), *found["test"].values()):
        rows = list(zip(task["user"], task["item"], task["label"], task["role"], strict=True))
        items = {i for _, i, _, _ in rows}
        query = {(u, i) for u, i, y, r in rows if r == QUERY and y == 1}
        mine = next(p for p in left if left[p] and {i for _, i in p} == items and query <= p)
        left[mine] -= 1
        support = [(u, i, y) for u, i, y, r in rows if r == SUPPORT]
        assert rows[: len(support)] == [(*s, SUPPORT) for s in support]
        people = {u for u, _ in mine}
        asking = {u for u, _ in query}
        assert query == {(u, i) for u, i in mine if u in asking}
        assert len(asking) == min(world.SMALL["scenario_users"], len(people) - len(people) // 2)
        assert not asking & {u for u, _, _ in support}
        assert [y for _, _, y in support] == [1.0, 0.0] * (len(support) // 2)
        assert len({s[:2] for s in support[::2]}) == len(support) // 2 == world.SMALL["scenario_support"]
        for (u, i, _), (v, j, _) in zip(support[::2], support[1::2], strict=True):
            assert u == v
            assert (u, i) in mine
            assert (v, j) not in mine
            assert j in items
        offered = [(u, i) for u, i, _, r in rows if r == OFFERED]
        assert {i for _, i in offered} == items - {i for _, i, _, r in rows if r != OFFERED}
        assert {u for u, _ in offered} <= {-1}
    assert not any(left.values())
    sizes = [len(set(task["item"])) for task in found["test"].values()]
    for n in (10, 20, 50, 100):
        short = sum(size <= n for size in sizes)
        told = f"1 whatever the ranking in {short} test scenarios with at most {n} candidates" if short else None
        assert table.notes.get(f"recall@{n}") == told
    pairs = {p for task in found["train"].values() for p in zip(task["user"], task["item"], strict=True)}
    user, item = training_pairs(table, Dataset.open(data))
    assert list(zip(user.tolist(), item.tolist(), strict=True)) == sorted(pairs)


def test_asked_users_may_be_kept_out_of_training(data: Location) -> None:
    """With --scenario-apart a fifth of the users is asked alone: in no training scenario and in no support."""
    table = tasktable.make(data, "cmml-scenario", 0, {**world.SMALL, "scenario_apart": True})
    n = Dataset.open(data).users
    held = draws.uniform(0, np.arange(n), purpose="cmml-scenario/apart") < 0.2
    assert 0.05 < held.mean() < 0.4
    scenarios = {frozenset((u, i) for u, i in p if not held[u]): p for p in world.positives(data.path).values()}
    trained = world.stored(table, "train").values()
    assert trained
    for task in trained:
        assert frozenset(zip(task["user"], task["item"], strict=True)) in scenarios
    for task in world.stored(table, "test").values():
        for user, role in zip(task["user"], task["role"], strict=True):
            assert role == OFFERED or held[user] == (role == QUERY)


def test_split_is_the_seeds_and_not_the_chunks(
    data: Location, table: TaskTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made a scenario at a time: the same tasks and hash. Another seed or support: others."""
    monkeypatch.setattr(protocol, "CHUNK_ROWS", 1)
    again = tasktable.make(data, "cmml-scenario", 0, world.SMALL, shards=15)
    assert {s: world.stored(again, s) for s in ("train", "valid", "test")} == {
        s: world.stored(table, s) for s in ("train", "valid", "test")
    }
    assert again.split_hash == table.split_hash
    assert tasktable.make(data, "cmml-scenario", 1, world.SMALL).split_hash != table.split_hash
    fewer = tasktable.make(data, "cmml-scenario", 0, {**world.SMALL, "scenario_support": 5})
    assert fewer.split_hash != table.split_hash


def test_the_split_hash_covers_users() -> None:
    columns = {"task": [8, 8], "item": [1, 1], "split": ["train"] * 2, "role": [2, 2], "user": [1, 2]}
    rows = pl.DataFrame(columns, schema_overrides={"split": pl.Enum(["train"])})
    other, place = rows.with_columns(pl.col("user").reverse()), np.arange(2)
    assert _hashable(rows, place, True) != _hashable(other, place, True)
    assert _hashable(rows, place, False) == _hashable(other, place, False)


def test_episodes_are_drawn_anew_and_right(table: TaskTable, dataset: Dataset) -> None:
    """Sizes, pairs and negatives of three passes an epoch; other draws each pass; resume; several workers."""
    rows = {t: set(zip(r["user"], r["item"], strict=True)) for t, r in world.stored(table, "train").items()}
    loader = Loader(table, dataset, "train", 4, seed=2)
    batches = list(loader.epoch(1))
    assert len(batches) == loader.steps == 3 * -(-len(rows) // 4)
    passes: dict[int, dict[int, object]] = {}
    for batch in batches:
        for task, (support, query) in world.unpacked(batch).items():
            assert passes.setdefault(batch.epoch, {}).setdefault(task, (support, query)) == (support, query)
            assert (len(support), len(query)) == (12, 20)
            pairs = (support + query)[::2], (support + query)[1::2]
            taken = {(u, i) for u, i, y in pairs[0] if y == 1}
            assert len(taken) == 16
            assert taken <= rows[task]
            for (u, _, _), (v, j, y) in zip(*pairs, strict=True):
                assert (u, y) == (v, 0)
                assert (v, j) not in rows[task]
                assert j in {i for _, i in rows[task]}
    assert sorted(passes) == [3, 4, 5]
    assert all(found.keys() == rows.keys() for found in passes.values())
    assert all(len({repr(found[t]) for found in passes.values()}) == 3 for t in rows)
    whole = [world.unpacked(b) for b in batches]
    for start in (1, loader.steps // 3, loader.steps - 1):
        assert [world.unpacked(b) for b in loader.epoch(1, start)] == whole[start:]
    apart = [
        [world.unpacked(b) for b in Loader(table, dataset, "train", 4, seed=2, rank=r, world=3).epoch(1)]
        for r in range(3)
    ]
    assert [a | b | c for a, b, c in zip(*apart, strict=True)] == whole
    fixed = Loader(table, dataset, "train", 4, seed=2, redraw=False)
    assert len({(t, repr(r)) for e in (0, 1) for b in fixed.epoch(e) for t, r in world.unpacked(b).items()}) == len(
        rows
    )


def test_streamed_scenarios_are_the_same_tasks(
    data: Location, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pools of some scenarios, batches across their edges: every pass has the same episodes; lists are the same."""
    monkeypatch.setattr("distmeta.data.taskmaker.GROUP_TASKS", 1)
    table = tasktable.make(data, "cmml-scenario", 0, world.SMALL, shards=1)
    for split, most in (("train", 3), ("test", 1)):
        largest = max(pools.estimate(*group, dataset, True) for group in table.groups(split)[0])
        big, small = (Loader(table, dataset, split, 3, memory=m) for m in (None, 2 * largest))
        assert not big.note
        assert small.note.startswith(f"{split}: ")
        assert len(small._plan.pools()) >= 2
        found = []
        for loader in (big, small):
            batches = list(loader.epoch(0) if split == "train" else loader.evaluation())
            found.append({(b.epoch, t): rows for b in batches for t, rows in world.unpacked(b).items()})
        assert len(found[0]) == most * big.n_tasks
        assert found[0] == found[1]


def test_lists_have_all_candidates_of_the_scenario(table: TaskTable, dataset: Dataset, data: Location) -> None:
    """Every query user once with every candidate, label 1 where taken; the users' fields stand with the users."""
    rows = world.stored(table, "test")
    towns = pl.read_parquet(f"{data.path}/users/*.parquet")["town"].to_list()
    found = {}
    for batch in Loader(table, dataset, "test", 2).evaluation():
        found |= world.unpacked(batch)
        assert batch.users is not None
        assert batch.user_fields["town"].index[:, 0].tolist() == [towns[u] for u in batch.users.tolist()]
    assert found.keys() == rows.keys()
    for task, (support, query) in found.items():
        r = rows[task]
        stored = list(zip(r["user"], r["item"], r["label"], r["role"], strict=True))
        assert support == [(u, i, y) for u, i, y, role in stored if role == SUPPORT]
        taken = {(u, i) for u, i, _, role in stored if role == QUERY}
        people, items = sorted({u for u, _ in taken}), sorted(set(r["item"]))
        assert query == [(u, i, float((u, i) in taken)) for u in people for i in items]


def test_lists_are_cut_into_blocks(table: TaskTable, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block ends with a list; however small, the lists together are the same."""
    whole = [world.unpacked(b) for b in Loader(table, dataset, "test", 2).evaluation()]
    monkeypatch.setattr("distmeta.data.scenarios.LIST_ROWS", 50)
    batches = list(Loader(table, dataset, "test", 2).evaluation())
    assert max(len(b.blocks) for b in batches) > 4
    assert max(block.query.item.shape[1] for b in batches for block in b) <= 50
    assert [world.unpacked(b) for b in batches] == whole


def test_rows_of_both_sides_and_moves_keep_users(table: TaskTable, dataset: Dataset) -> None:
    """Taking tasks, joining sides and moving a batch do not lose whose row is whose."""
    batch = next(Loader(table, dataset, "train", 5).epoch(0))
    block = batch.blocks[0]
    one = block.take(torch.tensor([1, 0]))
    assert one.query.user is not None
    assert block.query.user is not None
    assert torch.equal(one.query.user, block.query.user[[1, 0]])
    both = block.rows()
    assert both.user is not None
    assert both.user.shape == both.item.shape
    moved = batch.to("cpu", torch.float64)
    assert moved.users is not None
    assert moved.users.dtype == torch.int64
    assert moved.user_fields.keys() == {"town"}


def test_absent_items_are_counted_right() -> None:
    """Against a loop: the r-th absent of every group, whatever it has taken, each equally often."""
    generator = np.random.default_rng(0)
    taken = [np.sort(generator.permutation(9)[:k]) for k in (0, 1, 4, 8, 8, 3)]
    made = Taken.of(np.array([len(t) for t in taken]), np.concatenate(taken), 10)
    for g, mine in enumerate(taken):
        rest = [p for p in range(9) if p not in mine]
        u = (np.arange(len(rest)) + 0.5) / len(rest)
        assert made.absent(np.full(len(rest), g), np.full(len(rest), 9), u).tolist() == rest
        assert made.absent(np.array([g]), np.array([9]), np.array([np.nextafter(1, 0)])).tolist() == rest[-1:]


def test_users_who_took_everything_are_left_out() -> None:
    """With user 1, who took all of a to c, goes c; then user 2 has taken all that is left; scenario 9 keeps its own."""
    taken = {(7, 1): "abc", (7, 2): "ab", (7, 3): "a", (7, 4): "b", (9, 1): "ab", (9, 2): "bc"}
    pairs = [(s, u, ord(i)) for (s, u), items in taken.items() for i in items]
    rows = pl.DataFrame(pairs, schema=["scenario", "user", "item"], orient="row")
    left, went = protocol._unsated(rows)
    assert went == 2
    assert {tuple(r[:2]) for r in left.rows()} == {(7, 3), (7, 4), (9, 1), (9, 2)}


def test_permuted_is_a_permutation_and_a_fair_one() -> None:
    """Every size maps onto itself; 720 ordered triples of 10 come up equally often (chi-square, 5 sd)."""
    for size in (1, 2, 7, 192, 300, 5000):
        found = draws.permuted(np.arange(size), size, 3, np.arange(3)[:, None], purpose="test")
        assert (np.sort(found, axis=1) == np.arange(size)).all()
        assert size < 7 or not np.array_equal(found[0], found[1])
    n = 50_000
    triple = draws.permuted(np.arange(3), 10, np.arange(n)[:, None], purpose="test") @ [100, 10, 1]
    counts = np.unique(triple, return_counts=True)[1]
    assert len(counts) == 720
    square = ((counts - n / 720) ** 2 / (n / 720)).sum()
    assert abs(square - 719) < 5 * np.sqrt(2 * 719)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scenario_support": 4000}, r"leaves no training tasks \(.*[1-9]\d* scenarios with too few positives"),
        (
            {"scenario_least": 80, "scenario_most": 90},
            r"leaves no training tasks \([1-9]\d* scenarios with too few items",
        ),
        ({"scenario_least": 50}, "--scenario-least 50 is more than --scenario-most 40"),
        ({"scenarios": "actors"}, "--scenarios actors needs the item field actors; there are genres year"),
        ({"scenarios": "own,genres"}, "own stands alone"),
    ],
)
def test_bad_options_are_told(data: Location, options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tasktable.make(data, "cmml-scenario", 0, {**world.SMALL, **options})


def test_own_scenarios_that_are_not_there(tmp_path: Path) -> None:
    one = pl.DataFrame({"user": [1], "item": [1], "label": [1.0], "time": [0]})
    bare = Location.of(tmp_path / "bare")
    sides: dict[str, Any] = {"users": one.select("user"), "items": one.select("item"), "interactions": one}
    write_dataset(bare, name="bare", label=Label("click", 0, 1), user_fields={}, item_fields={}, **sides)
    for given, told in (("own", "has no scenarios of its own; name item"), ("", "no item field tags or genres; name")):
        with pytest.raises(UserError, match=told):
            tasktable.make(bare, "cmml-scenario", 0, {**world.SMALL, "scenarios": given})


def test_methods_of_users_are_refused(data: Location, tmp_path: Path) -> None:
    flags = [x for k, v in world.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    with pytest.raises(UserError, match="melu learns users and the tasks of protocol cmml-scenario are scenarios"):
        train(["melu", "--data", data.path, "--protocol", "cmml-scenario", "--run", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()


def test_damaged_parts_are_told(table: TaskTable, dataset: Dataset) -> None:
    """Users, items and roles that cannot be; the sentence says how to mend it."""
    fewer = dataclasses.replace(dataset, users=3, user_fields=())
    with pytest.raises(UserError, match=r"a user is not among the dataset's 3; delete .* to have it made again"):
        Loader(table, fewer, "test", 2)
    with pytest.raises(UserError, match="an item is not among the dataset's 4; delete"):
        Loader(table, dataclasses.replace(dataset, items=4), "train", 2)


def test_command_says_what_it_made(data: Location, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [x for k, v in world.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    assert prepare(["tasks", "--data", data.path, "--protocol", "cmml-scenario", *flags]) == 0
    said = capsys.readouterr().out
    assert "scenarios with too few items" in said
    assert "note     shared: " in said


def test_scenarios_of_movielens_1m(ml1m: Location) -> None:
    """Genres, genre × decade and genre pairs with 100 to 1,000 items that someone rated 4 or more: 34 of 290."""
    table = tasktable.make(ml1m, "cmml-scenario", 0, {})
    assert "290, of which 34 are used" in table.notes["scenarios"]
    assert table.dropped["scenarios with too few items"] == 254
    assert [table.counts[s]["tasks"] for s in ("train", "valid", "test")] == [23, 3, 8]
    rows = pl.read_parquet(f"{ml1m.path}/interactions/*.parquet").filter(pl.col("label") >= 4)
    liked = rows.group_by("item").agg(pl.col("user").sort())
    names = world.names(ml1m.path)
    items = {
        name: {i for i in liked["item"] if name in names[i]} for name in {n for i in liked["item"] for n in names[i]}
    }
    good = {name: frozenset(mine) for name, mine in items.items() if 100 <= len(mine) <= 1000}
    assert Counter(name.split(":")[0] for name in good) == {"genres": 13, "genres+decade": 14, "genres+genres": 7}
    many = dict(zip(liked["item"], liked["user"].list.len(), strict=True))
    for part in table.read("train"):
        for task in part.select(["user", "item"]).to_pylist():
            assert frozenset(task["item"]) in good.values()
            assert len(set(zip(task["user"], task["item"], strict=True))) == len(task["item"])
            assert len(task["item"]) == sum(many[i] for i in set(task["item"]))
