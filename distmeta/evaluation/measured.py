"""What one worker, or all together, measured of a method: frames that travel, are kept, and are put together.

Everything else (clips, tests, intervals, summaries) is computed from the whole of it, so that no number depends on
how the tasks were spread over workers.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from distmeta.data.schema import Label
from distmeta.data.tables import to_polars

BINS = 80
FACT = "fact:"
"""What the columns of tasks begin with that hold a method's facts (Method.facts)."""
TRAIT = "trait:"
"""What the columns of traits begin with that hold a method's traits (Method.traits)."""


@dataclass
class ErrorHistogram:
    """How often each signed error ŷ − y occurs, over all query rows added; in equal bins."""

    edges: NDArray[np.float64]
    """[bins + 1], from minus the label's range to plus it: predictions are clipped to the range."""
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, label: Label, bins: int = BINS) -> "ErrorHistogram":
        """An empty histogram for labels of this range."""
        span = label.maximum - label.minimum
        return cls(np.linspace(-span, span, bins + 1), np.zeros(bins, np.int64))

    def add(self, errors: Tensor) -> None:
        """Count errors of any shape."""
        self.counts += np.histogram(errors.double().cpu().numpy(), self.edges)[0]


@dataclass(frozen=True)
class Measured:
    """A method on tasks that it has not seen."""

    tasks: pl.DataFrame
    """One row a task, by task: task int64, split, cohort, n (query rows), abs_sum, sq_sum, ndcg@k; for clicks also
    metrics.CLICK_COLUMNS. Then FACT columns, float64, where the method has facts. Of scenarios one row a list, by
    (task, user): task, user int64, split, cohort, n (candidates), positives, recall@N."""
    rows: pl.DataFrame | None
    """One row a query row, by (task, position): task int64, split, position int32 (within the task's query, in time
    order), row_cohort (an Enum, or null), score float64, label float32. Only where the protocol has cohorts of
    rows, or labels are clicks, whose pooled AUC needs them."""
    errors: ErrorHistogram
    """Signed errors of the split test."""
    traits: pl.DataFrame | None = None
    """One row a sampled test task and support, by (task, support): task int64, support int64 (0, or its number among
    those drawn of a scenario), cohort, rows int64 and mean float64 of the support's labels (NaN of none), and TRAIT
    columns, arrays of float32. Only where the method has traits."""

    def to_ipc(self) -> bytes:
        """As Arrow IPC streams, one after the other; `from_ipc` reads them back to the same."""
        edges, counts = self.errors.edges, np.r_[self.errors.counts, 0]
        tables = [self.tasks.to_arrow(), pa.table({"edges": edges, "counts": counts})]
        tables += [frame.to_arrow() for frame in (self.rows, self.traits) if frame is not None]
        sink = io.BytesIO()
        for table in tables:
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        return sink.getvalue()

    @classmethod
    def from_ipc(cls, data: bytes) -> Self:
        """What `to_ipc` wrote.

        Raises:
            pa.ArrowException, OSError, KeyError: the bytes are something else.
        """
        source, tables = pa.BufferReader(data), []
        while source.tell() < len(data):
            tables.append(pa.ipc.open_stream(source).read_all())
        if not 2 <= len(tables) <= 4:
            raise pa.ArrowInvalid(f"{len(tables)} tables where a measurement has 2 to 4")
        tasks, errors, *others = tables
        edges, counts = errors["edges"].to_numpy(), errors["counts"].to_numpy()[:-1].copy()
        more = {"traits" if "support" in t.column_names else "rows": to_polars(t) for t in others}
        return cls(to_polars(tasks), more.get("rows"), ErrorHistogram(edges, counts), more.get("traits"))

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Several workers' or splits' together, sorted; at least one."""
        rows = [p.rows for p in parts if p.rows is not None]
        traits = [p.traits for p in parts if p.traits is not None]
        return cls(
            _sorted(pl.concat([p.tasks for p in parts], how="diagonal")),  # a part without tasks has no facts
            pl.concat(rows).sort("task", "position") if rows else None,
            ErrorHistogram(parts[0].errors.edges, np.sum([p.errors.counts for p in parts], axis=0)),
            pl.concat(traits).sort("task", "support") if traits else None,
        )


def _sorted(tasks: pl.DataFrame) -> pl.DataFrame:
    return tasks.sort([name for name in ("task", "user") if name in tasks.columns])
