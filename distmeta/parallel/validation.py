"""What a run measures of itself while it trains: validation errors, and RUN/metrics.jsonl."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from distmeta.data.schema import Label
from distmeta.errors import UserError
from distmeta.evaluation.lists import frame
from distmeta.exchange import Exchange
from distmeta.methods.base import Method
from distmeta.storage import Location
from distmeta.tasks import TaskBatch


def validate(
    method: Method, batches: Iterable[TaskBatch], label: Label, exchange: Exchange, device: torch.device
) -> tuple[float, float]:
    """Mean over all workers' tasks of the per-task MAE and MSE of predictions clipped to the label's range.

    Of scenarios: mean over lists of 1 − Recall@10 and 1 − Recall@50. (nan, nan) where there are no tasks.
    """
    method.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            batch = batch.to(device)
            scores = method.predict(method.adapt(batch), batch)
            if batch.users is not None:
                sums += _missed(batch, scores)
                continue
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


def _missed(batch: TaskBatch, scores: Sequence[Tensor]) -> Tensor:
    """Sums over a batch's lists of 1 − Recall@10 and of 1 − Recall@50, and their number; NaN scores give NaN."""
    finite = all(bool((s.isfinite() | ~block.query.mask).all()) for block, s in zip(batch, scores, strict=True))
    lists = frame(lambda _: scores, [batch])
    missed = [float((1 - lists[name]).sum()) if finite else math.nan for name in ("recall@10", "recall@50")]
    return torch.tensor([*missed, len(lists)], dtype=torch.float64)


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
