"""A method's traits (Method.traits) of a sample of the test tasks: of users once, of a scenario with several supports,
so that it is a cloud of points (paper 002, Figure 3).

A scenario's supports are drawn from what the users took whose lists are ranked, by the rule of training episodes; its
own support is from other users.
"""

from dataclasses import replace

import numpy as np
import polars as pl
import torch
from torch import Tensor

from distmeta import draws
from distmeta.data.loader import Loader
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.evaluation.measured import TRAIT
from distmeta.exchange import Exchange
from distmeta.methods.base import Method
from distmeta.tasks import TaskBatch, TaskBlock

MOST = 1000
"""Traits of each kind that are kept, about: a picture shows no more, and evaluation.json stays small."""
SUPPORTS = 8, 32
"""Least and most supports that are drawn of a scenario."""
BATCH = 32
"""Scenarios at a time. No number depends on it."""


class Sample:
    """The traits of a method for the sampled ones among the tasks that it is shown, each with a chance of
    `share` by a hash of its id."""

    def __init__(self, method: Method, share: float) -> None:
        self.method, self.share = method, share if speaks(method) else 0.0
        self.parts: list[dict[str, Tensor]] = []

    def look(self, batch: TaskBatch, support: int = 0) -> None:
        """Adapt to the sampled tasks of a batch, which is on the method's device; `support` numbers a task's."""
        blocks = [few for block in batch if len((few := self._sampled(block)).task)] if self.share else []
        if not blocks:
            return
        few = replace(batch, blocks=tuple(blocks))
        told = self.method.traits(self.method.adapt(few), few)
        for i, block in enumerate(blocks):
            rows = block.support.mask.sum(1)
            mean = (block.support.label.double() * block.support.mask).sum(1) / rows  # nan of none
            numbered = torch.full_like(rows, support)
            part = {"task": block.task, "support": numbered, "rows": rows, "mean": mean}
            part |= {TRAIT + name: found[i].float() for name, found in told.items()}
            self.parts.append({name: values.cpu() for name, values in part.items()})

    def frame(self, cohorts: pl.DataFrame) -> pl.DataFrame | None:
        """`Measured.traits` of the tasks seen; None where there are none. `cohorts`: task, cohort."""
        if not self.parts:
            return None
        names = self.parts[0]
        found = pl.DataFrame([pl.Series(n, torch.cat([p[n] for p in self.parts]).numpy()) for n in names])
        found = found.join(cohorts, on="task", how="left", validate="m:1")
        return found.select("task", "support", "cohort", pl.exclude("task", "support", "cohort")).sort(
            "task", "support"
        )

    def _sampled(self, block: TaskBlock) -> TaskBlock:
        u = draws.uniform(block.task.cpu().numpy(), purpose="evaluation/sample")
        return block.take(torch.from_numpy(np.flatnonzero(u < self.share)).to(block.task.device))


def speaks(method: Method) -> bool:
    """Whether the method has traits."""
    return type(method).traits is not Method.traits


def of_scenarios(
    method: Method, table: TaskTable, dataset: Dataset, exchange: Exchange, memory: int | None
) -> pl.DataFrame | None:
    """`Measured.traits` of this worker's test scenarios, with as many supports each as MOST and SUPPORTS allow; the
    least, where the scenarios are streamed and each support is a pass over them."""
    n = table.counts["test"]["tasks"]
    if not n or not speaks(method):
        return None
    many = int(np.clip(MOST // n, *SUPPORTS))
    device = next(iter([*method.parameters(), *method.buffers()])).device
    given = {"rank": exchange.rank, "world": exchange.world, "memory": memory}
    loader = Loader(table, dataset, "test", BATCH, episodes=many, **given)
    if loader.note:
        many = SUPPORTS[0]
        loader = Loader(table, dataset, "test", BATCH, episodes=many, **given)
    sample = Sample(method, MOST / (n * many))
    method.eval()
    with torch.no_grad():
        for batch in loader.epoch(0):
            sample.look(batch.to(device), batch.epoch)
    return sample.frame(loader.tasks())
