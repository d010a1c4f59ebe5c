"""cmml-scenario: tasks are scenarios, rows are (user, item) pairs (CMML §4.1.1 and §7.2; s²Meta, Du et al., KDD 2019).

What a scenario is: `scenarios` says. `own`: the dataset's own (a click log's themes, a log's markets: the column
scenario of interactions/). Else item fields: `genres` makes one scenario of each value, `genres+decade` one of each
genre and decade of the item's year, `genres+genres` one of each pair; several of these after commas. None given: the
dataset's own, else `tags`, else genres, genre × decade and genre pairs together.

What a positive is: a click (label above 0), or a rating of `positive_from` or more; (user, item) once a scenario. The
scenario's items are those that its positives touch, its candidates all of them, as in the code of s²Meta. A user who
has taken every item is left out, as there is nothing to rank the rest against; what then has the wrong number of items
(scenario_least … scenario_most) or fewer positives than support and query together is no scenario.

Split: by a hash of the scenario's number, 232 in 306 to train on (CMML's share), a tenth of those to validate on.
Scenarios may share items and users, as MovieLens' genres and the paper's tags do; the notes say how much.

A training task holds all positives. An episode, drawn anew by the loader, is scenario_support positives and then
scenario_query others (without replacement, uniform), each followed by its negative: the same user, an item of the
scenario not taken. An epoch draws scenario_draws episodes of each scenario.

A validation or test task is fixed by the split seed. Half its users, by hash, are support users: of their positives
scenario_support are the support (all, where they have fewer), each followed by its negative, in hashed order. The
query are lists: of the other users scenario_users by hash, each with all candidates; what they took is positive. In
s²Meta's code the support users are taken whole until the support is full, so that few users fill it; here support
rows are drawn as in training. Where there are no more candidates than N, Recall@N is 1 for everybody: the notes count
these scenarios.

With scenario_apart the users whose lists are ranked, a fifth of all by hash, are in no training scenario and in no
support: else scenarios that share items show a method in training what test lists ask.

Cohorts are the kinds of scenarios, where there are several: the fields they are made from, or of own scenarios what
their names begin with (`KIND: name`).

Stored rows: DRAWN (training), SUPPORT and QUERY (the positives of query users), and OFFERED: candidates that no other
row of the task has. Rows but support ones stand by (user, item), on which the loader relies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta import draws
from distmeta.data.absent import Taken
from distmeta.data.protocols.base import (
    DRAWN,
    KINDS,
    NEW,
    OFFERED,
    QUERY,
    SCHEMA,
    SUPPORT,
    TRAIN,
    VALID,
    Plan,
    Protocol,
    Source,
    lowest,
    rank,
    runs,
)
from distmeta.errors import UserError

OWN, DECADE = "own", "decade"
KIND = ": "
"""Ends the kind in a scenario's name: the fields it was made from, or the dataset that a log of several has it from."""
TRAIN_SHARE = 232 / 306
APART = 0.2
"""Share of the users that scenario_apart keeps out of training."""
CHUNK_ROWS = 1 << 24
"""Positives that are in memory together while tasks are made, one scenario's at least."""
REASONS = ("scenarios with too few items", "scenarios with too many items", "scenarios with too few positives")
UNASKED = "scenarios to validate or test on without a user whose list is ranked"
"""What --scenario-apart may leave of small ones; one that it leaves without a support stays."""
_DROPPED = 3
"""`Plan.group` of scenarios that are left out, by REASONS."""
_NOBODY = -1
"""User of an OFFERED row."""


@dataclass(frozen=True)
class Scenarios:
    """What the tasks are made of (`Plan.more`)."""

    members: pl.DataFrame | None
    """scenario, item: which items each has; None: the interactions say which scenario they are of."""
    names: pl.Series
    """[scenarios]."""
    cohort: pl.Series
    """[scenarios]: their kinds, where there are several."""
    positives: NDArray[np.int64]
    """[scenarios]."""
    positive: pl.Expr
    """Whether an interaction is a positive."""


def plan(source: Source, split_seed: int, options: Mapping[str, Any]) -> Plan:
    """Which scenarios there are and what becomes of each; one pass that keeps what it counts by scenario and item.

    Raises:
        UserError: `scenarios` names what the dataset has not; the bounds leave no room.
    """
    least, most = options["scenario_least"], options["scenario_most"]
    if least > most:
        raise UserError(f"--scenario-least {least} is more than --scenario-most {most}; leave room between them")
    specs = _specs(source, options["scenarios"])
    positive = pl.col("label") > 0 if source.manifest.label.kind == "click" else None
    positive = pl.col("label") >= options["positive_from"] if positive is None else positive
    members, names = (None, source.scenarios()) if specs == [OWN] else _members(source, specs)
    kinds = names.str.extract(f"^(.+?){KIND}")
    cohort = kinds.fill_null("other") if kinds.n_unique() > 1 else pl.repeat("all", len(names), eager=True)
    counts = _counted(source, members, positive)
    n = len(names)
    scenario = counts["scenario"].to_numpy()
    items, positives = (
        np.bincount(scenario, minlength=n),
        np.bincount(scenario, counts["positives"].to_numpy(), minlength=n).astype(np.int64),
    )
    needed = options["scenario_support"] + options["scenario_query"]
    wrong = np.stack([items < least, items > most, positives < needed])
    good: NDArray[np.bool_] = np.asarray(~wrong.any(axis=0))
    test = lowest(_keys(split_seed, n, "test"), int(good.sum()) - round(TRAIN_SHARE * int(good.sum())), good)
    valid = lowest(_keys(split_seed, n, "valid"), round(0.1 * int((good & ~test).sum())), good & ~test)
    group = np.select([test, valid, good], [NEW, VALID, TRAIN], _DROPPED + wrong.argmax(0)).astype(np.int8)
    notes = {
        "scenarios": f"{', '.join(specs)}: {n:,}, of which {int(good.sum()):,} are used",
        "positives": _POSITIVE[source.manifest.label.kind].format(options["positive_from"]),
    }
    notes |= _told(counts, items, group, names)
    dropped = {why: int((group == _DROPPED + code).sum()) for code, why in enumerate(REASONS)}
    tested = {int(s) * KINDS: names[int(s)] for s in np.flatnonzero(group == NEW)}
    more = Scenarios(members, names, cohort, positives, positive)
    return Plan(split_seed, options, group, notes=notes, dropped=dropped, names=tested, more=more)


_POSITIVE = {"click": "clicks", "rating": "ratings of {:g} or more"}


def _keys(split_seed: int, n: int, purpose: str) -> NDArray[np.uint64]:
    return draws.hashed(split_seed, np.arange(n), purpose=f"cmml-scenario/{purpose}")


def _specs(source: Source, given: str) -> list[str]:
    """What the scenarios are made from; UserError where the dataset has no such field."""
    fields = {f.name: f for f in source.manifest.item_fields}
    if not given:
        usual = [s for s in ("genres", "genres+decade", "genres+genres") if _lacking(s, fields) is None]
        given = OWN if source.manifest.scenarios else "tags" if "tags" in fields else ",".join(usual)
    specs = [s.strip() for s in given.split(",") if s.strip()]
    known = " ".join(f.name for f in fields.values() if f.type != "numeric") or "none"
    if not specs:
        raise UserError(
            f"{source.where}: has no scenarios of its own and no item field tags or genres; name item fields with"
            f" --scenarios ({known})"
        )
    if OWN in specs and len(specs) > 1:
        raise UserError(
            f"--scenarios {given}: {OWN} stands alone; prepare the fields' scenarios as own ones, or choose"
        )
    for spec in specs:
        lacking = _lacking(spec, fields)
        if spec == OWN and not source.manifest.scenarios:
            raise UserError(f"{source.where}: has no scenarios of its own; name item fields with --scenarios ({known})")
        if spec != OWN and lacking is not None:
            raise UserError(
                f"{source.where}: --scenarios {spec} needs the item field {lacking}; there are {known}, and {DECADE}"
                " where the items have a year"
            )
    return specs


def _lacking(spec: str, fields: Mapping[str, Any]) -> str | None:
    """The first field that a product of fields needs and that is not there."""
    for name in spec.split("+"):
        needed = "year" if name == DECADE else name
        if needed not in fields or (fields[needed].type == "numeric" and name != DECADE):
            return needed
    return None


def _members(source: Source, specs: Sequence[str]) -> tuple[pl.DataFrame, pl.Series]:
    """scenario, item by (scenario, item), and the scenarios' names: numbered in the order of specs, then names."""
    years = source.items.select("item", "year").drop_nulls() if "year" in source.items.columns else None
    parts = []
    for spec in specs:
        found: pl.DataFrame | None = None
        for name in spec.split("+"):
            if name == DECADE:
                assert years is not None  # _specs has seen the field
                of = years.select("item", value=(pl.col("year") // 10 * 10).cast(pl.Int32).cast(pl.String) + "s")
            else:
                of = source.field(name)
            if found is None:
                found = of
                continue
            found = found.join(of, on="item", suffix="_right")
            if spec.split("+").count(name) > 1:
                found = found.filter(pl.col("value") < pl.col("value_right"))
            found = found.select("item", value=pl.col("value") + " + " + pl.col("value_right"))
        assert found is not None
        parts.append(found.select("item", name=pl.lit(f"{spec}{KIND}") + pl.col("value"), spec=pl.lit(len(parts))))
    every = pl.concat(parts)
    names = every.select("spec", "name").unique().sort("spec", "name").with_row_index("scenario")
    members = every.join(names, on=["spec", "name"]).select(pl.col("scenario").cast(pl.Int64), "item")
    return members.unique().sort("scenario", "item"), names["name"]


def _counted(source: Source, members: pl.DataFrame | None, positive: pl.Expr) -> pl.DataFrame:
    """scenario, item, positives: of each scenario's items that have any, by (scenario, item)."""
    keys = ["item"] if members is not None else ["scenario", "item"]
    counted = pl.DataFrame(schema={**dict.fromkeys(keys, pl.Int32), "positives": pl.UInt32})
    for chunk in source.chunks():
        pairs = chunk.filter(positive).select("user", *keys).unique()
        more = pairs.group_by(keys).agg(pl.len().alias("positives"))
        counted = pl.concat([counted, more.select(counted.columns)]).group_by(keys).agg(pl.sum("positives"))
    if members is not None:
        counted = members.join(counted, on="item")
    return counted.select(pl.col("scenario").cast(pl.Int64), "item", "positives").sort("scenario", "item")


def _told(counts: pl.DataFrame, items: NDArray[np.int64], group: NDArray[np.int8], names: pl.Series) -> dict[str, str]:
    """What the notes say besides: overlap of items, short candidate sets, the names of the scenarios tested on."""
    code = group[counts["scenario"].to_numpy()]
    item = counts["item"].to_numpy()
    tested = np.unique(item[code == NEW])
    shared = np.isin(tested, item[code == TRAIN]).mean() if len(tested) else 0.0
    short = {n: int((items[group == NEW] <= n).sum()) for n in (10, 20, 50, 100)}
    told = {
        "shared": f"{shared:.0%} of the items of test scenarios are in a training scenario too",
        "test scenarios": "; ".join(names.filter(pl.Series(group == NEW))),
    }
    for n, count in short.items():
        if count:
            told[f"recall@{n}"] = f"1 whatever the ranking in {count:,} test scenarios with at most {n} candidates"
    return told


def chunks(source: Source, plan: Plan) -> Iterator[pl.DataFrame]:
    """The positives of whole scenarios by (scenario, user, item); as many together as CHUNK_ROWS allow, a pass each."""
    s: Scenarios = plan.more
    used = np.flatnonzero(plan.group < _DROPPED)
    cuts = np.cumsum(s.positives[used]) // CHUNK_ROWS
    for cut in np.unique(cuts):
        wanted = pl.DataFrame({"scenario": used[cuts == cut].astype(np.int64)})
        mine = None if s.members is None else s.members.join(wanted, on="scenario", how="semi")
        parts = []
        for chunk in source.chunks():
            rows = chunk.filter(s.positive)
            if mine is not None:
                rows = rows.drop("scenario", strict=False).join(mine, on="item")
            else:
                rows = rows.with_columns(pl.col("scenario").cast(pl.Int64)).join(wanted, on="scenario", how="semi")
            parts.append(rows.group_by("scenario", "user", "item").agg(pl.min("time")))
        yield pl.concat(parts).group_by("scenario", "user", "item").agg(pl.min("time")).sort("scenario", "user", "item")


def tasks(interactions: pl.DataFrame, plan: Plan) -> tuple[pl.DataFrame, dict[str, int]]:
    """Tasks of the scenarios whose positives these are; `protocols.base.Protocol.tasks`."""
    if plan.options["scenario_apart"]:
        trained = plan.group[interactions["scenario"].to_numpy()] == TRAIN
        interactions = interactions.filter(pl.Series(~(trained & _apart(interactions, plan))))
    rows, sated = _unsated(interactions)
    dropped = {"users who took every item of a scenario": sated}
    rows = rows.with_columns(pl.len().over("scenario").alias("positives"))
    needed = plan.options["scenario_support"] + plan.options["scenario_query"]
    enough = (pl.col("positives") >= needed) & (pl.col("user").n_unique().over("scenario") > 1)
    kept = rows.filter(enough).drop("positives")
    kept = kept.with_columns(cohort=plan.more.cohort.gather(kept["scenario"]))
    dropped[REASONS[2]] = rows["scenario"].n_unique() - kept["scenario"].n_unique()
    code = pl.Series(plan.group[kept["scenario"].to_numpy()])
    parts = [_frame(kept.filter(code == TRAIN), "train", pl.lit(DRAWN))]
    dropped[UNASKED] = 0
    for name, wanted in (("valid", VALID), ("test", NEW)):
        made = _fixed(kept.filter(code == wanted), name, plan)
        asked = made.filter(pl.col("role") == QUERY)["task"].unique()
        dropped[UNASKED] += made["task"].n_unique() - len(asked)
        parts.append(made.filter(pl.col("task").is_in(asked.implode())))
    return pl.concat(parts), dropped


def _unsated(rows: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Rows without the users who took every item of a scenario, and how many such users went.

    With a user may go an item, and then another has taken all that is left: until there is none.
    """
    went = 0
    while True:
        items, taken = pl.col("item").n_unique().over("scenario"), pl.len().over("scenario", "user")
        sated = rows.select(taken >= items).to_series()
        if not sated.any():
            return rows, went
        went += rows.filter(sated).select("scenario", "user").n_unique()
        rows = rows.filter(~sated)


def _frame(rows: pl.DataFrame, split: str, role: pl.Expr, label: float = 1.0) -> pl.DataFrame:
    """Rows (scenario, user, item, time, cohort) of a split in SCHEMA."""
    made = rows.with_columns(
        task=pl.col("scenario") * KINDS, split=pl.lit(split), label=pl.lit(label), role=role,
        row_cohort=pl.lit(None),
    )  # fmt: skip
    return made.select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())


def _fixed(rows: pl.DataFrame, split: str, plan: Plan) -> pl.DataFrame:
    """Validation or test tasks of the positives of their scenarios, which are sorted."""
    if not len(rows):
        return pl.DataFrame(schema=SCHEMA)
    scenario, user, item = (rows[c].to_numpy() for c in ("scenario", "user", "item"))
    users = rows.select("scenario", "user").unique(maintain_order=True)
    of = users["scenario"].to_numpy()
    keys = draws.hashed(plan.split_seed, of, users["user"].to_numpy(), purpose="cmml-scenario/users")
    place, many = rank(of, keys), runs(of)[1]
    listed = plan.options["scenario_users"] or len(users)
    supporting = ~_apart(users, plan) if plan.options["scenario_apart"] else place < many // 2
    asked = np.zeros(len(users), bool)
    asked[~supporting] = rank(of[~supporting], keys[~supporting]) < listed
    _, count = _groups(scenario, user)
    supporting, asked = np.repeat(supporting, count), np.repeat(asked, count)
    keys = draws.hashed(plan.split_seed, scenario, user, item, purpose="cmml-scenario/support")
    pool = np.flatnonzero(supporting)
    order = rank(scenario[pool], keys[pool])
    chosen = pool[order < plan.options["scenario_support"]]
    chosen = chosen[np.lexsort((keys[chosen], scenario[chosen]))]
    support = _with_negatives(rows, chosen, count, split, plan)
    query = _frame(rows.filter(pl.Series(asked)), split, pl.lit(QUERY))
    there = pl.concat([support, query]).select("task", "item").unique()
    offered = rows.select("scenario", "item", "cohort").unique().sort("scenario", "item")
    offered = _frame(offered.with_columns(user=_NOBODY, time=0), split, pl.lit(OFFERED), 0.0)
    return pl.concat([support, query, offered.join(there, on=["task", "item"], how="anti", maintain_order="left")])


def _apart(rows: pl.DataFrame, plan: Plan) -> NDArray[np.bool_]:
    """Rows of users who are kept out of training: mask."""
    return draws.uniform(plan.split_seed, rows["user"].to_numpy(), purpose="cmml-scenario/apart") < APART


def _groups(scenario: NDArray[Any], user: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row of each run of one user in one scenario, and the rows of each."""
    first = np.flatnonzero(np.r_[True, (scenario[1:] != scenario[:-1]) | (user[1:] != user[:-1])])
    return first, np.diff(np.r_[first, len(scenario)])


def _with_negatives(
    rows: pl.DataFrame, chosen: NDArray[np.int64], count: NDArray[np.int64], split: str, plan: Plan
) -> pl.DataFrame:
    """The chosen positives, each followed by its negative; `count` rows of each user in each scenario."""
    scenario = rows["scenario"].to_numpy()
    offered = rows.select("scenario", "item").unique().sort("scenario", "item")
    of, items = offered["scenario"].to_numpy(), offered["item"].to_numpy()
    position = rows.select((pl.col("item").rank("dense").over("scenario") - 1).cast(pl.Int64)).to_series().to_numpy()
    taken = Taken.of(count, position, int(runs(of)[1].max()) + 1)
    mine, asking = scenario[chosen], rows[chosen]
    start, end = np.searchsorted(of, mine), np.searchsorted(of, mine, side="right")
    u = draws.uniform(
        plan.split_seed, mine, asking["user"].to_numpy(), asking["item"].to_numpy(), purpose="cmml-scenario/negative"
    )
    group = np.repeat(np.arange(len(count)), count)[chosen]
    absent = items[start + taken.absent(group, end - start, u)]
    pairs = [_frame(asking, split, pl.lit(SUPPORT))]
    pairs.append(_frame(asking.with_columns(item=pl.Series(absent)), split, pl.lit(SUPPORT), 0.0))
    return pl.concat(pairs)[np.arange(2 * len(asking)).reshape(2, -1).T.ravel()]


def sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Positives of an episode, and how many episodes an epoch draws of a scenario."""
    query = options["scenario_query"]
    return {
        "query_rows": query,
        "episode_rows": query + options["scenario_support"],
        "draws": options["scenario_draws"],
    }


CHOICE = ("scenarios", "positive_from", "scenario_least", "scenario_most", "scenario_support", "scenario_query")
"""Options that choose scenarios and positives (of which a scenario has support and query at least)."""
CMML_SCENARIO = Protocol(
    "cmml-scenario",
    1,
    {
        "scenarios": "",
        "positive_from": 4.0,
        "scenario_least": 100,
        "scenario_most": 1000,
        "scenario_support": 64,
        "scenario_query": 128,
        "scenario_users": 500,
        "scenario_apart": False,
        "scenario_draws": 32,
    },
    128,
    plan,
    tasks,
    chunks=chunks,
    sizes=sizes,
)
