"""A dataset as protocols read it: its sides, its vocabularies, and its interactions part by part, all checked."""

from collections.abc import Iterator

import numpy as np
import polars as pl

from distmeta.data.protocols import Source
from distmeta.data.schema import SCENARIOS, Dataset, Field
from distmeta.data.tables import AGAIN, read_part, read_side, to_polars
from distmeta.errors import UserError
from distmeta.storage import Location


class Reading:
    """The dataset at `dataset`, whose manifest is `manifest`."""

    def __init__(self, dataset: Location, manifest: Dataset) -> None:
        self.dataset, self.manifest = dataset, manifest

    def source(self) -> Source:
        """What a protocol plans from."""
        fields = [f.name for f in self.manifest.user_fields]
        users = to_polars(read_side(self.dataset, self.manifest, "users", ["user", "raw_id", *fields]))
        return Source(
            self.manifest,
            self.dataset,
            users,
            self._items(),
            lambda name: self._vocabulary("user", next(f for f in self.manifest.user_fields if f.name == name)),
            self.interactions,
            self._item_field,
            self._scenarios,
        )

    def _item_field(self, name: str) -> pl.DataFrame:
        """item, value of an item field: each known value of each item."""
        field = next(f for f in self.manifest.item_fields if f.name == name)
        file = self.dataset / f"vocabularies/item-{name}.parquet"
        values = to_polars(read_part(file, ["value"], field.size, AGAIN))["value"]
        items = to_polars(read_side(self.dataset, self.manifest, "items", ["item", name])).rename({name: "value"})
        items = items.explode("value") if field.type == "multi_categorical" else items
        if not items["value"].is_between(0, field.size - 1).fill_null(True).all():
            raise UserError(f"{self.dataset / 'items'}: a {name} is not in {file}; {AGAIN}")
        known = items.filter(pl.col("value").fill_null(0) > 0)
        return known.with_columns(values.gather(known["value"]).alias("value"))

    def _scenarios(self) -> pl.Series:
        file = self.dataset / SCENARIOS
        return to_polars(read_part(file, ["value"], self.manifest.scenarios, AGAIN))["value"]

    def _vocabulary(self, side: str, field: Field) -> pl.Series:
        """What the indices of a categorical field stand for; UserError where one of them is not in the file."""
        file = self.dataset / f"vocabularies/{side}-{field.name}.parquet"
        values = to_polars(read_part(file, ["value"], field.size, AGAIN))["value"]
        index = to_polars(read_side(self.dataset, self.manifest, f"{side}s", [field.name]))[field.name]
        if not index.is_between(0, field.size - 1).all():
            raise UserError(f"{self.dataset / f'{side}s'}: a {field.name} is not in {file}; {AGAIN}")
        return values

    def _items(self) -> pl.DataFrame:
        """Items with their year as a number, where the dataset has one."""
        field = next((f for f in self.manifest.item_fields if f.name == "year"), None)
        if field is None or field.type == "multi_categorical":
            return to_polars(read_side(self.dataset, self.manifest, "items", ["item"]))
        items = to_polars(read_side(self.dataset, self.manifest, "items", ["item", "year"]))
        if field.type == "categorical":
            values = self._vocabulary("item", field)
            items = items.with_columns(year=values.cast(pl.Float64, strict=False)[items["year"]])
        return items

    def interactions(self) -> Iterator[pl.DataFrame]:
        """The parts of interactions/, checked: known users and items, sorted by user, no user cut in two."""
        last = -1
        own = ["scenario"] if self.manifest.scenarios else []
        for file in self.manifest.files.get("interactions", []):
            where = self.dataset / file["path"]
            chunk = to_polars(read_part(where, ["user", "item", "label", "time", *own], file["rows"], AGAIN))
            if not len(chunk):
                continue
            user, item = chunk["user"].to_numpy(), chunk["item"].to_numpy()
            checks = {
                "unknown user": (user < 0) | (user >= self.manifest.users),
                "unknown item": (item < 0) | (item >= self.manifest.items),
                "user out of order": np.r_[user[0] <= last, user[1:] < user[:-1]],
                **{f"unknown {c}": ~chunk[c].is_between(0, self.manifest.scenarios - 1).to_numpy() for c in own},
            }
            for what, bad in checks.items():
                if bad.any():
                    raise UserError(f"{where}, row {int(bad.argmax()) + 1}: {what}; {AGAIN}")
            last = int(user[-1])
            yield chunk
