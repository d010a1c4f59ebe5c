"""Taobao's user behaviour as clicks: the official UserBehavior.csv, or a Parquet table of the same columns.

UserBehavior.csv (tianchi.aliyun.com, data set 649; 100,150,807 events of 987,994 users): user, item, category,
behaviour (pv: a view, cart, fav, buy) and time, without a header. Nobody logged what was shown and left alone, so
what a click is has to be said: one row a user and item, label 1 where one of the user's events on the item is a
`positive` behaviour, 0 where all that there is is a `shown` one; and, where asked for, sampled items that the user
never touched. By default the weakest behaviour of the file (pv, fav, cart, buy) is the shown one and the others are
positive: seen and wanted against seen only, or where there are carts and buys alone, bought against left in the cart.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from distmeta import draws
from distmeta.data.schema import Dataset, FieldType, Label
from distmeta.data.sources import negatives, taobao_files
from distmeta.data.sources.taobao_files import STRENGTH, Events
from distmeta.data.write import clear_place, write_dataset
from distmeta.errors import UserError
from distmeta.fields import option
from distmeta.storage import Location

OFFICIAL = 100_150_807
"""Events of the official file; where there are not so many, the dataset's name says so."""

_LATER = 2**41
"""More than any time: what puts a shown event behind every positive one of its user and item."""


@dataclass(frozen=True)
class Recipe:
    """What becomes a row, and with which label."""

    positive: tuple[str, ...] = option(
        (), "Behaviours that make label 1: some of pv fav cart buy; none given: all but the weakest there is.", STRENGTH
    )
    shown: tuple[str, ...] = option(
        (),
        "Behaviours that make label 0 where no positive one follows; `none`: negatives are sampled ones alone; none"
        " given: the weakest there is, unless it is positive.",
        (*STRENGTH, "none"),
    )
    negatives: int = option(
        0, "Sampled items with label 0 for each positive, on average: the user never touched them.", least=0
    )
    weights: str = option(
        "uniform",
        "How they are sampled: all items alike, or by the number of users who touched them (to the 3/4).",
        ("uniform", "popularity"),
    )
    seed: int = option(0, "What the sampling comes from.")
    share: float = option(1.0, "Keep this share of the users, by a hash of the user's id.", above=0, most=1)


def taobao_userbehavior(raw: Location, where: Location, recipe: Recipe) -> Dataset:
    """DIR/UserBehavior.csv, or DIR/interactions.parquet -> clicks at `where`.

    A row's time is that of the first event that decides its label, a sampled one's that of its positive. Without
    times the rows of a user stand in hashed order, as the order of such files tells the behaviour. No user has
    fields; an item has its category where the file does.

    Raises:
        UserError: no file or two, a damaged one, with its line or row; no label 1 or none of 0; or `where` is taken.
    """
    clear_place(where)
    events = taobao_files.read(raw, recipe.share)
    positive, shown = _sides(events, recipe)
    decided = pl.col("behaviour").replace_strict(
        {**dict.fromkeys(STRENGTH, 2 * _LATER), **dict.fromkeys(shown, _LATER), **dict.fromkeys(positive, 0)},
        return_dtype=pl.Int64,
    )
    pairs = events.table.group_by("user", "item").agg((decided + pl.col("time")).min().alias("key"))
    pairs = pairs.sort("user", "item")  # group_by's order is any
    label = pl.when(pl.col("key") < _LATER).then(1.0).when(pl.col("key") < 2 * _LATER).then(0.0)
    pairs = pairs.with_columns(label.cast(pl.Float32).alias("label"), (pl.col("key") % _LATER).alias("time"))
    rows = pairs.drop_nulls("label").drop("key")
    _check_positive(events.file, positive, rows)
    natural = rows.height
    dropped = {f"events_{why}": n for why, n in events.dropped.items()} | {
        "user-item_pairs_without_a_labelled_behaviour": pairs.height - natural,
    }
    if recipe.negatives:
        drawn, given_up = negatives.sample(
            pairs, rows.filter(pl.col("label") == 1), recipe.negatives, recipe.weights, recipe.seed
        )
        rows = pl.concat([rows, drawn.with_columns(label=pl.lit(0.0, pl.Float32)).select(rows.columns)])
        dropped["sampled_negatives_given_up,_their_users_touched_too_much"] = given_up
    _check_negative(events.file, shown, rows)
    rows = _in_order(rows, events.timed)
    positives = int(rows["label"].sum())
    items, item_fields, notes = _items(events)
    behaviours = events.table["behaviour"]
    counts = ", ".join(f"{n:,} {b}" for b in STRENGTH if (n := (behaviours == b).sum()))
    labels = f"label 1: {' '.join(positive)}; 0: {' '.join(shown) or 'no behaviour'}"
    if recipe.negatives:
        labels += f", and {rows.height - natural:,} sampled ({recipe.negatives} a positive, {recipe.weights})"
    notes = [f"events used: {counts}", f"{labels}; {positives:,} of {rows.height:,} rows are 1", *notes]
    if not events.timed:
        notes.append("no times: a user's rows stand in hashed order")
    extra: dict[str, Any] = {
        "source": "taobao-userbehavior",
        "content_fields": {"user": [], "item": list(item_fields)},
        "read": {"events": events.read},
        "dropped": dropped,
        "notes": notes,
        "labels": {**asdict(recipe), "positive": list(positive), "shown": list(shown), "positives": positives},
    }
    return write_dataset(
        where, name=_name(events, recipe.share), label=Label("click", 0.0, 1.0), user_fields={},
        item_fields=item_fields, users=events.table.select(pl.col("user").unique()), items=items,
        interactions=rows, extra=extra,
    )  # fmt: skip


def _sides(events: Events, recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The behaviours of label 1 and of label 0, chosen from those there are where the recipe does not say.

    Raises:
        UserError: a behaviour on both sides, or nothing that could be a label 0.
    """
    there = set(events.table["behaviour"].unique())
    found = [b for b in STRENGTH if b in there]
    named_none = "none" in recipe.shown
    if named_none and len(recipe.shown) > 1:
        raise UserError("taobao-userbehavior: --shown none stands alone; leave none out, or the behaviours")
    shown = () if named_none else recipe.shown
    positive = recipe.positive or tuple(b for b in found if b not in (shown or (() if named_none else found[:1])))
    if not recipe.shown:
        shown = tuple(b for b in found[:1] if b not in positive)
    both = sorted(set(positive) & set(shown))
    if both:
        raise UserError(f"taobao-userbehavior: {both[0]} is both --positive and --shown; leave it out of one")
    if not positive and len(found) == 1:
        raise UserError(
            f"{events.file}: all behaviours are {found[0]}; add --positive {found[0]} --shown none --negatives 4, say"
        )
    return positive, shown


def _check_positive(file: Location, positive: Sequence[str], rows: pl.DataFrame) -> None:
    if not (rows["label"] == 1).any():
        raise UserError(f"{file}: no event is {' or '.join(positive)}, so no label is 1; choose another --positive")


def _check_negative(file: Location, shown: Sequence[str], rows: pl.DataFrame) -> None:
    if not (rows["label"] == 0).any():
        why = f"no user has an item with {' or '.join(shown)} alone" if shown else "there is no --shown behaviour"
        raise UserError(f"{file}: {why}, so no label is 0; add --negatives 4, say, to sample some")


def _in_order(rows: pl.DataFrame, timed: bool) -> pl.DataFrame:
    """In an order that tells no label: by a hash within equal times, or for want of times by the hash alone."""
    key = draws.hashed(rows["user"].to_numpy(), rows["item"].to_numpy(), purpose="taobao/order")
    rows = rows.with_columns(pl.Series("key", key)).sort("user", "key", "item").drop("key")
    if timed:
        return rows
    return rows.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).over("user").alias("time"))


def _items(events: Events) -> tuple[pl.DataFrame, dict[str, FieldType], list[str]]:
    """Every item touched, its field, and notes: the category is that of the item's last event."""
    if "category" not in events.table.columns:
        return events.table.select(pl.col("item").unique()), {}, ["no categories: items have no fields; add --item-ids"]
    last = pl.col("category").sort_by("time", "category").last()
    items = events.table.group_by("item").agg(last, pl.col("category").n_unique().alias("several"))
    several = int((items["several"] > 1).sum())
    notes = [f"{several:,} items have several categories: the last is taken"] if several else []
    return items.drop("several"), {"category": "categorical"}, notes


def _name(events: Events, share: float) -> str:
    if not events.official:
        return f"Taobao ({' and '.join(sorted(set(events.table['behaviour'].unique())))}, {events.read:,} events)"
    if events.read != OFFICIAL:
        return f"Taobao UserBehavior (subset of {events.read:,} events)"
    return "Taobao UserBehavior" + (f" ({share:g} of the users)" if share < 1 else "")
