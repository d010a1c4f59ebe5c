"""Taobao's cloud themes as clicks, each in its theme (tianchi.aliyun.com, data set 9716; Du et al., KDD 2019).

theme_click_log.csv has a header; its columns, as public code that reads it names them, are user_id, item_id, theme_id,
leaf_cate_id, cate_level1_id and reach_time. A theme is a scenario of the dataset's own: what protocol cmml-scenario
makes tasks of. Read are the clicks alone: theme_item_pool.csv (items offered), user_item_purchase_log.csv (purchases
outside of the themes) and the two files of embeddings made from those are not.
"""

import polars as pl

from distmeta.data.schema import Dataset, FieldType, Label
from distmeta.data.sources.csvfile import ids, lines, read_csv
from distmeta.data.sources.lines import last_of_pairs, refuse
from distmeta.data.write import clear_place, write_dataset
from distmeta.storage import Location

FILE = "theme_click_log.csv"
_GET = "get theme_click_log.csv from https://tianchi.aliyun.com/dataset/9716 and give its folder as --raw"
_CATEGORIES = {"leaf_cate_id": "category", "cate_level1_id": "category1"}
_ISO = r"^\d{4}-\d{2}-\d{2}"


def taobao_cloud_theme(raw: Location, where: Location) -> Dataset:
    """DIR/theme_click_log.csv -> a dataset at `where`: clicks (label 1), each in a theme; item fields: categories.

    Of a user's clicks on an item in one theme the last is kept. Where an item's lines differ in category, its most
    frequent one counts (of equally frequent ones the least).

    Raises:
        UserError: the file is missing or damaged, with its line; or `where` is taken.
    """
    clear_place(where)
    file = raw / FILE
    clicks = read_csv(file, ("user_id", "item_id", "theme_id"), get=_GET, maybe=(*_CATEGORIES, "reach_time"))
    for column in ("user_id", "item_id", "theme_id"):
        ids(clicks, column, file)
    timed = "reach_time" in clicks.columns
    time = _seconds(clicks, file) if timed else pl.repeat(0, clicks.height, dtype=pl.Int64, eager=True)
    named = {"user_id": "user", "item_id": "item", "theme_id": "scenario"}
    rows = clicks.select(pl.col(old).alias(new) for old, new in named.items())
    rows = rows.with_columns(time.alias("time"), label=pl.lit(1.0, pl.Float32))
    kept, repeated = last_of_pairs(rows)
    there = {old: new for old, new in _CATEGORIES.items() if old in clicks.columns}
    items = rows.select(pl.col("item").unique(maintain_order=True))
    for old, new in there.items():
        items = items.join(_usual(clicks, old, new), on="item", how="left", maintain_order="left")
    fields: dict[str, FieldType] = dict.fromkeys(there.values(), "categorical")
    return write_dataset(
        where, name="taobao-cloud-theme", label=Label("click", 0.0, 1.0), user_fields={}, item_fields=fields,
        users=rows.select(pl.col("user").unique()), items=items, interactions=kept,
        extra={
            "source": "taobao-cloud-theme",
            "content_fields": {"user": [], "item": list(fields)},
            "read": {"clicks": clicks.height, "themes": rows["scenario"].n_unique()},
            "dropped": {"earlier_clicks_of_the_same_user,_item_and_theme": repeated},
            "notes": [] if timed else ["no times"],
        },
    )  # fmt: skip


def _usual(clicks: pl.DataFrame, column: str, name: str) -> pl.DataFrame:
    """item and its most frequent value of a column, under `name`; an empty one is no value."""
    counted = clicks.filter(pl.col(column) != "").group_by(pl.col("item_id").alias("item"), pl.col(column).alias(name))
    most = counted.len().sort(["item", "len", name], descending=[False, True, False])
    return most.unique("item", keep="first", maintain_order=True).drop("len")


def _seconds(clicks: pl.DataFrame, file: Location) -> pl.Series:
    """reach_time as seconds: written as such, or like 2018-12-01 08:00:00."""
    text = clicks["reach_time"]
    seconds = text.cast(pl.Int64, strict=False)
    dated = text.set(~text.str.contains(_ISO), None)
    if dated.null_count() < len(dated):
        parsed = dated.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", strict=False, time_unit="us")
        seconds = seconds.fill_null(parsed.dt.epoch("s"))
    refuse(
        seconds.is_null(), file,
        lambda i: f"reach_time is {text[i]!r}; a time is whole seconds or like 2018-12-01 08:00:00, mend the line",
        at=lines(clicks),
    )  # fmt: skip
    return seconds
