"""What a run measures of itself while it trains: validation errors, and RUN/metrics.jsonl."""

import json
import math
from collections.abc import Iterable
from typing import Any

import torch

from distmeta.data.schema import Label
from distmeta.errors import UserError
from distmeta.exchange import Exchange
from distmeta.methods.base import Method
from distmeta.storage import Location
from distmeta.tasks import TaskBatch


def validate(
    method: Method, batches: Iterable[TaskBatch], label: Label, exchange: Exchange, device: torch.device
) -> tuple[float, float]:
    """Mean over all workers' tasks of the per-task MAE and MSE of predictions clipped to the label's range.

    (nan, nan) where there are no tasks.
    """
    method.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            batch = batch.to(device)
            scores = method.predict(method.adapt(batch), batch)
            for block, score in zip(batch, scores, strict=True):
                mask = block.query.mask
                clipped = score.clamp(label.minimum, label.maximum)
                error = (clipped - block.query.label).double().masked_fill(~mask, 0)
                rows = mask.sum(1).clamp(min=1)
                counted = mask.any(1).double()
                sums += torch.stack(
                    [(error.abs().sum(1) / rows).sum(), (error.square().sum(1) / rows).sum(), counted.sum()]
                ).cpu()
    exchange.sum(sums)
    mae, mse, count = sums.tolist()
    return (mae / count, mse / count) if count else (math.nan, math.nan)


def read_metrics(run: Location) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, oldest first; none where the file does not exist yet.

    Raises:
        UserError: a line is not JSON.
    """
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    rows = []
    for n, line in enumerate(file.read_bytes().decode(errors="replace").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(
                f"{file}, line {n}: not JSON; delete that line (it is a record, nothing needs it)"
            ) from None
    return rows


def write_metrics(run: Location, rows: Iterable[dict[str, Any]]) -> None:
    """Write RUN/metrics.jsonl whole: object stores cannot append, and a kill leaves whole lines."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    (run / "metrics.jsonl").write_bytes(text.encode())
