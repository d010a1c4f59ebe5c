"""What a method learns before training begins: worked out by rank 0, and handed to all workers."""

import time

import torch

from distmeta.data.scenarios import unasked_pairs
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import UserError
from distmeta.exchange import Exchange
from distmeta.methods.base import Method
from distmeta.parallel.progress import Progress, clock


@torch.no_grad()
def prepare(method: Method, table: TaskTable, dataset: Dataset, exchange: Exchange, screen: Progress) -> None:
    """Have `method.prepare` learn from the positives of the training scenarios that nobody is asked about.

    All workers come here. They meet after each pass, so that none waits for longer than one takes.

    Raises:
        UserError: the tasks are no scenarios; what the method raises.
    """
    began = time.monotonic()
    if not table.scenarios:
        raise UserError("--pretrained: the vectors are of scenarios' users and items; give --protocol cmml-scenario")
    user, item = unasked_pairs(table, dataset, exchange)
    if not len(user):
        raise UserError(f"{table.location}: the training scenarios have no positives for --pretrained; leave it out")
    passes = method.prepare(user, item) if exchange.rank == 0 else iter(())
    last = ""
    while said := exchange.gather(next(passes, "").encode())[0].decode():
        last = said
        screen.within(lambda said=said: said)
    screen.line(f"{last}  {clock(time.monotonic() - began)}")
    for value in method.state_dict().values():
        if exchange.rank:
            value.zero_()
        exchange.sum(value.view(-1))
