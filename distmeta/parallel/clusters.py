"""The clusters of HML over all training tasks: who belongs to whom, whether that has settled, and new starts.

A survey is the assignment step of paper 000 (§2.1.1), over every training task of all workers and with a split that
stays the same, so that two surveys can be compared.

It also makes initialisations. From K equal ones no task has a reason to leave the first; K random ones find planted
tastes, but each has learned from a part of the tasks only (a little worse, measured). So the K part from one common
solution. How that predicts some probe items after adapting to a task is the task's taste; k-means finds groups of
tastes; each group's initialisation is the common one, moved by the mean of what it moves by when it adapts to the
group's tasks. A dead initialisation is made the same way, out of the largest cluster's tasks.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distmeta import draws
from distmeta.data.loader import Loader
from distmeta.exchange import Exchange
from distmeta.memory.base import Arrays
from distmeta.methods.base import Method
from distmeta.methods.hml import HML
from distmeta.parallel.update import MetaUpdate
from distmeta.tasks import TaskBatch

SETTLED, CALM = 0.005, 2
"""Settled: less than this share of the tasks changed cluster in so many surveys in succession (resolutions, HML)."""
SAMPLE = 4096
"""Tasks, about, by whose tastes initialisations are made: enough for a mean, and no cost that grows with the data."""
PROBES = 128
RESTARTS, ROUNDS = 8, 50

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def survey_of(
    method: Method, update: MetaUpdate | None, tasks: Loader, exchange: Exchange, device: torch.device
) -> "Survey | None":
    """The survey of a method that has clusters."""
    if isinstance(method, HML) and method.groups > 1 and update:
        return Survey(method, update, tasks, exchange, device)
    return None


class Survey:
    """Assignments of the training tasks of all workers at the last survey, and how often they stood still.

    Every worker calls `after` at the end of each epoch, and all come to the same. Where epochs are parts of a pass
    (--epoch-tasks) `tasks` are as many as a part has, always the same ones.
    """

    def __init__(
        self, method: HML, update: MetaUpdate, tasks: Loader, exchange: Exchange, device: torch.device
    ) -> None:
        self.method, self.update, self.tasks, self.exchange, self.device = method, update, tasks, exchange, device
        self.task: Ints = np.zeros(0, np.int64)
        self.cluster: Ints = np.zeros(0, np.int64)
        """Every training task's id, ascending, and its cluster; empty before the first survey."""
        self.calm = 0
        self.parted = False
        """Whether the last call of `after` made the K."""

    @property
    def beginning(self) -> bool:
        """Whether the initialisations have parted just now, or are one yet."""
        return not self.method.apart or self.parted

    @property
    def settled(self) -> bool:
        """Whether training may end."""
        return self.method.options.until_settled and self.calm >= CALM

    def snapshot(self) -> Arrays:
        return {"task": self.task, "cluster": self.cluster, "calm": np.array([self.calm])}

    def restore(self, snapshot: Arrays) -> None:
        self.task, self.cluster, self.calm = snapshot["task"], snapshot["cluster"], int(snapshot["calm"][0])

    def after(self, epoch: int) -> dict[str, Any] | None:
        """Survey where epoch `epoch` (from 0) ends with one: the clusters' sizes, the share of tasks that changed
        cluster since the last one (None for the first), and the clusters that were made anew, all K at first."""
        o, k = self.method.options, self.method.groups
        self.parted = False
        first = not self.method.apart
        if (epoch + 1 < o.warm_epochs) if first else (epoch + 1 - o.warm_epochs) % o.survey_epochs:
            return None
        made = list(range(k)) if first else []
        if first:
            self._make(0, made, epoch)
            self.method.apart.copy_(torch.tensor(True))
            self.parted = True
        churn, sizes = self._assign()
        if not first:
            made = np.flatnonzero(sizes < o.dead_share * len(self.task) / k).tolist()
            largest = int(sizes.argmax())
            if made:
                self._make(largest, made, epoch)
        self.calm = self.calm + 1 if churn is not None and churn < SETTLED and not made else 0
        return {"sizes": sizes.tolist(), "churn": churn, "reseeded": made}

    def _assign(self) -> tuple[float | None, Ints]:
        """Assign every task by its query loss; the churn, and tasks [K] of each cluster."""
        ids, cluster = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for batch in self._batches():
            ids.append(_tasks(batch))
            cluster.append(self.method.clusters(batch).cpu().numpy())
        task, now = (self._gathered(np.concatenate(a)) for a in (ids, cluster))
        order = task.argsort()
        before, self.task, self.cluster = self.cluster, task[order], now[order]
        sizes = np.bincount(self.cluster, minlength=self.method.groups)
        self.method.sizes.copy_(torch.from_numpy(sizes))
        return float((before != self.cluster).mean()) if len(before) else None, sizes

    def _make(self, source: int, made: list[int], epoch: int) -> None:
        """Make the initialisations `made` from that of `source` and groups of its tasks.

        Where it is not among them, its tasks' largest group stays with it.
        """
        keep = source not in made
        sample = self._sample(source)
        group = self._groups(sample, source, len(made) + keep, epoch)
        if keep:
            sizes = np.bincount(group, minlength=len(made) + 1)
            group = np.where(group == sizes.argmax(), -1, group - (group > sizes.argmax()))
        totals = torch.zeros_like(self.method.initial[: len(made)])
        for batch in self._batches():
            for g in range(len(made)):
                totals[g] += self.method.shift(_chosen(batch, sample[group == g]), source)
        self.exchange.sum(totals.view(-1))
        count = np.maximum(np.bincount(group[group >= 0], minlength=len(made)), 1)
        with torch.no_grad():
            start = self.method.initial[source].clone()
            for k, total, n in zip(made, totals, count.tolist(), strict=True):
                self.method.initial[k] = start + total / n
                self.update.reset(k)

    def _sample(self, source: int) -> Ints:
        """Ids, ascending, of the source's tasks, or of as many as SAMPLE by hash: all workers'."""
        if not len(self.task):  # before the first survey all are the common one's
            ids = np.concatenate([np.zeros(0, np.int64), *(_tasks(batch) for batch in self._batches())])
            task = np.sort(self._gathered(ids))
        else:
            task = self.task[self.cluster == source]
        keys = draws.hashed(task, purpose="clusters sample")
        return task[np.sort(keys.argsort(kind="stable")[:SAMPLE])]

    def _groups(self, sample: Ints, source: int, n: int, epoch: int) -> Ints:
        """The group 0 … n − 1 of each task of `sample` by taste; rank 0 says, so that no last bit divides workers."""
        items = draws.hashed(np.arange(self.method.dataset.items), purpose="clusters probes").argsort()[:PROBES]
        probes = torch.from_numpy(np.sort(items)).to(self.device)
        ids, tastes = [np.zeros(0, np.int64)], [np.zeros((0, len(probes)))]
        for batch in self._batches():
            mine = _chosen(batch, sample)
            ids.append(_tasks(mine))
            tastes.append(self.method.tastes(mine, probes, source).double().cpu().numpy())
        task = self._gathered(np.concatenate(ids))
        taste = self._gathered(np.concatenate(tastes)).reshape(-1, len(probes))[task.argsort()]
        said = k_means(taste, n, epoch).tolist() if self.exchange.rank == 0 else None
        return np.array(json.loads(self.exchange.gather(json.dumps(said).encode())[0]), np.int64)

    def _batches(self) -> Iterator[TaskBatch]:
        """This worker's training tasks, each once, with the split that does not change."""
        return (batch.to(self.device) for batch in self.tasks.evaluation())

    def _gathered(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values of all workers, flat."""
        return np.concatenate([np.frombuffer(b, values.dtype) for b in self.exchange.gather(values.tobytes())])


def k_means(points: Floats, n: int, seed: int) -> Ints:
    """The group 0 … n − 1 of each point [m, d]: the best of some runs of Lloyd's algorithm from k-means++ starts
    (Arthur & Vassilvitskii, 2007), drawn by hashes of the seed. Groups may be empty where points coincide."""
    best, groups = np.inf, np.zeros(len(points), np.int64)
    for run in range(RESTARTS if len(points) else 0):
        centres = _starts(points, n, seed, run)
        for _ in range(ROUNDS):
            member = np.eye(n)[_distances(points, centres).argmin(1)]
            count = member.sum(0)[:, None]
            before, centres = centres, np.where(count > 0, member.T @ points / np.maximum(count, 1), centres)
            if np.array_equal(before, centres):
                break
        distance = _distances(points, centres)
        error = float(distance.min(1).sum())
        if error < best * (1 - 1e-6):  # of runs that end in the same groups the first, whatever the last bits say
            best, groups = error, distance.argmin(1)
    return groups


def _starts(points: Floats, n: int, seed: int, run: int) -> Floats:
    """n points far from each other: each drawn in proportion to its squared distance to those before it."""
    weight = np.ones(len(points))
    centres = np.zeros((0, points.shape[1]))
    for i in range(n):
        u = draws.uniform(seed, run, i, purpose="clusters k-means")
        total = weight.cumsum()
        chosen = np.searchsorted(total, u * total[-1], side="right") if total[-1] > 0 else 0
        centres = np.concatenate([centres, points[[min(int(chosen), len(points) - 1)]]])
        weight = _distances(points, centres).min(1)
    return centres


def _distances(points: Floats, centres: Floats) -> Floats:
    """Squared distances [m, n]."""
    squares = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
    return np.maximum(squares, 0.0)


def _tasks(batch: TaskBatch) -> Ints:
    """Task ids in block order."""
    return np.concatenate([np.zeros(0, np.int64), *(block.task.cpu().numpy() for block in batch)])


def _chosen(batch: TaskBatch, ids: Ints) -> TaskBatch:
    """The batch's tasks that are among `ids`."""
    wanted = torch.from_numpy(ids)
    blocks = []
    for block in batch:
        rows = torch.isin(block.task, wanted.to(block.task.device)).nonzero().flatten()
        if len(rows):
            blocks.append(block.take(rows))
    return replace(batch, blocks=tuple(blocks))
