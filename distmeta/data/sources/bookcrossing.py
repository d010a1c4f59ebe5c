"""Book-Crossing from its official raw files (Ziegler et al., WWW 2005): BX-Users, BX-Books, BX-Book-Ratings.

They are a dump of MySQL: values in double quotes with ; between them, a \\ before a quote or a \\ within a value, NULL
without quotes for no value, latin-1, HTML entities in the books' texts, and in places a line end within a value.
"""

import html
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from distmeta.data.schema import Dataset, FieldType, Label
from distmeta.data.sources.lines import integers, known, last_of_pairs, once, read_lines, refuse
from distmeta.data.write import clear_place, write_dataset
from distmeta.errors import UserError
from distmeta.storage import Location

_GET = "get BX-CSV-Dump.zip, the official dump of Book-Crossing, and give its unpacked folder as --raw"

_USERS = ("User-ID", "Location", "Age")
_BOOKS = (
    "ISBN", "Book-Title", "Book-Author", "Year-Of-Publication", "Publisher",
    "Image-URL-S", "Image-URL-M", "Image-URL-L",
)  # fmt: skip
_RATINGS = ("User-ID", "ISBN", "Book-Rating")
_ID = (1, 2**31 - 1)

OFFICIAL = {"with zeros": 1_149_780, "explicit": 433_671}
"""Ratings of the official file; where there are not so many, the dataset's name says that it is a subset."""

CONTENT = ("age", "country")
"""User fields that methods use; MAMO keeps the country alone of a location, and few users share a city."""

AGES = (5, 110)
"""Ages that are believed (MAMO, appendix A.1.2; PAML believes 10 to 100 of these). Others are unknown."""

YEARS = (1500, 2010)
"""Years of publication that are believed (MAMO, appendix A.1.2). Others, above all 0, are unknown."""

FEW_BROKEN = 5
"""So many lines may be broken, and one more in a hundred; with more of them the file is not what it should be."""

_ESCAPES = (("\\\\", "\ue000", "\\"), ('\\"', "\ue001", '"'))
"""As written; as they stand while a line is cut (no latin-1 text holds these characters); as meant."""

_VALUE = r'(?:"((?:[^"]|"+[^";])*)"|NULL)'
"""A quoted value (a quote that is not escaped belongs to it where no ; or line end follows), or none."""

_BLANK = ("", "n/a", "na", "none", "null", "unknown", "not applicable (na )")
_PLACE = r"^\p{L}[\p{L}\p{M} .,'`&()/-]*$"
"""A place's name; ? and other signs come of a wrong encoding, or of a joke."""


@dataclass
class _Report:
    """What was read, what was not taken over, and what is worth knowing: for the manifest and the screen."""

    read: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def bookcrossing(raw: Location, where: Location, *, zeros: bool = False, complete: bool = False) -> Dataset:
    """BX-Users.csv, BX-Books.csv and BX-Book-Ratings.csv -> a dataset at `where`.

    User fields: age (numeric, in years: the papers cut it at other ages, so that protocols need the number);
    country, region and city (the last, the last but one and the other parts of the location, in small letters). Item
    fields: author, year, publisher. The papers' content is age, country and the items' fields. The unknown value
    stands for what is blank, not believed (AGES, YEARS) or no name of a place. Raw ids are the files'.

    A rated book that BX-Books.csv lacks is kept, all its fields unknown. There are no times: a user's ratings are
    taken as in order of time in the file, as MAMO does, and `time` is the rating's place among those kept.

    Args:
        complete: drop ratings of users without a known age or country and of books without one of their fields, as
            MAMO (§3.1.1, "filter the records that users or items do not have relevant profiles").
        zeros: keep ratings of 0, which mean "seen, not rated", so that labels are 0 to 10, as in HML.

    Raises:
        UserError: a file is missing, has more than a few broken lines or impossible values, with the line; or
            `where` is taken.
    """
    clear_place(where)
    report = _Report()
    files = [raw / f"BX-{name}.csv" for name in ("Book-Ratings", "Users", "Books")]
    ratings, at = _ratings(files[0], report)
    users = _users(files[1], report)
    known(ratings["user"], users["user"], files[0], files[1], at=at)
    books = _books(files[2], report)
    if zeros:
        official = OFFICIAL["with zeros"]
    else:
        ratings, official = _explicit(ratings, files[0], report), OFFICIAL["explicit"]
    name = _name(ratings.height, official, report)
    report.notes.append("no times: a user's ratings are taken as in order of time in the file")
    kept, report.dropped["earlier_ratings_of_the_same_user_and_book"] = last_of_pairs(ratings)
    if complete:
        kept = _complete(kept, users, books, report)
    kept = kept.with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64))  # no gaps: below the number of rows
    user_fields: dict[str, FieldType] = {"age": "numeric"}
    user_fields |= dict.fromkeys(("country", "region", "city"), "categorical")
    item_fields: dict[str, FieldType] = dict.fromkeys(("author", "year", "publisher"), "categorical")
    extra: dict[str, Any] = {
        "source": "bookcrossing",
        "complete": complete,
        "content_fields": {"user": list(CONTENT), "item": list(item_fields)},
        **vars(report),
    }
    return write_dataset(
        where, name=name, label=Label("rating", 0.0 if zeros else 1.0, 10.0), user_fields=user_fields,
        item_fields=item_fields, users=users, items=_with_unlisted(books, kept, report), interactions=kept,
        extra=extra,
    )  # fmt: skip


def _read(file: Location, names: tuple[str, ...], what: str, report: _Report) -> tuple[pl.DataFrame, pl.Series]:
    """The file's whole records as columns of strings (null: no value), and the line that each begins on.

    Broken lines are left out and counted in the report, which names the first.

    Raises:
        UserError: as `read_lines`; another header; no record; or more broken lines than FEW_BROKEN allows.
    """
    lines = read_lines(file, get=_GET)
    header = ";".join(f'"{name}"' for name in names)
    if lines[0] != header:
        raise UserError(f"{file}, line 1: must be {header}; {_GET}")
    for written, standing, _ in _ESCAPES:
        lines = lines.str.replace_all(written, standing, literal=True)
    numbered = pl.DataFrame({"line": lines}).with_row_index("at", offset=1)[1:]
    parts = _cut(numbered["line"], names).with_columns(numbered["at"])
    whole = parts[names[0]].is_not_null()
    joined, broken = _join(numbered.filter(~whole), names)
    parts = pl.concat([parts.filter(whole), joined]).sort("at")
    for _, standing, meant in _ESCAPES:
        parts = parts.with_columns(pl.col(names).str.replace_all(standing, meant, literal=True))
    report.read[what] = parts.height
    if broken:
        first = f"{file}, line {broken[0]}: not {len(names)} values in quotes with ; between them"
        more = f" as {len(broken) - 1:,} more of {len(lines):,} lines are" if len(broken) > 1 else ""
        if len(broken) > FEW_BROKEN + len(lines) // 100 or not parts.height:
            raise UserError(f"{first},{more or ' and there is no other'}; {_GET}")
        report.dropped[f"broken_lines_of_{what}"] = len(broken)
        report.notes.append(f"{first}: left out{more}")
    if not parts.height:
        raise UserError(f"{file}: the file is empty (no records); {_GET}")
    return parts.select(names), parts["at"]


def _cut(text: pl.Series, names: tuple[str, ...]) -> pl.DataFrame:
    """Each text as a record; the first column, which no record leaves out, is null where it is none."""
    parts = text.str.extract_groups(f"^(?s:{';'.join([_VALUE] * len(names))})$").struct.unnest()
    return parts.rename(dict(zip(parts.columns, names, strict=True)))


def _join(rest: pl.DataFrame, names: tuple[str, ...]) -> tuple[pl.DataFrame, list[int]]:
    """Records (with `at`) among lines that are none by themselves (at, line), and where the broken others are.

    A value that holds a line end makes such lines: the first begins like a record, the next ones do not.
    """
    begins = rest["line"].str.contains(r'^"[^"]*";') | (rest["at"].cast(pl.Int64).diff().fill_null(0) != 1)
    runs = rest.group_by(begins.cum_sum().alias("run"), maintain_order=True).agg(
        pl.col("at"), pl.col("line").str.join("\n")
    )
    parts = _cut(runs["line"], names).with_columns(runs["at"].list.first())
    whole = parts[names[0]].is_not_null()
    return parts.filter(whole), runs.filter(~whole)["at"].explode().to_list()


def _ratings(file: Location, report: _Report) -> tuple[pl.DataFrame, pl.Series]:
    """Columns user, item (as written), label (float32) and time (the place in the file), and each one's line."""
    table, at = _read(file, _RATINGS, "ratings", report)
    integers(table, "User-ID", file, *_ID, at=at)
    blank = table["ISBN"].fill_null("") == ""
    refuse(blank, file, lambda i: "no ISBN; fill it in or delete the line", at=at)
    stars = integers(table, "Book-Rating", file, 0, 10, at=at)
    columns = {"user": table["User-ID"], "item": table["ISBN"], "label": stars.cast(pl.Float32)}
    return pl.DataFrame(columns).with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64)), at


def _explicit(ratings: pl.DataFrame, file: Location, report: _Report) -> pl.DataFrame:
    explicit = ratings.filter(pl.col("label") > 0)
    if not explicit.height:
        raise UserError(f"{file}: every rating is 0, which means seen, not rated; add --zeros to keep them as labels")
    report.dropped["ratings_of_0_(seen,_not_rated)"] = ratings.height - explicit.height
    return explicit


def _complete(ratings: pl.DataFrame, users: pl.DataFrame, books: pl.DataFrame, report: _Report) -> pl.DataFrame:
    known_users, known_books = users.drop_nulls(CONTENT), books.drop_nulls()
    kept = ratings.join(known_users, on="user", how="semi", maintain_order="left")
    report.dropped["ratings_of_users_without_age_or_country"] = ratings.height - kept.height
    whole = kept.join(known_books, on="item", how="semi", maintain_order="left")
    report.dropped["ratings_of_books_without_author,_year_or_publisher"] = kept.height - whole.height
    if not whole.height:
        raise UserError("--complete leaves no rating: no user with age and country rated a book with all its fields")
    return whole


def _name(count: int, official: int, report: _Report) -> str:
    """What reports call the dataset; a subset is called one."""
    if count == official:
        return "Book-Crossing"
    report.notes.append(f"{count:,} ratings where the official file has {official:,}: the name says so")
    size = f"{count // 1000:,}k subset" if count >= 1000 else f"subset of {count} ratings"
    return f"Book-Crossing ({size})"


def _users(file: Location, report: _Report) -> pl.DataFrame:
    table, at = _read(file, _USERS, "users", report)
    integers(table, "User-ID", file, *_ID, at=at)
    once(table, "User-ID", file, at=at)
    age = table["Age"].cast(pl.Int64, strict=False)
    wrong = age.is_null() & ~table["Age"].fill_null("").is_in(["", "NULL"])
    refuse(wrong, file, lambda i: f"Age is {table['Age'][i]!r}, not a whole number; mend the line", at=at)
    parts = table["Location"].fill_null("").str.split(",").list.reverse()
    places = {
        "country": parts.list.get(0),
        "region": parts.list.get(1, null_on_oob=True),
        "city": parts.list.slice(2).list.reverse().list.join(","),
    }
    columns = {"user": table["User-ID"], "age": _believed(age, AGES, "ages", report)}
    return pl.DataFrame(columns | {name: _place(value, name, report) for name, value in places.items()})


def _believed(number: pl.Series, bounds: tuple[int, int], what: str, report: _Report) -> pl.Series:
    """The numbers within bounds; others, which are counted, as null."""
    good = number.is_between(*bounds).fill_null(False)
    report.notes.append(
        f"{number.null_count():,} {what} are missing and {(~good).sum() - number.null_count():,} outside "
        f"{bounds[0]} to {bounds[1]}: unknown values"
    )
    return number.set(~good, None)


def _place(value: pl.Series, name: str, report: _Report) -> pl.Series:
    """Names of places, stripped of quotes, stops and commas; blank and garbled ones, the latter counted, as null."""
    text = value.fill_null("").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars(' ".,')
    blank = text.is_in(_BLANK)
    good = text.str.contains(_PLACE) & ~blank
    garbled = int((~good & ~blank).sum())
    if garbled:
        report.notes.append(f"{garbled:,} users' {name} is no name of a place: an unknown value")
    return text.set(~good, None)


def _books(file: Location, report: _Report) -> pl.DataFrame:
    table, at = _read(file, _BOOKS, "books", report)
    refuse(table["ISBN"] == "", file, lambda i: "no ISBN; fill it in or delete the line", at=at)
    once(table, "ISBN", file, at=at)
    year = _believed(table["Year-Of-Publication"].cast(pl.Int64, strict=False), YEARS, "years of books", report)
    texts = {"author": _text(table["Book-Author"]), "year": year, "publisher": _text(table["Publisher"])}
    return pl.DataFrame({"item": table["ISBN"], **texts})


def _text(value: pl.Series) -> pl.Series:
    """A name with HTML entities resolved and white space in order; blank ones as null."""
    coded = value.filter(value.str.contains(r"&#?\w+;")).unique()
    value = value.replace(coded, pl.Series([html.unescape(v) for v in coded], dtype=pl.String))
    value = value.str.replace_all(r"\s+", " ").str.strip_chars()
    return value.set(value.str.to_lowercase().is_in(_BLANK), None)


def _with_unlisted(books: pl.DataFrame, ratings: pl.DataFrame, report: _Report) -> pl.DataFrame:
    """The books and, with no field known, those that are rated but not listed."""
    unlisted = ratings.select("item").join(books, on="item", how="anti", maintain_order="left")
    if unlisted.height:
        distinct = unlisted.unique(maintain_order=True)
        report.notes.append(
            f"{distinct.height:,} rated books ({unlisted.height:,} ratings, {distinct['item'][0]} for one) are not in "
            "BX-Books.csv: kept, all fields unknown"
        )
        books = pl.concat([books, distinct], how="diagonal")
    return books
