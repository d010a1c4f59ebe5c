"""Floors on worlds made by hand: ratings in plain dictionaries, as padded batches, and back."""

from typing import Any

import numpy as np
import torch

from distmeta.data.schema import Dataset
from distmeta.methods import entry, method_class
from distmeta.methods.base import Method, fit_closed_form
from distmeta.tasks import Rows, TaskBatch, TaskBlock

ITEMS = 30
NEVER_RATED = 29
Ratings = list[tuple[int, float]]
"""(item, label) of one user."""


def made(users: int = 40, seed: int = 0, clicks: bool = False) -> dict[int, Ratings]:
    """Users' ratings, or the clicks they stand for; NEVER_RATED is in nobody's."""
    rng = np.random.default_rng(seed)
    taste, kind = rng.normal(size=(users, 2)), rng.normal(size=(ITEMS, 2))
    offset = rng.normal(size=ITEMS)
    ratings = {}
    for u in range(users):
        items = rng.permutation(ITEMS - 1)[: rng.integers(4, 20)]
        score = 3 + offset[items] + taste[u] @ kind[items].T + 0.3 * rng.normal(size=len(items))
        label = (score > 3).astype(np.float32) if clicks else score.astype(np.float32)
        ratings[u] = [(int(i), float(y)) for i, y in zip(items, label, strict=True)]
    return ratings


def rows(ratings: list[Ratings], where: dict[int, int]) -> Rows:
    width = max((len(r) for r in ratings), default=0) + 2
    side = Rows(
        torch.zeros(len(ratings), width, dtype=torch.int64),
        torch.full((len(ratings), width), 77.0),  # must not be looked at
        torch.zeros(len(ratings), width, dtype=torch.bool),
    )
    for t, rated in enumerate(ratings):
        for r, (item, label) in enumerate(rated):
            side.item[t, r], side.label[t, r], side.mask[t, r] = where[item], label, True
    return side


def batch(support: dict[int, Ratings], query: dict[int, Ratings], blocks: int = 2) -> TaskBatch:
    items = sorted({i for side in (support, query) for rated in side.values() for i, _ in rated} | {0})[::-1]
    where = {item: place for place, item in enumerate(items)}
    tasks = sorted(support)
    made = []
    for part in (tasks[b::blocks] for b in range(blocks)):
        sides = [rows([side[t] for t in part], where) for side in (support, query)]
        made.append(TaskBlock(torch.tensor(part, dtype=torch.int64), {}, *sides))
    return TaskBatch(torch.tensor(items), tuple(made))


def split(world: dict[int, Ratings], at: int = 3) -> tuple[dict[int, Ratings], dict[int, Ratings]]:
    return {u: r[:at] for u, r in world.items()}, {u: r[at:] for u, r in world.items()}


def fitted(dataset: Dataset, name: str, batches: list[TaskBatch], **options: Any) -> Method:
    method = method_class(name)(entry(name).options(**options), dataset, {})
    fit_closed_form(method, lambda sweep: batches)
    return method


def predict(method: Method, batch: TaskBatch) -> dict[int, list[float]]:
    scores: dict[int, list[float]] = {}
    for block, score in zip(batch, method.predict(method.adapt(batch), batch), strict=True):
        for t, row, mask in zip(block.task.tolist(), score, block.query.mask, strict=True):
            scores[t] = row[mask].tolist()
    return scores
