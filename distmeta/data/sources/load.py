"""A made world as big as a production log, written part by part: `prepare synthetic --profile NAME`.

Users come in blocks of about PART_ROWS interactions, each a part of interactions/; a block is a pure function of the
arguments and its number (crowd.py), so that any number of processes writes the same files. The Bayes-optimal error is
that of all rows, from a histogram of their noise-free scores that the processes add up.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import connection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distmeta.data.schema import SCENARIOS, Dataset, Field, Label
from distmeta.data.sources import oracle
from distmeta.data.sources.crowd import BINS, FACTORS, LOWEST, WIDTH, Crowd
from distmeta.data.sources.planted import n_tastes
from distmeta.data.sources.profiles import PROFILES
from distmeta.data.tables import PARQUET
from distmeta.data.write import clear_place
from distmeta.errors import RunError, UserError
from distmeta.fields import build, option
from distmeta.process import cores
from distmeta.storage import Location, writing

PART_ROWS = 1_000_000
"""Interactions of a part, unless one user alone has more; decides what a process holds, about 250 bytes for each."""
_SIDE_ROWS = 1_000_000
_ROW_BYTES = 13
"""An interaction on the disk, at most."""
_GROUPS = ("major", "minor")
Table = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What a big world is made from."""

    profile: str = option("taobao", "Whose marginals it has.", tuple(PROFILES))
    users: int | None = option(None, "Number of users [the profile's].", least=1, most=2**31 - 1)
    items: int | None = option(None, "Number of items [the profile's].", least=1, most=2**31 - 1)
    interactions: int | None = option(None, "Number of interactions [as many a user as in the profile].", least=1)
    seed: int = option(0, "What every draw comes from.")
    noise: float = option(0.4, "Standard deviation of the noise, in stars.", above=0)
    preference_clusters: int = option(3, "Planted clusters of users by taste.", least=1)
    minor: float = option(0.2, "Share of minor users, with rare field values and tastes of their own.", least=0)
    scenarios: int = option(0, "Scenarios that interactions take place in, by the item's category; 0: none.", least=0)
    labels: str | None = option(None, "What is observed [as in the profile's log].", ("ratings", "clicks"))

    def crowd(self) -> Crowd:
        """The world of these arguments.

        Raises:
            UserError: sizes that make no sense, or more tastes than there is room for.
        """
        p = PROFILES[self.profile]
        users, items = self.users or p.users, self.items or p.items
        rows = self.interactions or -(-users * p.interactions // p.users)
        tastes = n_tastes(self.preference_clusters, self.minor)
        for flag, bad, need in (
            ("--interactions", rows > users * items,
             f"at most {users * items:,}, {users:,} users times {items:,} items, and is {rows:,}"),
            ("--items", items < p.least, f"at least {p.least}, which every user of {self.profile} meets"),
            ("--interactions", rows < users * p.least,
             f"at least {users * p.least:,}, {p.least} of each of the {users:,} users, and is {rows:,}"),
            ("--minor", not self.minor < 0.5, "below 0.5: minor users are the fewer"),
            ("--preference-clusters", tastes > FACTORS,
             f"fewer: {tastes} tastes are planted, and there is room for {FACTORS}"),
        ):  # fmt: skip
            if bad:
                raise UserError(f"synthetic: {flag} must be {need}")
        clicks = (self.labels or p.labels) == "clicks"
        return Crowd(
            self.profile, users, items, rows, self.seed, self.noise, self.preference_clusters, self.minor,
            self.scenarios, clicks,
        )  # fmt: skip


def generate(where: Location, jobs: int | None = None, **arguments: Any) -> Dataset:
    """Write the world at `where`, the manifest last; `extra["bayes"]` is the error of who knows every score.

    Args:
        jobs: processes that write parts; None: one a core. They change nothing but the time it takes.
        arguments: fields of `Recipe`.

    Raises:
        UserError: arguments that make no world, or `where` is taken. RunError: there is no room on the disk, or a
            process was lost.
    """
    recipe = build(Recipe, arguments, "synthetic", flags=True)
    crowd = recipe.crowd()
    clear_place(where)
    _check_room(where, crowd)
    (where / "interactions").make_dir()
    files: dict[str, list[Table]] = {"users": [], "items": [], "interactions": [], "vocabularies": []}
    fields = _write_sides(where, crowd, files)
    bins = np.zeros((2 * crowd.clusters, BINS), np.int64)
    blocks = _blocks(crowd.counts)
    progress = _Progress(crowd.interactions)
    for number, file, part in _made(where, crowd, blocks, jobs or cores()):
        files["interactions"].append((number, file))  # type: ignore[arg-type]
        bins += part
        progress.add(file["rows"])
    progress.end()
    files["interactions"] = [file for _, file in sorted(files["interactions"], key=lambda f: f[0])]  # type: ignore[index]
    dataset = Dataset(
        f"synthetic-{crowd.profile}", _label(crowd), *fields, users=crowd.users, items=crowd.items,
        interactions=crowd.interactions, extra=_extra(recipe, crowd, bins), scenarios=crowd.scenarios, files=files,
    )  # fmt: skip
    (where / "dataset.json").write_json(dataset.to_json())
    return dataset


def block(crowd: Crowd, first: int, last: int) -> tuple[pa.Table, NDArray[np.int64]]:
    """The interactions of users first … last − 1, sorted by (user, time), and the histogram of their scores.

    Returns:
        user, item, label, time and maybe scenario; [2 × clusters, BINS] rows by (group, cluster) and score.
    """
    users, counts = np.arange(first, last), crowd.counts[first:last]
    row, item = crowd.chosen(users, counts)
    user, score = users[row], crowd.score(users, row, item)
    columns = {
        "user": user.astype(np.int32),
        "item": item.astype(np.int32),
        "label": crowd.labels(user, item, score),
        "time": crowd.times(users, row, counts),
    }
    if crowd.scenarios:
        columns["scenario"] = crowd.scenario(user, item)
    kind = (crowd.few(users) * crowd.clusters + crowd.cluster(users))[row]
    at = np.clip(((score - LOWEST) / WIDTH).astype(np.int64), 0, BINS - 1)
    bins = np.bincount(kind * BINS + at, minlength=2 * crowd.clusters * BINS).reshape(-1, BINS)
    return pa.table(columns), bins


def _blocks(counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """[first, last) users of each part."""
    ends, blocks, first, done = np.cumsum(counts), [], 0, 0
    while first < len(counts):
        last = max(first + 1, int(np.searchsorted(ends, done + PART_ROWS, side="right")))
        blocks.append((first, last))
        first, done = last, int(ends[last - 1])
    return blocks


_mine: list[Any] = []
"""What a process of the pool makes parts of: [where, crowd]."""


def _begin(where: Location, crowd: Crowd) -> None:
    """Make ready a process that makes parts; one of a pool ends with who started it, and leaves Ctrl-C to it."""
    _mine[:] = [where, crowd]
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_outlive, args=(parent.sentinel,), daemon=True).start()


def _outlive(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _part(number: int, first: int, last: int) -> tuple[int, Table, NDArray[np.int64]]:
    where, crowd = _mine
    table, bins = block(crowd, first, last)
    return number, _write(where, f"interactions/part-{number:05d}.parquet", table), bins


def _made(
    where: Location, crowd: Crowd, blocks: Sequence[tuple[int, int]], jobs: int
) -> Iterator[tuple[int, Table, NDArray[np.int64]]]:
    """The parts as they are written, in any order."""
    if min(jobs, len(blocks)) == 1:
        _begin(where, crowd)
        yield from (_part(number, *bounds) for number, bounds in enumerate(blocks))
        return
    # A forked child would inherit the locks of Arrow's and torch's threads, but not the threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(blocks)), context, _begin, (where, crowd)) as pool:
        waiting = [pool.submit(_part, number, *bounds) for number, bounds in enumerate(blocks)]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool:
            raise RunError(
                f"{where}: a process that wrote parts was killed (memory?); try again with fewer --jobs"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_sides(where: Location, crowd: Crowd, files: dict[str, list[Table]]) -> list[tuple[Field, ...]]:
    """users/, items/ and vocabularies/; returns the users' and the items' fields."""
    p = crowd.marginals
    told = {name: list(values) for name, (values, _) in p.fields.items()}
    hidden = {"planted_cluster": [str(i) for i in range(crowd.clusters)], "planted_group": list(_GROUPS)}
    kinds = [str(i) for i in range(len(p.categories))]
    values = {"user": told | hidden, "item": {"category": kinds}}
    for side, names in values.items():
        (where / "vocabularies").make_dir()
        for name, known in names.items():
            table = pa.table({"value": pa.array([None, *known], pa.string())})
            files["vocabularies"].append(_write(where, f"vocabularies/{side}-{name}.parquet", table))
    if crowd.scenarios:
        named = pa.table({"value": pa.array([str(i) for i in range(crowd.scenarios)], pa.string())})
        files["vocabularies"].append(_write(where, SCENARIOS, named))
    for side, n in (("user", crowd.users), ("item", crowd.items)):
        (where / f"{side}s").make_dir()
        for number, start in enumerate(range(0, n, _SIDE_ROWS)):
            table = _side(crowd, side, np.arange(start, min(start + _SIDE_ROWS, n)))
            files[f"{side}s"].append(_write(where, f"{side}s/part-{number:05d}.parquet", table))
    quality = Field("quality", "numeric", mean=float(crowd.item_bias.mean()), std=float(crowd.item_bias.std()) or 1.0)
    user, item = (tuple(Field(k, "categorical", len(v) + 1) for k, v in values[s].items()) for s in ("user", "item"))
    return [user, (*item, quality)]


def _side(crowd: Crowd, side: str, rows: NDArray[np.int64]) -> pa.Table:
    """Some rows of users/ or items/."""
    columns: dict[str, Any] = {side: rows.astype(np.int32), "raw_id": pa.array(rows).cast(pa.string())}
    if side == "user":
        found = {name: crowd.field(name, rows) for name in crowd.marginals.fields}
        found |= {"planted_cluster": crowd.cluster(rows), "planted_group": crowd.few(rows)}
        columns |= {name: (1 + index).astype(np.int32) for name, index in found.items()}
    else:
        columns |= {"category": 1 + crowd.category[rows], "quality": crowd.item_bias[rows]}
    return pa.table(columns)


def _label(crowd: Crowd) -> Label:
    return Label("click", 0.0, 1.0) if crowd.clicks else Label("rating", *crowd.marginals.scale)


def _extra(recipe: Recipe, crowd: Crowd, bins: NDArray[np.int64]) -> dict[str, Any]:
    """The manifest's extra: where it comes from and the Bayes-optimal errors."""
    per_group = bins.reshape(2, crowd.clusters, BINS)
    groups: dict[str, dict[str, Any]] = {
        "planted_cluster": {str(i): per_group[:, i].sum(0) for i in range(crowd.clusters)},
        "planted_group": {name: per_group[i].sum(0) for i, name in enumerate(_GROUPS)},
    }
    return {
        "source": "synthetic-profile",
        "arguments": asdict(recipe)
        | {k: getattr(crowd, k) for k in ("users", "items", "interactions")}
        | {"labels": "clicks" if crowd.clicks else "ratings"},
        "content_fields": {"user": list(crowd.marginals.fields), "item": ["category", "quality"]},
        "bayes": bayes(crowd, bins.sum(0)),
        "bayes_groups": {
            field: {v: {**bayes(crowd, n), "rows": int(n.sum())} for v, n in by.items() if n.any()}
            for field, by in groups.items()
        },
        "read": {},
        "dropped": {},
        "notes": ["bayes is the error, averaged over all interactions, of one who knows every noise-free score"],
    }


def bayes(crowd: Crowd, bins: NDArray[np.int64]) -> dict[str, float]:
    """Least possible errors, on the labels' scale, of rows with this histogram of scores [BINS]."""
    there = np.flatnonzero(bins)
    score = LOWEST + WIDTH * (there + np.float64(0.5))
    if crowd.clicks:
        return oracle.click_bayes(score, crowd.noise, bins[there])
    stretch = crowd.marginals.stretch
    error = oracle.rating_bayes(score, crowd.noise, bins[there])
    return {name: value * (stretch**2 if name == "mse" else stretch) for name, value in error.items()}


def _write(where: Location, path: str, table: pa.Table) -> Table:
    target = where / path
    with writing(target):
        pq.write_table(table, target.path, filesystem=target.fs, row_group_size=1 << 20, **PARQUET)
        size = target.fs.get_file_info(target.path).size
    return {"path": path, "rows": table.num_rows, "bytes": size}


def _check_room(where: Location, crowd: Crowd) -> None:
    """RunError where the local disk has no room for the dataset."""
    if not where.is_local:
        return
    folder = where
    while not folder.is_dir():
        folder = folder.parent
    need = _ROW_BYTES * crowd.interactions + 16 * (crowd.users + crowd.items)
    with writing(where):
        free = shutil.disk_usage(folder.path).free
    if free < need:
        raise RunError(
            f"{where}: about {need / 1e9:,.2f} GB are needed and {free / 1e9:,.2f} GB are free; free some, or give"
            " another --out or fewer --interactions"
        )


class _Progress:
    """One line on a terminal, rewritten; elsewhere one every half minute."""

    def __init__(self, rows: int) -> None:
        self.rows, self.done = rows, 0
        self.start = self.told = time.perf_counter()
        self.live = sys.stderr.isatty()

    def add(self, rows: int) -> None:
        self.done += rows
        now = time.perf_counter()
        if now - self.told < (0.2 if self.live else 30.0) or self.done * 100 < self.rows:
            return  # the rate of a small first part says nothing
        self.told, rate = now, self.done / (now - self.start)
        left = (self.rows - self.done) / rate
        line = f"{self.done:,} of {self.rows:,} interactions, {rate:,.0f}/s, {left:,.0f} s left"
        with contextlib.suppress(OSError):
            print(f"\r{line:<78}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
