"""Transfer learning against plain autograd in float64: the joint loss and its gradient, and the fine-tuning loop."""

from dataclasses import replace

import oracle
import pytest
import torch
from torch import Tensor

from distmeta.methods import options
from distmeta.methods.transfer import Transfer
from distmeta.tasks import TaskBatch

RAGGED = ([[5, 3, 1, 0], [7, 6]], [[2, 4, 3, 2], [1, 5]])


def method(**changes) -> Transfer:
    o = replace(options.Transfer(), embedding=3, hidden=(6, 5), local_lr=0.03, item_ids=True, **changes)
    return oracle.build(Transfer, o)  # type: ignore[arg-type, return-value]


def tasks(m: Transfer, batch: TaskBatch) -> list[tuple[list[Tensor], Tensor, list[Tensor], Tensor]]:
    """Of each task the support's inputs and labels, and the query's."""
    places = [(block, b) for block in batch for b in range(len(block.task))]
    return [(*oracle.one_task(m, batch, *at, True), *oracle.one_task(m, batch, *at, False)) for at in places]


@pytest.mark.parametrize("kind", ["squared", "absolute"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_joint_loss_is_that_of_all_rows_without_an_inner_step(kind: str, wide: bool):
    m, batch = method(query_loss=kind, wide=wide), oracle.batch(*RAGGED)
    theirs = []
    for s, labels, q, others in tasks(m, batch):
        inputs = [torch.cat(pair) for pair in zip(s, q, strict=True)]
        error = oracle.network(oracle.parameters(m), inputs) - torch.cat((labels, others))
        theirs.append((error.square() if kind == "squared" else error.abs()).mean())
    ours = m.loss(batch)
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-9, atol=1e-9)
    a, b = oracle.gradients(ours, m), oracle.gradients(torch.stack(theirs), m)
    assert all(float(b[name].abs().max()) > 0 for name in b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("form", ["auto", "dual", "private"])
@pytest.mark.parametrize(("tuned", "steps"), [("all", 1), ("all", 4), ("decision", 4), ("all", 0)])
def test_fine_tuning_is_plain_gradient_descent_on_the_support(tuned: str, steps: int, form: str):
    m, batch = method(tuned=tuned, steps=steps, form=form), oracle.batch(*RAGGED)
    found = m.predict(m.adapt(batch), batch)
    ours = [scores[b, : int(block.query.mask[b].sum())]
            for scores, block in zip(found, batch, strict=True) for b in range(len(block.task))]  # fmt: skip
    rate, moved = float(m.log_rate.exp()[0]), []  # kept in float32, as everything is drawn
    for mine, (inputs, labels, query, _) in zip(ours, tasks(m, batch), strict=True):
        own = {name: p.detach().clone().requires_grad_() for name, p in oracle.parameters(m).items()}
        start = oracle.network(own, query).detach()
        free = [p for name, p in own.items() if tuned == "all" or not name.startswith("table")]
        for _ in range(steps if len(labels) else 0):
            loss = (oracle.network(own, inputs) - labels).square().mean()
            for p, g in zip(free, torch.autograd.grad(loss, free), strict=True):
                p.data -= rate * g
        theirs = oracle.network(own, query).detach()
        moved.append(float((theirs - start).abs().max()))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert [x > 1e-6 for x in moved] == [bool(steps and block.support.mask[b].any())
                                         for block in batch for b in range(len(block.task))]  # fmt: skip


def test_training_reaches_every_parameter_but_the_step_size():
    m = method()
    assert {n for n, p in m.named_parameters() if not p.requires_grad} == {"log_rate"}
    torch.testing.assert_close(m.log_rate.exp(), torch.full_like(m.log_rate, 0.03), rtol=1e-6, atol=0)
