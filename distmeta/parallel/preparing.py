"""What a method learns before training begins: worked out by rank 0, and handed to all workers."""

import time
from collections.abc import Iterator

import torch

from distmeta.data.domains import surroundings
from distmeta.data.scenarios import unasked_pairs
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError
from distmeta.exchange import Exchange
from distmeta.methods.base import Method
from distmeta.parallel.progress import Progress, clock

BEAT = 5.0
"""Seconds between two meetings of the workers."""


@torch.no_grad()
def prepare(method: Method, table: TaskTable, dataset: Dataset, exchange: Exchange, screen: Progress) -> None:
    """Have `method.prepare` learn from the positives of the training scenarios that nobody is asked about.

    All workers come here, and meet every few seconds while rank 0 is at work: who waits for long is taken for lost.

    Raises:
        UserError: the tasks are no scenarios; what the method raises.
    """
    began = time.monotonic()
    if not table.scenarios and method.sweeps:
        return  # it has the sums over the users' tasks
    if not table.scenarios:
        raise UserError("--pretrained: the vectors are of scenarios' users and items; give --protocol cmml-scenario")
    user, item = unasked_pairs(table, dataset, exchange)
    if not len(user):
        raise UserError(f"{table.location}: the training scenarios have no positives for --pretrained; leave it out")
    if method.surveys and exchange.rank == 0:
        method.survey(surroundings(table))
    work = method.prepare(user, item) if exchange.rank == 0 else iter(())
    last = ""
    while said := exchange.gather(_meanwhile(work).encode())[0].decode():
        last = said
        screen.within(lambda said=said: said)
    screen.line(f"{last}  {clock(time.monotonic() - began)}")
    for value in method.state_dict().values():
        if exchange.rank:
            value.zero_()
        exchange.sum(value.view(-1))


def _meanwhile(work: Iterator[str]) -> str:
    """The last thing said within BEAT seconds of work; nothing where it was done before."""
    began, said = time.monotonic(), ""
    while time.monotonic() - began < BEAT and (more := next(work, "")):
        said = more
    return said
