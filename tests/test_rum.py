"""RUM: reading and writing by hand, the reverse pass by autograd, whole losses row by row, and what it refuses."""

import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from cmml_oracle import RAGGED, scenarios
from torch import Tensor

from distmeta.errors import UserError
from distmeta.methods import METHODS, method_class
from distmeta.methods.recurrence import Packing
from distmeta.methods.rum import RUM, Mind
from distmeta.methods.writes import written
from distmeta.tasks import Rows, TaskBatch, TaskBlock

SIZES = {"embedding": 3, "width": 4, "slots": 3, "item_ids": True}


def rum(name: str, **changes: Any) -> RUM:
    kind: Any = method_class(name)
    made: Any = oracle.build(kind, METHODS[name].options(**{**SIZES, **changes}))
    return made


def rows(item: list[int]) -> Rows:
    mask = torch.ones(1, len(item), dtype=torch.bool)
    return Rows(torch.tensor([item]), torch.zeros(1, len(item), dtype=torch.float64), mask)


def test_item_level_reading_by_hand():
    """The last two of three items are (ln 2, 0) and (0, ln 2); (1, 0) reads 2/3 of the first and 1/3 of the second."""
    m = rum("rum-item", width=2, slots=2, alpha=0.5, labels="none", biases="none")
    ln2 = math.log(2)
    x = torch.tensor([[9.0, 9.0], [ln2, 0.0], [0.0, ln2], [1.0, 0.0]], dtype=torch.float64)
    side = rows([0, 1, 2])
    ((keys, values, mask),) = m.memory(x, [side], [side.mask.double()])
    user = torch.tensor([[0.25, 8.0]], dtype=torch.float64)
    mind = Mind(user, torch.zeros(1, 1, dtype=torch.float64), keys, values, mask)
    asked = m.asked(mind, rows([3]), x, torch.zeros(4, dtype=torch.float64))
    out = m.outputs(asked, mind.values)
    torch.testing.assert_close(asked.read, torch.tensor([[[2 / 3, 1 / 3]]], dtype=torch.float64))
    torch.testing.assert_close(out - m.base, torch.tensor([[0.25 + ln2 / 3]], dtype=torch.float64))


def test_feature_level_writing_and_reading_by_hand():
    """Keys ln 3 and 0: the item 1 goes to the slots by 3/4 and 1/4, the item −1 by 1/4 and 3/4. Half is erased; what
    they add is tanh(± ln 2) = ± .6, of the second row twice over. Slots: (.45, .15), then (.09375, −.80625)."""
    m = rum("rum-feature", width=1, slots=2, alpha=0.5, labels="none", biases="none")
    with torch.no_grad():
        m.get_parameter("keys").copy_(torch.tensor([[math.log(3)], [0.0]]))
        m.get_parameter("gates.weight").copy_(torch.tensor([[0.0, math.log(2)]]))
        m.get_parameter("gates.bias").zero_()
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    ((keys, values, mask),) = m.memory(x, [rows([0, 1])], [torch.tensor([[1.0, 2.0]], dtype=torch.float64)])
    wanted = [0.45 * (1 - 1 / 8) - 2 * 0.15, 0.15 * (1 - 3 / 8) - 2 * 0.45]
    torch.testing.assert_close(values.flatten().tolist(), wanted, rtol=0, atol=1e-7)
    mind = Mind(torch.full((1, 1), 0.1).double(), torch.zeros(1, 1).double(), keys, values, mask)
    out = m.scored(mind, rows([0]), x, torch.zeros(2).double())
    assert (out - m.base).item() == pytest.approx(0.1 + 0.5 * (0.75 * wanted[0] + 0.25 * wanted[1]), abs=1e-7)


def test_the_reverse_pass_of_writing_is_autograd_s():
    """float64 1e-9, tasks of 4, 0, 1 and 3 rows."""
    mask = torch.arange(4) < torch.tensor([4, 0, 1, 3])[:, None]
    packing, n = Packing.of(mask), int(mask.sum())
    g = torch.Generator().manual_seed(0)
    weight, erase, add = (torch.rand(n, d, generator=g, dtype=torch.float64).requires_grad_() for d in (3, 5, 5))
    found = written(weight, erase, add, packing)
    packed = {(int(t), int(r)): i for i, (t, r) in enumerate(zip(packing.task, packing.row, strict=True))}
    slots = []
    for task in packing.tasks.tolist():
        v = torch.zeros(3, 5, dtype=torch.float64)
        for i in [packed[task, r] for r in range(int(mask[task].sum()))]:
            v = v * (1 - weight[i][:, None] * erase[i]) + weight[i][:, None] * add[i]
        slots.append(v)
    wanted = torch.stack(slots)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    by = torch.randn(found.shape, generator=g, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((v * by).sum(), (weight, erase, add)) for v in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def one_loss(m: RUM, batch: TaskBatch, block: TaskBlock, b: int) -> Tensor:
    """A task's query loss by the module's equations, row by row."""
    o, tables = m.options, [*m.embedding.users().values(), *m.embedding.items().values()]
    users = len(m.embedding.users())
    sides = []
    for support in (True, False):
        inputs, label = oracle.one_task(m, batch, block, b, support)  # type: ignore[arg-type]
        parts = [x @ t.weight for x, t in zip(inputs, tables, strict=True)]
        z = torch.cat(parts[users:], 1) @ m.item.weight + m.item.bias
        e, bias = (z[:, :-1], z[:, -1]) if o.biases != "none" else (z, z[:, 0] * 0)
        sides.append((e, bias, label))
    assert m.user
    fields = [oracle.hot(block.user[n].take(torch.tensor([b])), len(t.weight)) @ t.weight for n, t in zip(
        m.embedding.user_names, tables, strict=False
    )]  # fmt: skip
    own = (torch.cat(fields, 1) @ m.user.weight + m.user.bias)[0]
    (e, bias, label), (asked, asked_bias, wanted) = sides
    left = label - m.base - bias
    offset = m.gain * left.sum() / (len(label) + o.shrink) if o.biases == "user" else 0.0
    scale = {"none": left * 0 + 1, "product": (label - 3) / 2, "residual": left - offset}[o.labels]
    if m.name == "rum-item":
        keys, values = e[-o.slots :], (e * scale[:, None])[-o.slots :]
    else:
        keys = m.get_parameter("keys")
        values = torch.zeros(o.slots, o.width, dtype=torch.float64)
        for row, s in zip(e, scale, strict=True):
            w = (keys @ row).softmax(0)[:, None]
            gates = row @ m.get_parameter("gates.weight") + m.get_parameter("gates.bias")
            erase, add = gates.chunk(2)
            values = values * (1 - w * erase.sigmoid()) + w * add.tanh() * s

    def score(x: Tensor, by: Tensor, values: Tensor) -> Tensor:
        return m.base + offset + by + (own + o.alpha * (keys @ x).softmax(0) @ values) @ x

    for _ in range(o.steps if len(label) else 0):
        errors = torch.stack([score(x, by, values) - y for x, by, y in zip(e, bias, label, strict=True)])
        (gradient,) = torch.autograd.grad(errors.square().mean(), values, create_graph=True)
        values = values - o.local_lr * gradient
    return torch.stack(
        [(score(x, by, values) - y).square() for x, by, y in zip(asked, asked_bias, wanted, strict=True)]
    ).mean()


@pytest.mark.parametrize("name", ["rum-item", "rum-feature"])
@pytest.mark.parametrize(
    "options",
    [{}, {"labels": "none", "biases": "none"}, {"labels": "product", "biases": "item", "steps": 2, "local_lr": 0.3}],
)
def test_losses_and_gradients_row_by_row(name: str, options: dict[str, Any]):
    """float64 1e-9, ragged tasks, one without support."""
    m = rum(name, **options)
    batch = oracle.batch(*RAGGED)
    wanted = torch.stack([one_loss(m, batch, block, b) for block in batch for b in range(len(block.task))])
    found = m.loss(batch)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    theirs, ours = (oracle.gradients(loss, m) for loss in (wanted, found))  # type: ignore[arg-type]
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-9, atol=1e-9, msg=key)
    assert all(bool(value.any()) for value in ours.values())


def test_of_clicks_the_paper_s_memory_holds_clicks_alone():
    data = replace(oracle.dataset(), label=replace(oracle.dataset().label, kind="click", minimum=0, maximum=1))
    options = METHODS["rum-item"].options(**SIZES, labels="none", biases="none", steps=0)
    m = method_class("rum-item")(options, data, oracle.items()).double()
    batch = oracle.batch([[3]], [[2]])
    (block,) = batch
    label, item = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([[4, 5, 6]])
    some = replace(block, support=replace(block.support, label=label, item=item))
    kept = replace(block, support=Rows(item[:, ::2], label[:, ::2], torch.ones(1, 2, dtype=torch.bool)))
    scores = [m.predict(m.adapt(b), b)[0] for b in (replace(batch, blocks=(one,)) for one in (some, kept))]
    torch.testing.assert_close(*scores)


def test_scenarios_are_refused():
    with pytest.raises(UserError, match="the tasks are scenarios"):
        rum("rum-item").loss(scenarios(oracle.batch([[5, 3, 0]], [[4, 6, 2]])))
