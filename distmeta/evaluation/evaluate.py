"""A trained method on tasks that it has not seen, beside the floors on the same tasks (design §8)."""

import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta.data.loader import Loader, read_items
from distmeta.data.schema import Dataset, Label
from distmeta.data.tasktable import TaskTable
from distmeta.errors import RunError, UserError
from distmeta.evaluation import significance
from distmeta.evaluation.metrics import CUTOFFS, error_sums, ndcg, summarise
from distmeta.methods import entry, method_class
from distmeta.methods.base import Method, fit_closed_form
from distmeta.storage import Location

__all__ = ["CUTOFFS", "ErrorHistogram", "assemble", "evaluate", "floors", "per_task", "summarise"]

SPLITS = ("test", "seen")
"""What is evaluated, where the protocol has it: new tasks, and for some protocols training tasks again."""

VERSION = 1
"""Of the floors and of what is measured; a change of either makes the cached floors anew."""

BATCH = 256
"""Tasks at a time. No number depends on it."""

log = logging.getLogger(__name__)


@dataclass
class ErrorHistogram:
    """How often each signed error ŷ − y occurs, over all query rows added; in equal bins."""

    edges: NDArray[np.float64]
    """[bins + 1], from minus the label's range to plus it: predictions are clipped to the range."""
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.edges) - 1, np.int64)

    @classmethod
    def of(cls, label: Label, bins: int = 80) -> "ErrorHistogram":
        """An empty histogram for labels of this range."""
        span = label.maximum - label.minimum
        return cls(np.linspace(-span, span, bins + 1))

    def add(self, errors: Tensor) -> None:
        """Count errors of any shape."""
        self.counts += np.histogram(errors.double().cpu().numpy(), self.edges)[0]


def per_task(
    method: Method, loader: Loader, label: Label, *, split: str = "test", errors: ErrorHistogram | None = None
) -> pl.DataFrame:
    """Adapt to every task of the loader from its support, predict its query, and measure.

    Args:
        label: predictions are clipped to its range, before they are ranked too.
        split: what the loader holds; only tasks of the split test count for the cohort `all`.
        errors: where signed errors are counted besides.

    Returns:
        One row a task, sorted by task: task int64, split, cohort, n (query rows), abs_sum, sq_sum, ndcg@k.

    Raises:
        RunError: a prediction is not finite.
    """
    device = next(iter([*method.parameters(), *method.buffers()])).device
    method.eval()
    tasks, sums = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, 3 + len(CUTOFFS), dtype=torch.float64)]
    with torch.no_grad():
        for batch in loader.evaluation():
            batch = batch.to(device)
            scores = method.predict(method.adapt(batch), batch)
            for block, score in zip(batch, scores, strict=True):
                query = block.query
                bad = (~score.isfinite() & query.mask).any(1)
                if bad.any():
                    raise RunError(
                        f"{method.name}: its prediction for task {int(block.task[bad][0])} is not a finite number; "
                        "training diverged, lower the step sizes (lr, local_lr)"
                    )
                score = score.double().clamp(label.minimum, label.maximum)
                n = query.mask.sum(1, dtype=torch.float64)
                absolute, squared = error_sums(score, query.label, query.mask)
                ranking = ndcg(score, query.label, query.mask)
                tasks.append(block.task.cpu())
                sums.append(torch.column_stack((n, absolute, squared, ranking)).cpu())
                if errors is not None:
                    errors.add((score - query.label)[query.mask])
    names = ["n", "abs_sum", "sq_sum", *(f"ndcg@{k}" for k in CUTOFFS)]
    measured = pl.DataFrame(torch.cat(sums).numpy(), schema=names).with_columns(pl.col("n").cast(pl.Int64))
    measured = measured.with_columns(task=pl.Series(torch.cat(tasks).numpy()), split=pl.lit(split))
    frame = measured.join(loader.tasks(), on="task", how="left", validate="1:1")
    return frame.select("task", "split", "cohort", *names).sort("task")


def evaluate(method: Method, table: TaskTable, dataset: Dataset, errors: ErrorHistogram | None = None) -> pl.DataFrame:
    """`per_task` on every split that is evaluated and that the table has; errors are those of the split test."""
    frames = []
    for split in SPLITS:
        loader = Loader(table, dataset, split, BATCH)
        if loader.n_tasks or split == "test":
            mine = errors if split == "test" else None
            frames.append(per_task(method, loader, dataset.label, split=split, errors=mine))
    return pl.concat(frames)


def floors(
    table: TaskTable, dataset: Dataset, dataset_location: Location, names: Sequence[str]
) -> dict[str, pl.DataFrame]:
    """Per-task frames of the floors, by name: fitted on the split train only, with their default options.

    Each is kept at TABLE/floors/NAME-HASH.parquet, with a manifest written after it, and made again where the
    file is damaged or the split or the options differ.
    """
    found = {name: _cached(table, name) for name in names}
    missing = [name for name in names if found[name] is None]
    items = read_items(dataset_location, dataset) if missing else {}
    for name in missing:
        chosen = entry(name)
        method = method_class(name)(chosen.options(), dataset, items)
        train = Loader(table, dataset, "train", BATCH)
        fit_closed_form(method, lambda sweep, train=train: train.evaluation())
        found[name] = frame = evaluate(method, table, dataset)
        _keep(table, name, frame)
    return {name: frame for name, frame in found.items() if frame is not None}


def _identity(table: TaskTable, name: str) -> dict[str, Any]:
    """What a floor's numbers depend on."""
    options = dataclasses.asdict(entry(name).options())
    return {"version": VERSION, "floor": name, "options": options, "split_hash": table.split_hash}


def _place(table: TaskTable, name: str) -> tuple[Location, Location]:
    """Where a floor's frame and its manifest lie."""
    identity = {k: v for k, v in _identity(table, name).items() if k != "split_hash"}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = table.location / "floors"
    return folder / f"{name}-{digest}.parquet", folder / f"{name}-{digest}.json"


def _cached(table: TaskTable, name: str) -> pl.DataFrame | None:
    """A floor's frame as it was kept; None where it is missing, damaged or of another split."""
    file, manifest = _place(table, name)
    if not manifest.exists() or not file.exists():
        return None
    try:
        kept, data = manifest.read_json(), file.read_bytes()
    except (UserError, OSError):
        return None
    if kept != {**_identity(table, name), "sha256": hashlib.sha256(data).hexdigest()}:
        return None
    return pl.read_parquet(io.BytesIO(data))


def _keep(table: TaskTable, name: str, frame: pl.DataFrame) -> None:
    file, manifest = _place(table, name)
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    try:
        (table.location / "floors").make_dir()
        file.write_bytes(buffer.getvalue())
        manifest.write_json({**_identity(table, name), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()})
    except UserError as e:  # a dataset that may only be read: the numbers are at hand, the next run makes them again
        log.warning("the floor %s is not kept for the next run: %s", name, e)


def assemble(
    method_name: str, protocol: str, split_hash: str, seed: int, frame: pl.DataFrame, floors: Mapping[str, pl.DataFrame]
) -> dict[str, Any]:
    """RUN/evaluation.json: metrics by cohort, the floors' beside them, and paired differences method − floor.

    Args:
        frame: the method's per-task frame, as `evaluate` makes it.
        floors: the floors' frames for the same tasks, by name.

    Returns:
        {"method", "protocol", "split_hash", "seed", "cohorts": {cohort: metrics}, "floors": {floor: {cohort:
        metrics}}, "paired": {floor: {cohort: {metric: [difference, low, high]}}}}; the cohort `all` is every
        task of the split test.

    Raises:
        RunError: a floor was evaluated on other tasks than the method.
    """
    cohorts = _cohorts(frame)
    others = {name: _cohorts(floor) for name, floor in floors.items()}
    paired: dict[str, dict[str, Any]] = {name: {} for name in floors}
    for cohort, mine in cohorts.items():
        theirs = {name: other.get(cohort, frame.clear()) for name, other in others.items()}
        for name, differences in significance.against(mine, theirs).items():
            paired[name][cohort] = differences
    return {
        "method": method_name,
        "protocol": protocol,
        "split_hash": split_hash,
        "seed": seed,
        "cohorts": {cohort: summarise(f) for cohort, f in cohorts.items()},
        "floors": {name: {c: summarise(f) for c, f in other.items()} for name, other in others.items()},
        "paired": paired,
    }


def _cohorts(frame: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """`all`, then each cohort by name. A frame without the column split is all of the split test."""
    test = frame.filter(pl.col("split") == "test") if "split" in frame.columns else frame
    named = frame.partition_by("cohort", as_dict=True)
    return {"all": test} | {str(key[0]): named[key] for key in sorted(named)}
