"""A made world of scenarios, and its tasks by loops over sets: what tests compare with."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from distmeta.data.schema import Dataset, Label
from distmeta.data.tasktable import TaskTable
from distmeta.data.write import write_dataset
from distmeta.draws import hashed
from distmeta.storage import Location
from distmeta.tasks import TaskBatch

USERS, ITEMS, THEMES = 40, 90, 24
SMALL: dict[str, Any] = {
    "scenario_least": 12,
    "scenario_most": 40,
    "scenario_support": 6,
    "scenario_query": 10,
    "scenario_users": 7,
    "scenario_draws": 3,
}
"""Options that this world has scenarios for."""
GENRES = ("Drama", "Comedy", "Horror", "War", "Western")


def make(where: Path, *, themes: bool) -> Dataset:
    """Ratings of movies with genres and years; or clicks, each in one of THEMES themes, of 8 to 31 items each."""
    user, item = (a.ravel() for a in np.meshgrid(np.arange(USERS), np.arange(ITEMS), indexing="ij"))
    chance = hashed(user, item, purpose="world/rated") % np.uint64(100)
    seen = chance < np.uint64(55)
    rows = {"user": user[seen] + 1, "item": item[seen] + 1, "time": (chance[seen] + np.uint64(9)).astype(np.int64)}
    frame = pl.DataFrame(rows).with_columns(label=pl.Series(1.0 + (chance[seen] % np.uint64(5)).astype(np.float32)))
    if themes:
        theme = (hashed(user, item, purpose="world/theme")[seen] % np.uint64(THEMES)).astype(int)
        reach = 8 + theme
        frame = frame.with_columns(
            item=pl.Series((rows["item"] + theme) % reach + theme * 3 % 50 + 1),
            scenario=pl.Series([f"{'even' if t % 2 == 0 else 'odd'}: {t}" for t in theme.tolist()]),
            label=pl.lit(1.0),
        )
    genres = [[g for k, g in enumerate(GENRES) if hashed(i, k, purpose="world/genre") % 3 == 0] for i in range(ITEMS)]
    items = pl.DataFrame({"item": np.arange(ITEMS) + 1, "genres": genres})
    items = items.with_columns(year=pl.Series([None if i == 5 else 1960 + i % 40 for i in range(ITEMS)]))
    users = pl.DataFrame({"user": np.arange(USERS) + 1, "town": [f"t{u % 4}" for u in range(USERS)]})
    return write_dataset(
        Location.of(where),
        name="world",
        label=Label("click", 0, 1) if themes else Label("rating", 1, 5),
        user_fields={"town": "categorical"},
        item_fields={"genres": "multi_categorical", "year": "categorical"},
        users=users,
        items=items,
        interactions=frame,
        part_rows=300,
    )


def positives(where: str, least: float = 4.0) -> dict[str, set[tuple[int, int]]]:
    """Scenario's name -> its positives (user, item), whatever its size."""
    rows = pl.read_parquet(f"{where}/interactions/*.parquet").to_dicts()
    own = "scenario" in rows[0]
    themes = pl.read_parquet(f"{where}/vocabularies/interaction-scenario.parquet")["value"] if own else []
    of = {} if own else names(where)
    found: dict[str, set[tuple[int, int]]] = {}
    for r in rows:
        for name in [themes[r["scenario"]]] if own else of[r["item"]] if r["label"] >= least else ():
            found.setdefault(name, set()).add((r["user"], r["item"]))
    return found


def names(where: str) -> dict[int, list[str]]:
    """Item -> the scenarios of genres, genres and decades, and pairs of genres that it is in."""
    files = {f: pl.read_parquet(f"{where}/vocabularies/item-{f}.parquet") for f in ("genres", "year")}
    values = {f: table["value"].to_list() for f, table in files.items()}
    found = {}
    for i in pl.read_parquet(f"{where}/items/*.parquet").to_dicts():
        genres, year = sorted(values["genres"][g] for g in i["genres"]), values["year"][i["year"]]
        found[i["item"]] = [f"genres: {g}" for g in genres]
        found[i["item"]] += [f"genres+decade: {g} + {int(year) // 10 * 10}s" for g in genres if year]
        found[i["item"]] += [f"genres+genres: {a} + {b}" for a in genres for b in genres if a < b]
    return found


def kept(scenarios: dict[str, set[tuple[int, int]]]) -> dict[str, set[tuple[int, int]]]:
    """Those that SMALL allows."""
    return {
        name: pairs
        for name, pairs in scenarios.items()
        if SMALL["scenario_least"] <= len({i for _, i in pairs}) <= SMALL["scenario_most"]
        and len(pairs) >= SMALL["scenario_support"] + SMALL["scenario_query"]
    }


def stored(table: TaskTable, split: str) -> dict[int, dict[str, list[Any]]]:
    """Task -> its columns as stored."""
    return {r["task"]: r for part in table.read(split) for r in part.to_pylist()}


def unpacked(batch: TaskBatch) -> dict[int, tuple[list[tuple[int, int, float]], list[tuple[int, int, float]]]]:
    """Task -> support and query rows (user, item, label); a task's blocks of lists are joined."""
    found: dict[int, tuple[list[Any], list[Any]]] = {}
    assert batch.users is not None
    users, items = batch.users.tolist(), batch.items.tolist()
    assert len(set(users)) == len(users)
    assert len(set(items)) == len(items)
    for block in batch:
        assert block.user == {}
        for b, task in enumerate(block.task.tolist()):
            sides = []
            for side in (block.support, block.query):
                assert side.user is not None
                n = int(side.mask[b].sum())
                assert side.mask[b, :n].all()
                columns = (side.user[b, :n].tolist(), side.item[b, :n].tolist(), side.label[b, :n].tolist())
                sides.append([(users[u], items[i], y) for u, i, y in zip(*columns, strict=True)])
            support, query = found.setdefault(task, (sides[0], []))
            assert support == sides[0]
            query += sides[1]
    return found
