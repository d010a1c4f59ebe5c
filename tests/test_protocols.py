"""Protocols and task tables: which rows become which tasks, and what happens when a file is not as it should be."""

import dataclasses
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distmeta.config import DataOptions
from distmeta.data import protocols, tasktable
from distmeta.data.tasktable import TaskTable
from distmeta.draws import hashed
from distmeta.errors import RunError, UserError
from distmeta.storage import Location

PINNED = {
    "cmml-user": "ed145ad4d57bca5e29ae507e4aa143e63fc5f8e306046989d0677f703ff7cb79",
    "melu": "3c617abd2b8b358989f0505fa7bd688f0e36bfee3c78822be59a9fade9d37f97",
    "hml": "61d4d526a2987f3b02c8d7dd701b590446c237bbf69c370ff1706215a1087c36",
}
PINNED_OPTIONS = {"paml": {"major_over": 1}}
"""Split hashes of the tiny dataset, split seed 0: another value means another split, so a new protocol version."""
PINNED_OPTIONS = {"paml": {"major_over": 1}}


def rows(table: TaskTable, *splits: str) -> pl.DataFrame:
    """The table's rows: task, user, split, cohort, item, label, time, role, row (position in the task)."""
    parts = [
        pl.DataFrame(pl.from_arrow(t)) for s in splits or ("train", "valid", "test", "seen") for t in table.read(s)
    ]
    lists = ["item", "label", "time", "role"]
    frame = pl.concat(parts).select("task", "user", "split", "cohort", *lists)
    frame = frame.with_columns(row=pl.int_ranges(pl.col("item").list.len()))
    return frame.explode(*lists, "row").sort("task", "row")


def pairs(frame: pl.DataFrame) -> set[tuple[int, int]]:
    return set(frame.select("user", "item").iter_rows())


@pytest.fixture(scope="module")
def tiny_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tiny") / "data"
    handmade.make(where)
    return where


def by_user(dataset: Path) -> dict[int, list[tuple[int, float, int]]]:
    """User index -> its (item, label, time) in time order, read back from interactions/."""
    found: dict[int, list[tuple[int, float, int]]] = defaultdict(list)
    for part in sorted((dataset / "interactions").iterdir()):
        for r in pq.read_table(part).to_pylist():
            found[r["user"]].append((r["item"], r["label"], r["time"]))
    return {u: sorted(rs, key=lambda r: r[2]) for u, rs in found.items()}


def lowest(purpose: str, ids: list[int], k: int, seed: int = 0) -> set[int]:
    return set(sorted(ids, key=lambda u: int(hashed(seed, u, purpose=purpose)))[:k])


@pytest.mark.parametrize("clip", [False, True])
def test_cmml_user_is_what_its_definition_says(tiny_at: Path, clip: bool) -> None:
    """Every task of the table against plain Python, one user at a time."""
    table = tasktable.make(Location.of(tiny_at), "cmml-user", 0, {"max_ratings": 30, "clip_training": clip})
    assert table.episode_rows == 30
    users = list(range(handmade.USERS))
    new = lowest("cmml-user/test", users, 12)
    train = [u for u in users if u not in new]
    valid = lowest("cmml-user/valid", train, 5)
    held_out = lowest("cmml-user/held-out", [u for u in train if u not in valid], 12)
    expected: dict[int, tuple[str, str, list[tuple[int, int]]]] = {}
    for u, log in by_user(tiny_at).items():
        later = [] if clip else [(item, 2) for item, _, _ in log[30:]]
        log = log[:30]
        q = 10 if len(log) >= 20 else len(log) // 2
        order = sorted(range(len(log)), key=lambda r: int(hashed(0, u, r, purpose="cmml-user/query")))
        fixed = [(item, int(i in order[:q])) for i, (item, _, _) in enumerate(log)]
        if len(log) < 2:
            continue
        if u in new or u in valid:
            expected[8 * u] = ("test" if u in new else "valid", "C-W", fixed)
            continue
        left = [(item, 2) for item, role in fixed if not (u in held_out and role == 1)] + later
        if len(left) >= 2:
            expected[8 * u] = ("train", "train", left)
        if u in held_out:
            expected[8 * u + 1] = ("test", "W-W", fixed)
    made: dict[int, tuple[str, str, list[tuple[int, int]]]] = {}
    for r in rows(table).iter_rows(named=True):
        made.setdefault(r["task"], (r["split"], r["cohort"], []))[2].append((r["item"], r["role"]))
    assert made == expected
    assert table.dropped["users with fewer than 2 ratings"] == 1
    assert table.counts["train"] == {
        "tasks": sum(v[0] == "train" for v in expected.values()),
        "rows": sum(len(v[2]) for v in expected.values() if v[0] == "train"),
    }
    assert table.cohorts["test"]["W-W"]["tasks"] == sum(v[1] == "W-W" for v in expected.values())


def test_cmml_user_never_leaks(small: Location) -> None:
    """Users of valid and C-W have no training row; a W-W query row is not in its user's training task."""
    for seed in (0, 1):
        table = tasktable.make(small, "cmml-user", seed, {})
        train, valid, test = (rows(table, s) for s in ("train", "valid", "test"))
        new, held = test.filter(pl.col("cohort") == "C-W"), test.filter(pl.col("cohort") == "W-W")
        users = [set(f["user"]) for f in (train, valid, new)]
        assert sum(map(len, users)) == len(set.union(*users)) == 200
        assert set(held["user"]) <= users[0]
        assert len(users[2]) == held["user"].n_unique() == 40
        query = held.filter(pl.col("role") == 1)
        assert not pairs(query) & pairs(train)
        assert pairs(held.filter(pl.col("role") == 0)) <= pairs(train)
        assert set(train["role"]) == {2}
        assert set(test["role"]) == {0, 1}


def melu_list(tmp_path: Path, ids: list[int]) -> str:
    file = tmp_path / "cold.txt"
    file.write_text("".join(f"{i}\n" for i in ids))
    return str(file)


@pytest.mark.parametrize("year", ["categorical", "numeric", ""])
def test_melu_is_what_its_definition_says(tmp_path: Path, year: str) -> None:
    """States by user list and item year (hash where there is none), 13–100 ratings, 10 query rows, by plain Python."""
    data = tmp_path / "data"
    handmade.make(data, year=year)
    cold_users = set(range(0, handmade.USERS, 3))
    options = {"cold_users": melu_list(tmp_path, [u + 101 for u in cold_users])}
    table = tasktable.make(Location.of(data), "melu", 0, options)
    cold_items = lowest("melu/items", list(range(handmade.ITEMS)), 10)
    if year:
        cold_items = {i for i in range(handmade.ITEMS) if i != 7 and 1990 + i % 12 >= 1998}
    warm = [u for u in range(handmade.USERS) if u not in cold_users]
    valid = lowest("melu/valid", warm, 4)
    expected = {}
    for u, log in by_user(data).items():
        for state, name in enumerate(("warm", "user-cold", "item-cold", "both-cold")):
            mine = [i for i, _, _ in log if (i in cold_items) == (state >= 2)]
            if (u in cold_users) != (state % 2 == 1) or not 13 <= len(mine) <= 100:
                continue
            order = sorted(range(len(mine)), key=lambda r: int(hashed(0, 8 * u + state, r, purpose="melu/query")))
            fixed = [(item, int(i in order[-10:])) for i, item in enumerate(mine)]
            split = "test" if state else "valid" if u in valid else "train"
            expected[8 * u + state] = (split, name, fixed)
            if split == "train":
                expected[8 * u + 4] = ("seen", "warm", fixed)
    made: dict[int, Any] = {}
    for r in rows(table).iter_rows(named=True):
        made.setdefault(r["task"], (r["split"], r["cohort"], []))[2].append((r["item"], r["role"]))
    assert made == expected
    assert {"train", "valid", "test", "seen"} == {v[0] for v in made.values()}


def test_melu_never_leaks(small: Location) -> None:
    """Training, validation and test share no (user, item); validation and user-cold users have no training row."""
    table = tasktable.make(small, "melu", 0, {})
    train, valid, test, seen = (rows(table, s) for s in ("train", "valid", "test", "seen"))
    assert train["task"].n_unique() > 20
    assert not pairs(train) & pairs(valid)
    assert not (pairs(train) | pairs(valid)) & pairs(test)
    cold = test.filter(pl.col("cohort").is_in(["user-cold", "both-cold"]))
    assert not set(train["user"]) & (set(valid["user"]) | set(cold["user"]))
    assert seen.drop("task", "split").equals(train.drop("task", "split"))
    assert (rows(table).group_by("task").agg((pl.col("role") == 1).sum())["role"] == 10).all()


@pytest.mark.parametrize("protocol", list(PINNED))
def test_split_hash_is_a_property_of_the_split(tmp_path: Path, tiny_at: Path, protocol: str) -> None:
    """Pinned; the same in another folder and with other parts; another for another seed. Tables agree row by row."""
    options = PINNED_OPTIONS.get(protocol, {})
    first = tasktable.make(Location.of(tiny_at), protocol, 0, options)
    handmade.make(tmp_path / "elsewhere", part_rows=100)
    assert len(list((tmp_path / "elsewhere/interactions").iterdir())) > 5
    second = tasktable.make(Location.of(tmp_path / "elsewhere"), protocol, 0, options, shards=3)
    other = tasktable.make(Location.of(tiny_at), protocol, 1, options)
    assert first.split_hash == second.split_hash == PINNED[protocol]
    assert rows(first).equals(rows(second))
    assert first.cohorts == second.cohorts
    assert first.split_hash != other.split_hash


def test_table_is_reused_and_a_changed_dataset_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    handmade.make(data)
    made = tasktable.make(Location.of(data), "cmml-user", 0, {})
    part = data / "tasks" / made.location.name / made.files[0]["path"]
    before = part.stat().st_mtime_ns
    assert tasktable.make(Location.of(data), "cmml-user", 0, {"max_ratings": 100}) == made
    assert part.stat().st_mtime_ns == before
    manifest = data / "dataset.json"
    changed = json.loads(manifest.read_text())
    changed["items"] += 1
    manifest.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"other items.*delete .*tasks/cmml-user-1-0-"):
        tasktable.make(Location.of(data), "cmml-user", 0, {})


def test_half_made_table_is_replaced_and_a_failed_making_leaves_none(tmp_path: Path) -> None:
    data = tmp_path / "data"
    handmade.make(data, part_rows=200)
    made = tasktable.make(Location.of(data), "cmml-user", 0, {})
    folder = Path(made.location.path)
    (folder / "tasks.json").unlink()
    (folder / made.files[0]["path"]).write_bytes(b"half")
    again = tasktable.make(Location.of(data), "cmml-user", 0, {})
    assert again == made
    assert len(rows(again)) == sum(c["rows"] for c in made.counts.values())
    last = sorted((data / "interactions").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{last.name}: not readable as Parquet"):
        tasktable.make(Location.of(data), "cmml-user", 7, {})
    left = [f for _, _, files in os.walk(data / "tasks") for f in files if ".tmp" in f]
    assert not left
    assert not list((data / "tasks").glob("cmml-user-1-7-*/tasks.json"))


def test_full_disk_when_a_part_begins_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handmade.make(tmp_path / "data")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "ParquetWriter", full)
    with pytest.raises(RunError, match="no space left on the device; free some and run the command again"):
        tasktable.make(Location.of(tmp_path / "data"), "cmml-user", 0, {})
    assert [f for _, _, files in os.walk(tmp_path / "data" / "tasks") for f in files] == []


def test_an_option_of_another_protocol_is_refused() -> None:
    """It would change nothing, and whoever set it would not know."""
    known = protocols.protocol_options(DataOptions(protocol="melu", cold_users="list.txt"))
    assert known == {"cold_users": "list.txt"}
    for data, says in (
        (DataOptions(protocol="melu", max_ratings=50), "--max-ratings is for protocol cmml-user, not melu"),
        (DataOptions(cold_users="list.txt"), "--cold-users is for protocol melu, not cmml-user"),
    ):
        with pytest.raises(UserError, match=says):
            protocols.protocol_options(data)


def test_damaged_interactions_are_named(tmp_path: Path) -> None:
    """A user cut in two by parts, an unknown item, or a lost row would make wrong tasks without a word."""
    data = tmp_path / "data"
    handmade.make(data, part_rows=200)
    first, second = sorted((data / "interactions").iterdir())[:2]
    good = second.read_bytes()
    log, user = pq.read_table(second), pq.read_table(first)["user"].to_numpy()[-1]
    users, items = log["user"].to_numpy().copy(), log["item"].to_numpy().copy()
    users[0], items[3] = user, handmade.ITEMS
    for damaged, says in (
        (log.set_column(0, "user", pa.array(users)), "row 1: user out of order"),
        (log.set_column(1, "item", pa.array(items)), "row 4: unknown item"),
        (log.slice(1), f"{len(log) - 1} rows where its manifest counts {len(log)}"),
    ):
        pq.write_table(damaged, second)
        with pytest.raises(UserError, match=f"{second.name}.*{says}.*prepare"):
            tasktable.make(Location.of(data), "cmml-user", 0, {})
    second.write_bytes(good)
    assert tasktable.make(Location.of(data), "cmml-user", 0, {}).split_hash == PINNED["cmml-user"]


def test_cold_user_list_counts_by_content_and_is_checked(tmp_path: Path, tiny_at: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    lists = [melu_list(f, [101, 102, 150]) for f in (one, two)]
    tables = [tasktable.make(Location.of(tiny_at), "melu", 0, {"cold_users": f}) for f in lists]
    assert tables[0] == tables[1]
    assert str(tmp_path) not in (Path(tables[0].location.path) / "tasks.json").read_text()
    for text, says in (
        ("101\n\nnobody\n", "line 3: no user 'nobody'"),
        ("\n", "lists no user"),
        (b"\xff", "not readable"),
    ):
        bad = tmp_path / "bad.txt"
        bad.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=f"bad.txt.*{says}"):
            tasktable.make(Location.of(tiny_at), "melu", 0, {"cold_users": str(bad)})
    with pytest.raises(UserError, match=r"missing\.txt: not readable"):
        tasktable.make(Location.of(tiny_at), "melu", 0, {"cold_users": str(tmp_path / "missing.txt")})


def test_bad_questions_get_a_sentence(tmp_path: Path, tiny_at: Path) -> None:
    where = Location.of(tiny_at)
    with pytest.raises(UserError, match=r"unknown protocol 'melo' \(did you mean melu"):
        tasktable.make(where, "melo", 0, {})
    with pytest.raises(UserError, match="melu has no option max_ratings"):
        tasktable.make(where, "melu", 0, {"max_ratings": 3})
    with pytest.raises(UserError, match="max_ratings is 1; a task needs 2"):
        tasktable.make(where, "cmml-user", 0, {"max_ratings": 1})
    handmade.make(tmp_path / "single", n=np.ones(10, int))
    with pytest.raises(UserError, match=r"no training tasks \(10 users with fewer than 2 ratings"):
        tasktable.make(Location.of(tmp_path / "single"), "cmml-user", 0, {})
    assert not list((tmp_path / "single").glob("tasks/*/tasks.json"))


def test_options_are_those_of_the_command_line() -> None:
    """--protocol offers every protocol, and a default is the same whether a table is made by hand or by `train`."""
    defaults = DataOptions()
    (choice,) = (f for f in dataclasses.fields(DataOptions) if f.name == "protocol")
    assert set(choice.metadata["choices"]) == set(protocols.PROTOCOLS)
    for p in protocols.PROTOCOLS.values():
        assert {name: getattr(defaults, name) for name in p.options} == p.options


def test_movielens_splits_have_the_published_sizes(ml1m: Location) -> None:
    """CMML's 4,832 and 1,208 users; MeLU's released lists give its tasks and ratings in every state."""
    table = tasktable.make(ml1m, "cmml-user", 0, {})
    assert table.counts["train"]["tasks"] + table.counts["valid"]["tasks"] == 4_832
    assert table.cohorts["test"]["C-W"]["tasks"] == table.cohorts["test"]["W-W"]["tasks"] == 1_208
    train, held = rows(table, "train"), rows(table, "test").filter(pl.col("cohort") == "W-W")
    query = held.filter(pl.col("role") == 1)
    assert len(query) == 12_080
    assert not len(query.join(train, on=["user", "item"], how="semi"))
    listed = Path(os.environ["DISTMETA_DATA"]) / "movielens-1m/melu_cold_users.txt"
    melu = tasktable.make(ml1m, "melu", 0, {"cold_users": str(listed)})
    warm = [melu.cohorts[s]["warm"] for s in ("train", "valid")]
    assert (sum(c["tasks"] for c in warm), sum(c["rows"] for c in warm)) == (2_653, 121_811)
    assert melu.cohorts["test"] == {
        "user-cold": {"tasks": 668, "rows": 30_478},
        "item-cold": {"tasks": 2_863, "rows": 106_814},
        "both-cold": {"tasks": 723, "rows": 26_790},
    }
    assert melu.cohorts["seen"] == {"warm": melu.cohorts["train"]["warm"]}
