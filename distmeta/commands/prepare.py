"""`prepare`: raw files -> a dataset, or a dataset and a protocol -> a task table."""

import argparse
import time
from collections.abc import Callable, Sequence

from distmeta.cli import Parser
from distmeta.config import DataOptions
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.fields import add_flags, build, nearest
from distmeta.parallel import submitted
from distmeta.storage import Location

_HELP = """\
usage: prepare SOURCE --out DATASET [...]
       prepare tasks --data DATASET [...]

Turn raw files into a dataset (dataset.json, users/, items/, interactions/, vocabularies/),
or a dataset into tasks.

sources:
  movielens-1m     ratings.dat users.dat movies.dat [movies_extrainfos.dat], as grouplens.org gives them
  movielens-100k   u.data u.user u.item, as grouplens.org gives them
  movielens-20m    ratings.csv movies.csv tags.csv, as grouplens.org gives them
  bookcrossing     BX-Users.csv BX-Books.csv BX-Book-Ratings.csv, as the official dump has them
  taobao-userbehavior  UserBehavior.csv, as tianchi.aliyun.com gives it, or a Parquet table of the same
  taobao-cloud-theme  theme_click_log.csv, as tianchi.aliyun.com gives it: clicks in themes
  table            your own Parquet or CSV files, described by a short YAML file
  hybrid           the scenarios of several prepared datasets in one
  synthetic        a made world whose best possible error is known; --profile: as big as a real log
and:
  tasks            choose users, support and query by a protocol (train does this by itself on first use)

examples:
  python -m jobs.prepare movielens-1m --raw ml-1m --out data/ml-1m
  python -m jobs.prepare table --spec shop.yaml --raw exports --out s3://bucket/shop
  python -m jobs.prepare synthetic --users 2000 --items 500 --out data/made
  python -m jobs.prepare tasks --data data/ml-1m --protocol cmml-user --split-seed 0

`prepare SOURCE --help` explains each.
"""


def main(argv: Sequence[str]) -> int:
    """Run `prepare`; 0 when the dataset or task table is there.

    Raises:
        UserError: usage or bad input.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in _SOURCES:
        raise UserError(f"prepare: unknown source {name!r}{nearest(name, _SOURCES)}; sources: {' '.join(_SOURCES)}")
    return _SOURCES[name](rest)


def _parser(name: str, description: str, epilog: str) -> Parser:
    return Parser(
        prog=f"prepare {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_out(parser: Parser) -> None:
    parser.add_argument(
        "--out", required=True, metavar="DATASET",
        help="new directory or URI for the dataset; refused where one is already",
    )  # fmt: skip


def _movielens_1m(argv: Sequence[str]) -> int:
    parser = _parser(
        "movielens-1m",
        "Read MovieLens 1M (https://grouplens.org/datasets/movielens/1m/).\n"
        "Files: ratings.dat, users.dat, movies.dat.\n"
        "User fields: gender, age, occupation, zip (first five characters); item fields: year, genres.\n"
        "With MeLU's movies_extrainfos.dat beside them also rate, genre, director, actor.",
        "example: python -m jobs.prepare movielens-1m --raw ml-1m --out data/ml-1m",
    )
    parser.add_argument("--raw", required=True, metavar="DIR", help="folder that holds the files")
    _add_out(parser)
    args = parser.parse(argv)
    from distmeta.data.sources.movielens import movielens_1m

    return _make(args.out, lambda out: movielens_1m(Location.of(args.raw), out))


def _movielens_100k(argv: Sequence[str]) -> int:
    parser = _parser(
        "movielens-100k",
        "Read MovieLens 100K (https://grouplens.org/datasets/movielens/100k/): u.data, u.user, u.item.\n"
        "User fields: age (a number), gender, occupation, zip; item fields: year, genres.",
        "example: python -m jobs.prepare movielens-100k --raw ml-100k --out data/ml-100k",
    )
    parser.add_argument("--raw", required=True, metavar="DIR", help="folder that holds the files")
    _add_out(parser)
    args = parser.parse(argv)
    from distmeta.data.sources.movielens import movielens_100k

    return _make(args.out, lambda out: movielens_100k(Location.of(args.raw), out))


def _movielens_20m(argv: Sequence[str]) -> int:
    parser = _parser(
        "movielens-20m",
        "Read MovieLens 20M (https://grouplens.org/datasets/movielens/20m/): ratings.csv, movies.csv, tags.csv.\n"
        "No user fields; item fields: year, genres, tags (those that users gave, in lower case). Tags are the\n"
        "scenarios of --protocol cmml-scenario; CMML takes every rating as a positive: --positive-from 0 there.",
        "example: python -m jobs.prepare movielens-20m --raw ml-20m --out data/ml-20m",
    )
    parser.add_argument("--raw", required=True, metavar="DIR", help="folder that holds the files")
    parser.add_argument(
        "--tag-users", type=int, default=1, metavar="N", help="users who must have given a movie a tag [1]"
    )
    _add_out(parser)
    args = parser.parse(argv)
    from distmeta.data.sources.movielens20m import movielens_20m

    return _make(args.out, lambda out: movielens_20m(Location.of(args.raw), out, args.tag_users))


def _taobao_cloud_theme(argv: Sequence[str]) -> int:
    parser = _parser(
        "taobao-cloud-theme",
        "Read Taobao's cloud themes (https://tianchi.aliyun.com/dataset/9716): theme_click_log.csv, with a header\n"
        "and the columns user_id, item_id, theme_id and maybe leaf_cate_id, cate_level1_id, reach_time. Every line\n"
        "is a click in a theme; themes are the scenarios of --protocol cmml-scenario. Item fields: category (leaf)\n"
        "and category1.",
        "example: python -m jobs.prepare taobao-cloud-theme --raw themes --out data/themes",
    )
    parser.add_argument("--raw", required=True, metavar="DIR", help="folder that holds the file")
    _add_out(parser)
    args = parser.parse(argv)
    from distmeta.data.sources.taobao_themes import taobao_cloud_theme

    return _make(args.out, lambda out: taobao_cloud_theme(Location.of(args.raw), out))


def _bookcrossing(argv: Sequence[str]) -> int:
    parser = _parser(
        "bookcrossing",
        "Read Book-Crossing (Ziegler et al., WWW 2005), the dump BX-CSV-Dump.zip.\n"
        "Files: BX-Users.csv, BX-Books.csv, BX-Book-Ratings.csv.\n"
        "User fields: age (a number; unknown outside 5 to 110), country, region, city; item fields: author, year,\n"
        "publisher."
        " Methods use age, country and the items' fields, as the papers do. There are no times: a user's\n"
        "ratings are taken as in order of time in the file. Where there are not as many ratings as in the official\n"
        "file, the dataset's name says that it is a subset.",
        "example: python -m jobs.prepare bookcrossing --raw BX --out data/bookcrossing",
    )
    parser.add_argument("--raw", required=True, metavar="DIR", help="folder that holds the files")
    parser.add_argument(
        "--zeros", action="store_true",
        help="keep ratings of 0 (seen, not rated) as labels, so that they are 0 to 10 [dropped: labels 1 to 10]",
    )  # fmt: skip
    parser.add_argument(
        "--complete", action="store_true",
        help="drop ratings of users without age or country and of books without author, year or publisher, as MAMO",
    )  # fmt: skip
    _add_out(parser)
    args = parser.parse(argv)
    from distmeta.data.sources.bookcrossing import bookcrossing

    raw, keep = Location.of(args.raw), {"zeros": args.zeros, "complete": args.complete}
    return _make(args.out, lambda out: bookcrossing(raw, out, **keep))


def _taobao_userbehavior(argv: Sequence[str]) -> int:
    from distmeta.data.sources.taobao import Recipe, taobao_userbehavior

    parser = _parser(
        "taobao-userbehavior",
        "Read Taobao's user behaviour (https://tianchi.aliyun.com/dataset/649) as clicks, 0 or 1.\n"
        "Files: UserBehavior.csv (user, item, category, pv|cart|fav|buy, time), or interactions.parquet with the\n"
        "columns user, item, behavior and maybe category and timestamp. One row a user and item. By default the\n"
        "weakest behaviour (of pv, fav, cart, buy) is label 0 where none of the others, label 1, is there too.\n"
        "There are no user fields; the item field is the category, where the file has it. The official file holds\n"
        "100 million events; --share takes so much of its users.",
        "examples:\n"
        "  python -m jobs.prepare taobao-userbehavior --raw taobao --share 0.05 --out data/taobao\n"
        "  python -m jobs.prepare taobao-userbehavior --raw taobao --positive buy --shown none --negatives 4 \\\n"
        "    --out data/taobao-buys",
    )
    parser.add_argument("--raw", required=True, metavar="DIR", help="folder that holds the file")
    _add_out(parser)
    add_flags(parser, Recipe, "the labels")
    flags = vars(parser.parse(argv))
    raw, out = Location.of(flags.pop("raw")), flags.pop("out")
    recipe = build(Recipe, flags, "taobao-userbehavior", flags=True)
    return _make(out, lambda where: taobao_userbehavior(raw, where, recipe))


def _table(argv: Sequence[str]) -> int:
    from distmeta.data.sources.table import EXAMPLE, table

    parser = _parser(
        "table",
        "Read your own Parquet or CSV files, described by a YAML file:\n\n"
        + "".join(f"    {line}\n" for line in EXAMPLE.splitlines())
        + "\nField types: categorical, multi_categorical, numeric; `column` is the name where it is absent.\n"
        "Without users or items a side has no fields. Without a time column rows are taken as in order of\n"
        "time. Of one user's rows about one item the last by time is kept. A file whose name ends in\n"
        ".csv has a header; everything else is Parquet (a file, or a folder of parts). Rows in messages\n"
        "count from 1, the header not among them.",
        "example: python -m jobs.prepare table --spec shop.yaml --raw exports --out data/shop",
    )
    parser.add_argument("--spec", required=True, metavar="FILE", help="the YAML file")
    parser.add_argument("--raw", metavar="DIR", help="folder that the spec's files are relative to [the spec's own]")
    _add_out(parser)
    args = parser.parse(argv)
    spec = Location.of(args.spec)
    raw = Location.of(args.raw) if args.raw else spec.parent
    return _make(args.out, lambda out: table(spec, raw, out))


def _hybrid(argv: Sequence[str]) -> int:
    from distmeta.data.protocols.scenario import CHOICE

    parser = _parser(
        "hybrid",
        "Put the scenarios of several prepared datasets into one: their positives become clicks in scenarios of\n"
        "its own, called DATASET: scenario. --protocol cmml-scenario then tells the datasets apart as cohorts.",
        "example: python -m jobs.prepare hybrid --of data/ml-1m data/themes --out data/hybrid",
    )
    parser.add_argument("--of", required=True, nargs="+", metavar="DATASET", help="the prepared datasets")
    for name in CHOICE:
        f = DataOptions.__dataclass_fields__[name]
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(f.default), default=f.default, metavar="VALUE",
            help=f.metadata["help"].removeprefix("cmml-scenario: ").replace("%", "%%"),
        )  # fmt: skip
    _add_out(parser)
    args = parser.parse(argv)
    options = {name: getattr(args, name) for name in CHOICE}
    build(DataOptions, options, "prepare hybrid", flags=True)
    from distmeta.data.sources.hybrid import hybrid

    parts = [Location.of(part) for part in args.of]
    return _make(args.out, lambda out: hybrid(parts, out, options))


def _synthetic(argv: Sequence[str]) -> int:
    given = [a.split("=")[0] for a in argv]
    if "--profile" in given:
        return _load(argv)
    if big := next((a for a in given if a in ("--interactions", "--scenarios", "--labels", "--jobs")), None):
        raise UserError(f"prepare synthetic: {big} goes with --profile, which says whose log the world is to be like")
    from distmeta.data.sources.synthetic import Recipe, generate

    parser = _parser(
        "synthetic",
        "Make a world of clusters: ratings 1 to 5 (continuous) from user and item factors that fields tell\n"
        "in part, plus noise. dataset.json says under extra.bayes what error an oracle has. The same seed\n"
        "makes the same data. With --preference-clusters or --minor the users have one of a few tastes; which\n"
        "one is in the fields planted_cluster and planted_group, which methods do not read.\n"
        "With --profile {taobao,movielens-1m,bookcrossing} a world as big as those, or of any size, is written in\n"
        "little memory; its own flags: prepare synthetic --profile taobao --help.",
        "examples:\n"
        "  python -m jobs.prepare synthetic --users 2000 --items 500 --seed 1 --out data/made\n"
        "  python -m jobs.prepare synthetic --users 1500 --preference-clusters 3 --out data/tastes\n"
        "  python -m jobs.prepare synthetic --users 1500 --minor 0.2 --clicks --out data/few",
    )
    _add_out(parser)
    add_flags(parser, Recipe, "the world")
    flags = vars(parser.parse(argv))
    out = flags.pop("out")
    return _make(out, lambda where: generate(where, **flags))


def _load(argv: Sequence[str]) -> int:
    from distmeta.data.sources.load import Recipe, generate

    parser = _parser(
        "synthetic",
        "Make a world with the sizes, activity, popularity and fields of a real log, or of other sizes with the\n"
        "same marginals. It is written part by part: memory does not grow with the interactions. The same seed\n"
        "makes the same files, whatever --jobs is. Users have one of a few tastes; which one is in the fields\n"
        "planted_cluster and planted_group, which methods do not read. dataset.json says under extra.bayes what\n"
        "error an oracle has, and under extra.bayes_groups among whom. A run that was stopped leaves no dataset:\n"
        "the same command begins anew at the same --out.",
        "examples:\n"
        "  python -m jobs.prepare synthetic --profile movielens-1m --out data/like-ml-1m\n"
        "  python -m jobs.prepare synthetic --profile taobao --users 1000000 --items 4000000 \\\n"
        "    --interactions 100000000 --out data/like-taobao",
    )
    _add_out(parser)
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that write, each in about 0.6 GB [one a core]")
    add_flags(parser, Recipe, "the world")
    flags = vars(parser.parse(argv))
    out, jobs = flags.pop("out"), flags.pop("jobs")
    if jobs is not None and jobs < 1:
        raise UserError(f"synthetic: --jobs must be at least 1, not {jobs}")
    return _make(out, lambda where: generate(where, jobs, **flags))


def _tasks(argv: Sequence[str]) -> int:
    parser = _parser(
        "tasks",
        "Choose training, validation and test users, their support and query, by a protocol, and store them\n"
        "under DATASET/tasks/. `train` does it on first use; here you see the counts and the split's hash.",
        "example: python -m jobs.prepare tasks --data data/ml-1m --protocol cmml-user --split-seed 0",
    )
    add_flags(parser, DataOptions, "which tasks")
    data = build(DataOptions, vars(parser.parse(argv)), "prepare tasks", flags=True)
    if not data.data:
        raise UserError("prepare tasks: --data is missing; name a dataset made by `prepare SOURCE --out`")
    submitted.check("--data", data.data)
    from distmeta.data import protocols, tasktable

    start = time.perf_counter()
    made = tasktable.make(Location.of(data.data), data.protocol, data.split_seed, protocols.protocol_options(data))
    for why, n in made.dropped.items():
        print(f"dropped  {n:,} {why.replace('_', ' ')}")
    for split, counts in made.counts.items():
        cohorts = ", ".join(f"{name} {c['tasks']:,}" for name, c in made.cohorts.get(split, {}).items())
        print(f"{split:<9}{counts['tasks']:,} tasks, {counts['rows']:,} rows" + (f" ({cohorts})" if cohorts else ""))
    for what, note in made.notes.items():
        print(f"note     {what}: {note}")
    print(f"split    {made.split_hash}")
    print(f"tasks    {made.location} ({time.perf_counter() - start:.1f} s)")
    return 0


def _make(out: str, source: Callable[[Location], Dataset]) -> int:
    """Run a source and print what it read, dropped and wrote."""
    submitted.check("--out", out)
    start = time.perf_counter()
    where = Location.of(out)
    dataset = source(where)
    extra = dataset.extra
    if extra["read"]:
        print("read     " + ", ".join(f"{n:,} {what}" for what, n in extra["read"].items()))
    for why, n in extra["dropped"].items():
        print(f"dropped  {n:,} {why.replace('_', ' ')}")
    for note in extra["notes"]:
        print(f"note     {note}")
    if "bayes" in extra:
        print("bayes    " + ", ".join(f"{metric} {value:.4f}" for metric, value in extra["bayes"].items()))
    for side, fields in (("user", dataset.user_fields), ("item", dataset.item_fields)):
        sizes = ", ".join(f.name if f.type == "numeric" else f"{f.name} ({f.size - 1:,} values)" for f in fields)
        print(f"{side:<9}{sizes or 'no fields'}")
    print(f"wrote    {dataset.users:,} users, {dataset.items:,} items, {dataset.interactions:,} interactions")
    print(f"dataset  {where} ({time.perf_counter() - start:.1f} s)")
    return 0


_SOURCES: dict[str, Callable[[Sequence[str]], int]] = {
    "movielens-1m": _movielens_1m,
    "movielens-100k": _movielens_100k,
    "movielens-20m": _movielens_20m,
    "bookcrossing": _bookcrossing,
    "taobao-userbehavior": _taobao_userbehavior,
    "taobao-cloud-theme": _taobao_cloud_theme,
    "table": _table,
    "hybrid": _hybrid,
    "synthetic": _synthetic,
    "tasks": _tasks,
}
