"""MovieLens 1M and 100K from their official raw files (Harper & Konstan, TiiS 2015; grouplens.org)."""

from typing import Any

import polars as pl

from distmeta.data.schema import Dataset, FieldType, Label
from distmeta.data.sources.lines import integers, known, last_of_pairs, once, read_columns, refuse
from distmeta.data.write import clear_place, write_dataset
from distmeta.storage import Location

_GET = "get {0}.zip from https://grouplens.org/datasets/movielens/{1}/ and give its unpacked folder as --raw"
_GET_1M, _GET_100K = _GET.format("ml-1m", "1m"), _GET.format("ml-100k", "100k")
_GET_EXTRA = "take the whole file from MeLU's repository (hoyeoplee/MeLU, movielens/ml-1m), or delete it to go without"

_TIME = (0, 2**40)
_ID = (1, 2**31 - 1)
_STARS = Label("rating", 1.0, 5.0)

MELU_LACKS = ("860", "1795")
"""Movies that MeLU's copies of movies.dat and movies_extrainfos.dat leave out though they are rated."""

_EXTRA = (
    "item",
    "title",
    "year",
    "rate",
    "released",
    "genre",
    "director",
    "writer",
    "actor",
    "plot",
    "poster",
)
_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


def movielens_1m(raw: Location, where: Location) -> Dataset:
    """ratings.dat, users.dat, movies.dat and movies_extrainfos.dat, if it is there, -> a dataset at `where`.

    Fields: gender, age, occupation, zip (first five characters); year, genres. With movies_extrainfos.dat
    also rate, genre, director and actor, cleaned as MeLU does (Lee et al., KDD 2019): values separated by
    ', ', remarks in parentheses stripped from directors, and 'N/A' kept as a value of its own. That gives
    MeLU's 6 rates, 25 genres and 2,186 directors; actors are the 7,978 that the file holds (MeLU has
    8,030 columns for them, so 52 of those are never set). The year is movies_extrainfos.dat's, which MeLU's
    item split goes by, else the title's.

    Raises:
        UserError: a file is missing or damaged, with its line; or `where` is taken.
    """
    clear_place(where)
    ratings = _ratings(raw / "ratings.dat", "::", _GET_1M)
    users_file, items_file, extra_file = raw / "users.dat", raw / "movies.dat", raw / "movies_extrainfos.dat"

    users = read_columns(users_file, "::", ("user", "gender", "age", "occupation", "zip"), get=_GET_1M)
    _check_ids(users, "user", users_file)
    for column in ("age", "occupation"):
        integers(users, column, users_file, 0, 200)

    items = read_columns(items_file, "::", ("item", "title", "genres"), get=_GET_1M)
    _check_ids(items, "item", items_file)
    year = items["title"].str.extract(r"\((\d{4})\)\s*$")
    refuse(
        year.is_null(),
        items_file,
        lambda i: f"the title {items['title'][i]!r} does not end in (year); {_GET_1M}",
    )
    items = items.select("item", year.alias("year"), pl.col("genres").str.split("|"))
    item_fields: dict[str, FieldType] = {"year": "categorical", "genres": "multi_categorical"}
    content = ["year", "genres"]
    notes = []
    if extra_file.exists():
        infos = _extra_infos(extra_file, items["item"], items_file)
        items = items.join(infos, on="item", how="left", maintain_order="left")
        items = items.with_columns(pl.coalesce("year_extra", "year").alias("year"))
        content = ["rate", "genre", "director", "actor"]
        item_fields["rate"] = "categorical"
        item_fields["genre"] = item_fields["director"] = item_fields["actor"] = "multi_categorical"
    else:
        notes.append("no movies_extrainfos.dat: the items have the fields year and genres only")

    read = items.height
    lacking = [i for i in MELU_LACKS if i not in set(items["item"]) and i in set(ratings["item"])]
    if lacking:
        items = pl.concat([items, pl.DataFrame({"item": lacking})], how="diagonal")
        rows = ratings["item"].is_in(lacking).sum()
        notes.append(f"movies {', '.join(lacking)} ({rows} ratings) are not in movies.dat: kept, all fields unknown")
    return _write(
        where, "movielens-1m", raw, ratings, users, items, item_fields, {"movies": read, "notes": notes},
        {"gender": "categorical", "age": "categorical", "occupation": "categorical", "zip": "categorical"},
        {"user": ["gender", "age", "occupation", "zip"], "item": content},
    )  # fmt: skip


def movielens_100k(raw: Location, where: Location) -> Dataset:
    """u.data, u.user, u.item -> the dataset at `where`: age (numeric), gender, occupation, zip; year, genres.

    The year is the release date's; the genre flag 'unknown' means no genre.

    Raises:
        UserError: a file is missing or damaged, with its line; or `where` is taken.
    """
    clear_place(where)
    ratings = _ratings(raw / "u.data", "\t", _GET_100K)
    users_file, items_file = raw / "u.user", raw / "u.item"
    users = read_columns(users_file, "|", ("user", "age", "gender", "occupation", "zip"), get=_GET_100K)
    _check_ids(users, "user", users_file)
    users = users.with_columns(integers(users, "age", users_file, 0, 200))

    flags = [f"genre {name}" for name in _GENRES_100K]
    items = read_columns(items_file, "|", ("item", "title", "released", "video", "url", *flags), get=_GET_100K)
    _check_ids(items, "item", items_file)
    dated = items["released"].str.contains(r"^(\d{1,2}-\w{3}-(\d{4}|\D+))?$")
    refuse(
        ~dated,
        items_file,
        lambda i: f"release date {items['released'][i]!r} is not like 01-Jan-1995; {_GET_100K}",
    )
    year = items["released"].str.extract(r"(\d{4})$")
    for flag in flags:
        integers(items, flag, items_file, 0, 1)
    genres = pl.concat_list(
        pl.when(pl.col(flag) == "1").then(pl.lit(name)) for flag, name in zip(flags[1:], _GENRES_100K[1:], strict=True)
    )
    items = items.select("item", year.alias("year"), genres.list.drop_nulls().alias("genres"))
    return _write(
        where, "movielens-100k", raw, ratings, users, items,
        {"year": "categorical", "genres": "multi_categorical"}, {"movies": items.height, "notes": []},
        {"age": "numeric", "gender": "categorical", "occupation": "categorical", "zip": "categorical"},
        {"user": ["age", "gender", "occupation", "zip"], "item": ["year", "genres"]},
    )  # fmt: skip


def _ratings(file: Location, separator: str, get: str) -> pl.DataFrame:
    table = read_columns(file, separator, ("user", "item", "label", "time"), get=get)
    for side in ("user", "item"):
        integers(table, side, file, *_ID)
    stars = integers(table.rename({"label": "rating"}), "rating", file, 1, 5)
    return table.with_columns(stars.cast(pl.Float32).alias("label"), integers(table, "time", file, *_TIME))


def _check_ids(table: pl.DataFrame, column: str, file: Location) -> None:
    integers(table, column, file, *_ID)
    once(table, column, file)


def _extra_infos(file: Location, items: pl.Series, items_file: Location) -> pl.DataFrame:
    table = read_columns(file, "::", _EXTRA, get=_GET_EXTRA, encoding="utf-8")
    _check_ids(table, "item", file)
    known(table["item"], items, file, items_file)
    integers(table, "year", file, 1800, 2100)
    director = pl.col("director").str.split(", ").list.eval(pl.element().str.replace_all(r"\([^()]*\)", ""))
    year = pl.col("year").alias("year_extra")
    return table.select("item", year, "rate", pl.col("genre", "actor").str.split(", "), director)


def _write(
    where: Location,
    name: str,
    raw: Location,
    ratings: pl.DataFrame,
    users: pl.DataFrame,
    items: pl.DataFrame,
    item_fields: dict[str, FieldType],
    report: dict[str, Any],
    user_fields: dict[str, FieldType],
    content: dict[str, list[str]],
) -> Dataset:
    files = {"movielens-1m": ("ratings.dat", "users.dat", "movies.dat")}.get(name, ("u.data", "u.user", "u.item"))
    known(ratings["user"], users["user"], raw / files[0], raw / files[1])
    known(ratings["item"], items["item"], raw / files[0], raw / files[2])
    extra: dict[str, Any] = {
        "source": name,
        "content_fields": content,
        "read": {"ratings": ratings.height, "users": users.height, "movies": report["movies"]},
        "notes": report["notes"],
    }
    kept, repeated = last_of_pairs(ratings)
    extra["dropped"] = {"earlier_ratings_of_the_same_user_and_item": repeated}
    users = users.with_columns(pl.col("zip").str.slice(0, 5))
    return write_dataset(
        where, name=name, label=_STARS, user_fields=user_fields, item_fields=item_fields,
        users=users, items=items, interactions=kept, extra=extra,
    )  # fmt: skip
