"""A trained method on tasks that it has not seen, beside the floors on the same tasks (design §8)."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from distmeta import remote
from distmeta.data.loader import Loader, read_items
from distmeta.data.protocols import QUERY
from distmeta.data.schema import Dataset, Label
from distmeta.data.tables import to_polars
from distmeta.data.taskmaker import ROW_COHORT
from distmeta.data.tasktable import TaskTable
from distmeta.errors import Diverged, UserError
from distmeta.evaluation import lists, significance
from distmeta.evaluation.cohorts import cohorts, groups, matched
from distmeta.evaluation.measured import FACT, ErrorHistogram, Measured
from distmeta.evaluation.metrics import CLICK_COLUMNS, CUTOFFS, click_sums, error_sums, ndcg
from distmeta.evaluation.sample import MOST, Sample, of_scenarios
from distmeta.exchange import Exchange
from distmeta.methods import entry, method_class
from distmeta.methods.base import Method, fit_closed_form
from distmeta.storage import Location
from distmeta.tasks import TaskBatch, TaskBlock

__all__ = ["ErrorHistogram", "Measured", "assemble", "evaluate", "floors", "measure", "pooled"]

SPLITS = ("test", "seen")
"""What is evaluated, where the protocol has it: new tasks, and for some protocols training tasks again."""

VERSION = 2
"""Of the floors and of what is measured; a change of either makes the cached floors anew."""

BATCH = 256
"""Tasks at a time. No number depends on it."""

log = logging.getLogger(__name__)


def measure(
    method: Method, loader: Loader, label: Label, split: str = "test", row_cohorts: pl.DataFrame | None = None
) -> Measured:
    """Adapt to every task of the loader from its support, predict its query, and measure.

    Args:
        label: predictions are clipped to its range, before they are ranked too.
        split: what the loader holds; only tasks of the split test count for the cohort `all`.
        row_cohorts: task, position, row_cohort of the loader's query rows, where the protocol has cohorts of rows.

    Raises:
        RunError: a prediction is not finite.
    """
    device = next(iter([*method.parameters(), *method.buffers()])).device
    method.eval()
    if loader.table.scenarios:
        return lists.measure(_ranked_by(method), loader, loader.dataset, split, device)
    clicks = label.kind == "click"
    names = ["n", "abs_sum", "sq_sum", *(f"ndcg@{k}" for k in CUTOFFS), *(CLICK_COLUMNS if clicks else ())]
    tasks, sums = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, len(names), dtype=torch.float64)]
    rows, errors = [_rows(torch.zeros(0, dtype=torch.int64), *torch.zeros(3, 0, 0))], ErrorHistogram.of(label)
    facts: dict[str, list[Tensor]] = {}
    sample = Sample(method, MOST / max(loader.n_tasks, 1) if split == "test" else 0)
    with torch.no_grad():
        for batch in loader.evaluation():
            batch = batch.to(device)
            state = method.adapt(batch)
            scores = method.predict(state, batch)
            for name, blocks in method.facts(state, batch).items():
                facts.setdefault(FACT + name, []).extend(b.double().cpu() for b in blocks)
            sample.look(batch)
            for block, score in zip(batch, scores, strict=True):
                _check_finite(method, block, score)
                query = block.query
                given = score.double().clamp(label.minimum, label.maximum), query.label, query.mask
                tasks.append(block.task.cpu())
                sums.append(_sums(*given, clicks).cpu())
                if clicks or row_cohorts is not None:
                    rows.append(_rows(block.task, *given))
                if split == "test":
                    errors.add((given[0] - query.label)[query.mask])
    counted = pl.DataFrame(torch.cat(sums).numpy(), schema=names).with_columns(pl.col("n").cast(pl.Int64))
    told = [pl.Series(name, torch.cat(blocks).numpy()) for name, blocks in facts.items()]
    counted = counted.with_columns(*told, task=pl.Series(torch.cat(tasks).numpy()), split=pl.lit(split))
    cohort = loader.tasks()
    frame = counted.join(cohort, on="task", how="left", validate="1:1")
    frame = frame.select("task", "split", "cohort", *names, *facts).sort("task")
    kept = _with_cohorts(pl.concat(rows), split, row_cohorts) if clicks or row_cohorts is not None else None
    return Measured(frame, kept, errors, sample.frame(cohort))


def _ranked_by(method: Method) -> lists.Score:
    def score(batch: TaskBatch) -> list[Tensor]:
        scores = method.predict(method.adapt(batch), batch)
        for block, given in zip(batch, scores, strict=True):
            _check_finite(method, block, given)
        return scores

    return score


def _check_finite(method: Method, block: TaskBlock, score: Tensor) -> None:
    bad = (~score.isfinite() & block.query.mask).any(1)
    if bad.any():
        raise Diverged(
            f"{method.name}: its prediction for task {int(block.task[bad][0])} is not a finite number; "
            "training diverged, lower the step sizes (lr, local_lr)"
        )


def _sums(score: Tensor, label: Tensor, mask: Tensor, clicks: bool) -> Tensor:
    """What a per-task frame holds of each task of a block: float64 [b, columns]."""
    n = mask.sum(1, dtype=torch.float64)
    parts = [n, *error_sums(score, label, mask), ndcg(score, label, mask)]
    return torch.column_stack([*parts, click_sums(score, label, mask)] if clicks else parts)


def _rows(task: Tensor, score: Tensor, label: Tensor, mask: Tensor) -> pl.DataFrame:
    """The query rows of a block: task, position, score, label."""
    mask = mask.bool()
    which, position = mask.nonzero(as_tuple=True)
    columns = {"task": task[which], "position": position.int(), "score": score.double()[mask], "label": label[mask]}
    return pl.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})


def _with_cohorts(rows: pl.DataFrame, split: str, row_cohorts: pl.DataFrame | None) -> pl.DataFrame:
    """Measured.rows of one split, by (task, position)."""
    if row_cohorts is None:
        rows = rows.with_columns(row_cohort=pl.lit(None, pl.String))
    else:
        rows = rows.join(row_cohorts, on=["task", "position"], how="left", validate="1:1")
    rows = rows.with_columns(split=pl.lit(split))
    return rows.select("task", "split", "position", "row_cohort", "score", "label").sort("task", "position")


def _row_cohorts(table: TaskTable, split: str, shards: Sequence[int]) -> pl.DataFrame | None:
    """task, position, row_cohort of the query rows of `shards`; None where the protocol has no cohorts of rows."""
    if not table.row_cohorts:
        return None
    empty = pl.DataFrame(schema={"task": pl.Int64, "role": pl.List(pl.Int8), ROW_COHORT: pl.List(pl.Int8)})
    frames = [to_polars(part) for part in table.read(split, shards, ["task", "role", ROW_COHORT])]
    lists = pl.concat([empty, *frames])
    alike = lists.select((pl.col("role").list.len() == pl.col(ROW_COHORT).list.len()).all()).item()
    rows = lists.explode("role", ROW_COHORT).filter(pl.col("role") == QUERY) if alike else empty
    names = pl.Series(table.row_cohorts, dtype=pl.Enum(table.row_cohorts))
    if not alike or not rows[ROW_COHORT].is_between(0, len(names) - 1).all():
        raise UserError(f"{table.location}: a row's cohort is missing or unknown; delete it to have it made again")
    return rows.select(
        "task",
        pl.int_range(pl.len(), dtype=pl.Int32).over("task").alias("position"),
        names.gather(rows[ROW_COHORT].cast(pl.UInt32)).alias("row_cohort"),
    )


def at_once(table: TaskTable) -> int:
    """Tasks of this table to evaluate at a time."""
    return lists.BATCH if table.scenarios else BATCH


def evaluate(
    method: Method, table: TaskTable, dataset: Dataset, exchange: Exchange | None = None, memory: int | None = None
) -> Measured:
    """`measure` on every split that is evaluated and that the table has; each worker measures its tasks of them.

    Args:
        memory: the loaders' bound, in bytes.

    Returns:
        All workers' together, the same on all; but for the rounding of a task's sums, what one worker measures.

    Raises:
        RunError: a prediction is not finite.
    """
    e = exchange or Exchange()
    mine = [v for v in range(table.shards) if v % e.world == e.rank]
    parts, size = [], at_once(table)
    device = next(iter([*method.parameters(), *method.buffers()])).device
    for split in SPLITS:
        loader = Loader(table, dataset, split, size, rank=e.rank, world=e.world, memory=memory, device=device)
        if loader.n_tasks or split == "test":
            parts.append(measure(method, loader, dataset.label, split, _row_cohorts(table, split, mine)))
    if table.scenarios:
        parts[0] = dataclasses.replace(parts[0], traits=of_scenarios(method, table, dataset, e, memory))
    everyone = e.gather(Measured.concat(parts).to_ipc())
    return Measured.concat([Measured.from_ipc(data) for data in everyone])


def floors(
    table: TaskTable,
    dataset: Dataset,
    dataset_location: Location,
    names: Sequence[str],
    exchange: Exchange | None = None,
    memory: int | None = None,
) -> dict[str, Measured]:
    """What the floors measure, by name: fitted on the split train only, with their default options.

    Each is kept at TABLE/floors/NAME-HASH.arrow, with a manifest written after it, and made again where the
    file is damaged or the split or the options differ. Workers make together what rank 0 does not find, and
    only rank 0 has them all.

    Args:
        names: of floors for users; scenarios have floors of their own (`lists.FLOORS`), which are not kept.
        memory: the loaders' bound, in bytes.
    """
    e = exchange or Exchange()
    if table.scenarios:
        return lists.floors(table, dataset, e, memory)
    found = {name: _cached(table, name) if e.rank == 0 else None for name in names}
    missing = json.loads(e.gather(json.dumps([name for name in names if found[name] is None]).encode())[0])
    items = read_items(dataset_location, dataset) if missing else {}
    for name in missing:
        chosen = entry(name)
        method = method_class(name)(chosen.options(), dataset, items)
        train = Loader(table, dataset, "train", BATCH, rank=e.rank, world=e.world, memory=memory)
        fit_closed_form(method, lambda sweep, train=train: train.evaluation(), e.sums)
        found[name] = measured = evaluate(method, table, dataset, e, memory)
        if e.rank == 0:
            _keep(table, name, measured)
    return {name: measured for name, measured in found.items() if measured is not None}


def _identity(table: TaskTable, name: str) -> dict[str, Any]:
    """What a floor's numbers depend on."""
    options = dataclasses.asdict(entry(name).options())
    return {"version": VERSION, "floor": name, "options": options, "split_hash": table.split_hash}


def _place(table: TaskTable, name: str) -> tuple[Location, Location]:
    """Where a floor's frame and its manifest lie."""
    identity = {k: v for k, v in _identity(table, name).items() if k != "split_hash"}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = table.location / "floors"
    return folder / f"{name}-{digest}.arrow", folder / f"{name}-{digest}.json"


def _cached(table: TaskTable, name: str) -> Measured | None:
    """A floor as it was kept; None where it is missing, damaged or of another split."""
    file, manifest = _place(table, name)
    if not manifest.exists() or not file.exists():
        return None
    try:
        kept, data = manifest.read_json(), file.read_bytes()
    except (UserError, OSError) as e:
        remote.let_pass(e)
        return None
    if kept != {**_identity(table, name), "sha256": hashlib.sha256(data).hexdigest()}:
        return None
    return Measured.from_ipc(data)


def _keep(table: TaskTable, name: str, measured: Measured) -> None:
    file, manifest = _place(table, name)
    data = measured.to_ipc()
    try:
        (table.location / "floors").make_dir()
        file.write_bytes(data)
        manifest.write_json({**_identity(table, name), "sha256": hashlib.sha256(data).hexdigest()})
    except UserError as e:  # a dataset that may only be read: the numbers are at hand, the next run makes them again
        log.warning("the floor %s is not kept for the next run: %s", name, e)


def assemble(
    method_name: str, table: TaskTable, seed: int, measured: Measured, floors: Mapping[str, Measured]
) -> dict[str, Any]:
    """RUN/evaluation.json: metrics by cohort, the floors' beside them, and paired differences method − floor.

    Args:
        measured: the method, as `evaluate` measures it on `table`; of all workers.
        floors: the floors on the same tasks, by name.

    Returns:
        {"method", "protocol", "split_hash", "seed", "cohorts": {cohort: metrics}, "floors": {floor: {cohort:
        metrics}}, "paired": {floor: {cohort: {metric: [difference, low, high]}}}}; the cohort `all` is every
        task of the split test. Where the protocol decided something from the data also "notes", its words for it;
        where it compares groups of users also "groups": {"A-B": t-test} and "floor_groups": {floor: {"A-B":
        t-test}}, as `cohorts.groups` makes them.

    Raises:
        RunError: a floor was evaluated on other tasks than the method.
    """
    mine = cohorts(measured)
    others = {name: cohorts(floor) for name, floor in floors.items()}
    paired: dict[str, dict[str, Any]] = {name: {} for name in floors}
    for cohort, found in mine.items():
        theirs = {name: matched(mine, other)[cohort].units for name, other in others.items()}
        for name, differences in significance.against(found.units, theirs).items():
            paired[name][cohort] = differences
    more: dict[str, Any] = {"notes": table.notes} if table.notes else {}
    if table.compared:
        more["groups"] = groups(measured, table.compared)
        more["floor_groups"] = {name: groups(floor, table.compared) for name, floor in floors.items()}
    return {
        "method": method_name,
        "protocol": table.protocol,
        "split_hash": table.split_hash,
        "seed": seed,
        "cohorts": {name: cohort.summary for name, cohort in mine.items()},
        "floors": {name: {c: cohort.summary for c, cohort in other.items()} for name, other in others.items()},
        "paired": paired,
        **more,
    }


def pooled(
    runs: Sequence[tuple[Measured, Mapping[str, Measured]]], floors: Sequence[str] | None = None
) -> dict[str, dict[str, dict[str, significance.Interval]]]:
    """Paired differences method − floor of several runs' tasks together: cohort -> floor -> metric -> interval.

    Args:
        runs: what `evaluate` measures of each run (of a split seed each, say), and the floors on the same tasks.
        floors: those to compare with; none: all that the first run has.

    Raises:
        RunError: a floor was evaluated on other tasks than the method.
    """
    names = list(runs[0][1]) if floors is None else list(floors)
    each = [(cohorts(method), {name: cohorts(others[name]) for name in names}) for method, others in runs]
    found: dict[str, dict[str, dict[str, significance.Interval]]] = {}
    for cohort in dict.fromkeys(name for mine, _ in each for name in mine):
        with_it = [(mine[cohort], others) for mine, others in each if cohort in mine]
        found[cohort] = {
            name: significance.pooled([(mine.units, others[name][cohort].units) for mine, others in with_it])
            for name in names
        }
    return found
