"""MovieLens 20M from its official files (Harper & Konstan, TiiS 2015; grouplens.org/datasets/movielens/20m).

ratings.csv (userId,movieId,rating,timestamp; half stars from 0.5 to 5), movies.csv (movieId,title,genres; genres
between |) and tags.csv (userId,movieId,tag,timestamp), as the README of ml-20m.zip describes them. There are no users'
fields. A movie's tags are those that users gave it, in lower case: each is a scenario for protocol cmml-scenario.
"""

import polars as pl

from distmeta.data.schema import Dataset, Label
from distmeta.data.sources.csvfile import ids, lines, numbers, read_csv
from distmeta.data.sources.lines import integers, known, last_of_pairs, once
from distmeta.data.write import clear_place, write_dataset
from distmeta.storage import Location

_GET = "get ml-20m.zip from https://grouplens.org/datasets/movielens/20m/ and give its unpacked folder as --raw"
_NO_GENRE = "(no genres listed)"
OFFICIAL = 20_000_263
"""Ratings of the official file; where there are not so many, the dataset's name says so."""


def movielens_20m(raw: Location, where: Location, tag_users: int = 1) -> Dataset:
    """ratings.csv, movies.csv and tags.csv -> a dataset at `where`: ratings 0.5 to 5; fields year, genres, tags.

    Args:
        tag_users: how many users must have given a movie a tag for it to count.

    Raises:
        UserError: a file is missing or damaged, with its line; or `where` is taken.
    """
    clear_place(where)
    files = {name: raw / f"{name}.csv" for name in ("ratings", "movies", "tags")}
    ratings = read_csv(files["ratings"], ("userId", "movieId", "rating", "timestamp"), get=_GET)
    movies = read_csv(files["movies"], ("movieId", "title", "genres"), get=_GET)
    given = read_csv(files["tags"], ("userId", "movieId", "tag"), get=_GET)
    for table, name in ((ratings, "ratings"), (movies, "movies"), (given, "tags")):
        ids(table, "movieId", files[name])
    ids(ratings, "userId", files["ratings"])
    once(movies, "movieId", files["movies"], at=lines(movies))
    stars = numbers(ratings, "rating", files["ratings"], 0.5, 5.0)
    time = integers(ratings, "timestamp", files["ratings"], 0, 2**40, at=lines(ratings))
    known(ratings["movieId"], movies["movieId"], files["ratings"], files["movies"], at=lines(ratings))
    known(given["movieId"], movies["movieId"], files["tags"], files["movies"], at=lines(given))
    rows = pl.DataFrame([ratings["userId"].alias("user"), ratings["movieId"].alias("item"), stars.alias("label"),
                         time.alias("time")])  # fmt: skip
    rows, repeated = last_of_pairs(rows)
    genres = pl.col("genres").str.split("|").list.eval(pl.element().filter(pl.element() != _NO_GENRE))
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$")
    items = movies.select(pl.col("movieId").alias("item"), year.alias("year"), genres)
    items = items.join(_tags(given, tag_users), on="item", how="left", maintain_order="left")
    official = ratings.height == OFFICIAL
    return write_dataset(
        where,
        name="movielens-20m" if official else f"movielens-20m-{ratings.height}-ratings",
        label=Label("rating", 0.5, 5.0),
        user_fields={},
        item_fields={"year": "categorical", "genres": "multi_categorical", "tags": "multi_categorical"},
        users=rows.select(pl.col("user").unique()),
        items=items,
        interactions=rows,
        extra={
            "source": "movielens-20m",
            "content_fields": {"user": [], "item": ["year", "genres"]},
            "read": {"ratings": ratings.height, "movies": movies.height, "tags given": given.height},
            "dropped": {"earlier_ratings_of_the_same_user_and_item": repeated},
            "notes": [] if official else [f"{ratings.height:,} ratings where the official file has {OFFICIAL:,}"],
        },
    )


def _tags(given: pl.DataFrame, users: int) -> pl.DataFrame:
    """item, tags: in lower case, each given by so many users at least."""
    tag = pl.col("tag").str.strip_chars().str.to_lowercase()
    named = given.select(pl.col("movieId").alias("item"), tag.alias("tags"), "userId").filter(pl.col("tags") != "")
    counted = named.group_by("item", "tags").agg(pl.col("userId").n_unique().alias("users"))
    return counted.filter(pl.col("users") >= users).sort("item", "tags").group_by("item").agg(pl.col("tags"))
