"""A tiny dataset with every kind of field, the same on every machine: its numbers are counter hashes."""

from pathlib import Path

import numpy as np
import polars as pl

from distmeta.data.schema import Dataset, Label
from distmeta.data.write import write_dataset
from distmeta.draws import hashed
from distmeta.storage import Location

USERS, ITEMS = 60, 50


def counts() -> np.ndarray:
    """Ratings of each user: 1 for the first, 2 for the second, then 3 to 44."""
    n = (3 + hashed(np.arange(USERS), purpose="tiny/count") % np.uint64(42)).astype(int)
    n[:2] = 1, 2
    return n


def interactions(n: np.ndarray) -> pl.DataFrame:
    """Each user rates n[user] different items, at distinct times, in a scrambled file order."""
    keys = hashed(np.arange(len(n))[:, None], np.arange(ITEMS), purpose="tiny/item")
    user = np.repeat(np.arange(len(n)), n)
    item = np.concatenate([np.argsort(k)[:m] for k, m in zip(keys, n, strict=True)])
    label = 1 + (hashed(user, item, purpose="tiny/label") % np.uint64(5)).astype(float)
    time = (hashed(user, item, purpose="tiny/time") % np.uint64(10**9)).astype(np.int64)
    frame = pl.DataFrame({"user": user + 101, "item": item + 1, "label": label, "time": time})
    return frame[np.argsort(hashed(np.arange(len(frame)), purpose="tiny/row"))]


def make(where: Path, n: np.ndarray | None = None, year: str = "categorical", part_rows: int = 10**6) -> Dataset:
    """The dataset at `where`; raw ids are 101 … for users and 1 … for items. `year`: its type, or "" for none."""
    n = counts() if n is None else n
    user, item = np.arange(len(n)), np.arange(ITEMS)
    tags = [[str(t) for t in range(u % 4)] for u in user]
    users = pl.DataFrame({"user": user + 101, "gender": [None if u == 3 else "FM"[u % 2] for u in user]})
    users = users.with_columns(pl.Series("tags", tags), pl.Series("age", [None if u == 5 else u / 2 for u in user]))
    years = [None if i == 7 else 1990 + i % 12 for i in item]
    genres = [[str(g) for g in range(i % 3)] for i in item]
    items = pl.DataFrame({"item": item + 1, "year": years, "genres": genres, "price": [float(i) for i in item]})
    item_fields = {"year": year, "genres": "multi_categorical", "price": "numeric"}
    return write_dataset(
        Location.of(where),
        name="tiny",
        label=Label("rating", 1.0, 5.0),
        user_fields={"gender": "categorical", "tags": "multi_categorical", "age": "numeric"},
        item_fields={k: v for k, v in item_fields.items() if v},  # type: ignore[misc]
        users=users,
        items=items,
        interactions=interactions(n),
        part_rows=part_rows,
    )
