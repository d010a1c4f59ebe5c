"""The jointly trained recommenders against their papers' formulas, row by row, and fine-tuning against a loop."""

from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from distmeta.data.protocols.base import KINDS
from distmeta.errors import UserError
from distmeta.methods import METHODS, method_class
from distmeta.methods.dcn import DCN
from distmeta.methods.finetuning import Weights
from distmeta.methods.joint import Joint
from distmeta.methods.widedeep import WideDeep, crossed_fields
from distmeta.networks import USER_ID
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

RAGGED = ([[5, 3, 1, 0], [7, 6]], [[2, 4, 3, 2], [1, 5]])
NAMES = ("widedeep", "deepfm", "dcn")


def method(name: str, **changes: Any) -> Any:
    o = METHODS[name].options(embedding=3, hidden=(6, 5), item_ids=True, local_lr=0.02, **changes)
    torch.manual_seed(3)
    m = method_class(name)(o, oracle.dataset(), oracle.items()).double()
    with torch.no_grad():  # what starts from 0 is to count as well
        for p in m.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return m


def one(bags: dict[str, Bag], row: int) -> dict[str, Bag]:
    return {name: bag.take(torch.tensor([row])) for name, bag in bags.items()}


def fields(m: Joint, user: dict[str, Bag], item: dict[str, Bag]) -> list[Tensor]:
    """The row of each field's table, or the weighted sum of its values' rows: users' first."""
    sides = ((m.embedding.users(), user), (m.embedding.items(), item))
    return [(oracle.hot(side[n], len(t.weight)) @ t.weight)[0] for tables, side in sides for n, t in tables.items()]


def mlp(m: Joint, x: Tensor, own: dict[str, Tensor] | None = None) -> Tensor:
    """The units of the last hidden layer."""
    p = own or dict(m.named_parameters())
    for i in range(len(m.layers)):
        x = torch.relu(x @ p[f"layers.{i}.weight"] + p[f"layers.{i}.bias"])
    return x


def formula(
    m: Joint, user: dict[str, Bag], item: dict[str, Bag], own: dict[str, Tensor] | None = None, free: Any = None
) -> Tensor:
    """A row's output as its paper has it; `own`: with these parameters; `free`: and these features of the user."""
    p = own or dict(m.named_parameters())
    v = fields(m, user, item)
    if free is not None:
        v[: m.user_fields] = free.split(m.options.embedding + m.linear)
    if m.name in ("dcn", "dcn-f"):
        x0 = torch.cat(v)
        x = x0
        for weight, shift in zip(p["cross"].t()[:-1], p["shift"], strict=True):
            x = x0 * (x @ weight) + shift + x
        more = x @ p["cross"][:, -1]
    else:
        more = torch.stack([f[-1] for f in v]).sum()
        v = [f[:-1] for f in v]
        if m.name == "deepfm":
            more = more + sum(((a * b).sum() for i, a in enumerate(v) for b in v[:i]), torch.zeros(()))
        else:
            assert isinstance(m, WideDeep)
            for table, name in zip(m.cross, m.embedding.item_names, strict=True):
                of = torch.cat([oracle.hot(user[f.name], f.size)[0] for f in m.crossed])
                more = more + oracle.hot(item[name], len(table.weight))[0] @ table.weight @ of  # type: ignore[operator]
    return (mlp(m, torch.cat(v), own) @ p["last.weight"] + p["last.bias"])[0] + more


def side(m: Joint, batch: TaskBatch, block: TaskBlock, b: int, rows: Rows) -> tuple[Any, list[Any], Tensor]:
    """A task's user, the items of its rows, and their labels."""
    n = int(rows.mask[b].sum())
    bags = m.embedding.item_bags(batch.items)
    known = {USER_ID: Bag(block.task[b : b + 1, None] // KINDS, None)}
    return one(block.user, b) | known, [one(bags, int(i)) for i in rows.item[b, :n]], rows.label[b, :n]


def places(batch: TaskBatch) -> list[tuple[TaskBlock, int]]:
    return [(block, b) for block in batch for b in range(len(block.task))]


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_joint_loss_is_the_paper_s_formula_on_every_row(name: str, ids: bool):
    m, batch = method(name, user_ids=ids, hidden_ids=0.0), oracle.batch(*RAGGED)
    batch = replace(batch, blocks=tuple(replace(b, task=b.task * KINDS + 1) for b in batch))
    theirs = []
    for block, b in places(batch):
        errors = []
        for rows in (block.support, block.query):
            user, items, labels = side(m, batch, block, b, rows)
            errors += [formula(m, user, item) - label for item, label in zip(items, labels, strict=True)]
        theirs.append(torch.stack(errors).square().mean())
    ours = m.loss(batch)
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-9, atol=1e-9)
    a, b = oracle.gradients(ours, m), oracle.gradients(torch.stack(theirs), m)
    assert all(float(b[key].abs().max()) > 0 for key in b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9, msg=key)


def test_a_cross_layer_by_hand():
    """x_0 = (1, 2), w_0 = (1, −1), b_0 = (.5, 0): x_1 = −x_0 + b_0 + x_0 = (.5, 0); w_1 = (2, 1), b_1 = (0, 1):
    x_2 = (1, 2) · 1 + (0, 1) + (.5, 0) = (1.5, 3); times (1, 10): 31.5."""
    m = object.__new__(DCN)
    torch.nn.Module.__init__(m)
    m.cross = torch.nn.Parameter(torch.tensor([[1.0, 2.0, 1.0], [-1.0, 1.0, 10.0]]))
    m.shift = torch.nn.Parameter(torch.tensor([[0.5, 0.0], [0.0, 1.0]]))
    m.features = lambda _: oracle_features(torch.tensor([[[1.0, 2.0]]]))  # type: ignore[method-assign, assignment]
    assert m.crossed(Weights(), None).tolist() == [[31.5]]  # type: ignore[arg-type]


def oracle_features(x: Tensor) -> Any:
    from distmeta.adaptation.features import Dense, Features

    return Features(Dense(x))


def test_a_factorisation_machine_s_pairs_by_hand():
    """Users (1, 2) and (0, 1), items (3, −1): pairs 2 + 1 − 1 = ⟨u1, u2⟩ 2, ⟨u1, i⟩ 1, ⟨u2, i⟩ −1."""
    m = method("deepfm")
    m.options = replace(m.options, embedding=2)
    user = torch.tensor([1.0, 2, 9, 0, 1, 9], dtype=torch.float64)
    item = torch.tensor([3.0, -1, 9], dtype=torch.float64)
    u, i = m._side(user, 2), m._side(item, 1)
    assert float(u[0] + i[0] + (u[1:] * i[1:]).sum()) == 2 + 1 - 1


@pytest.mark.parametrize("tuner", ["adam", "sgd"])
@pytest.mark.parametrize("tuned", ["all", "layers", "user"])
@pytest.mark.parametrize("name", ["deepfm", "dcn-f"])
def test_fine_tuning_is_a_loop_over_tasks_in_plain_autograd(name: str, tuned: str, tuner: str):
    """Features of the user are their own free vector; the tables of items stay."""
    m, batch = method(name, steps=4, tuned=tuned, tuner=tuner, tune_penalty=3.0), oracle.batch(*RAGGED)
    found = m.predict(m.adapt(batch), batch)
    index = {id(block): scores for block, scores in zip(batch, found, strict=True)}
    moved = 0.0
    for block, b in places(batch):
        user, items, labels = side(m, batch, block, b, block.support)
        _, asked, wanted = side(m, batch, block, b, block.query)
        own = {k: p.detach().clone().requires_grad_() for k, p in m.named_parameters()}
        free = torch.cat(fields(m, user, asked[0])[: m.user_fields]).detach().clone().requires_grad_()

        def run(item: dict[str, Bag], user: Any = user, own: Any = own, free: Tensor = free) -> Tensor:
            return formula(m, user, item, own, free)

        names = [k for k in own if k.split(".")[0] in ("layers", "last", "cross", "shift")] if tuned != "user" else []
        leaves = [own[k] for k in names] + ([free] if tuned != "layers" else [])
        start = [x.detach().clone() for x in leaves]
        make = torch.optim.Adam if tuner == "adam" else torch.optim.SGD
        optimizer = make(leaves, lr=0.02)
        for _ in range(4 if len(labels) else 0):
            optimizer.zero_grad()
            loss = torch.stack([run(i) - y for i, y in zip(items, labels, strict=True)]).square().mean()
            pull = sum(((x - x0).square().sum() for x, x0 in zip(leaves, start, strict=True)), torch.zeros(()))
            (loss + 3.0 / len(labels) * pull / 2).backward()
            optimizer.step()
        mine = index[id(block)][b, : len(wanted)]
        torch.testing.assert_close(mine, torch.stack([run(i).detach() for i in asked]), rtol=1e-8, atol=1e-8)
        moved += sum(float((x - x0).detach().abs().max()) for x, x0 in zip(leaves, start, strict=True))
    assert moved > 0.01


def test_a_new_user_s_id_is_nothing_and_a_hidden_one_too():
    m = method("deepfm", user_ids=True, hidden_ids=1.0)
    batch = oracle.batch(*RAGGED)
    trained = m.loss(batch)
    far = replace(batch, blocks=tuple(replace(b, task=b.task * KINDS + 10**6) for b in batch))
    m.options = replace(m.options, hidden_ids=0.0)
    torch.testing.assert_close(m.loss(far), trained)
    assert not torch.allclose(m.loss(batch), trained)


def test_what_is_crossed_and_what_cannot_be_tuned():
    found = crossed_fields(oracle.USER_FIELDS, 11)
    assert [f.name for f in found] == ["job"]  # 5 values; with the 7 of tags they would be 12; age is a number
    assert [f.name for f in crossed_fields(oracle.USER_FIELDS, 12)] == ["job", "tags"]
    m, batch = method("dcn-f", tuned="user"), oracle.batch(*RAGGED)
    rows = replace(batch.blocks[0].support, user=torch.zeros_like(batch.blocks[0].support.item))
    block = replace(batch.blocks[0], support=rows, query=rows, user={})
    fields_of = oracle.bags(oracle.USER_FIELDS, 1, torch.Generator().manual_seed(0))
    scenarios = replace(batch, blocks=(block,), users=torch.tensor([4]), user_fields=fields_of)
    with pytest.raises(UserError, match="--tuned user: the tasks are scenarios"):
        m.adapt(scenarios)
    m.options = replace(m.options, tuned="all")
    assert bool(m.predict(m.adapt(scenarios), scenarios)[0].isfinite().all())
