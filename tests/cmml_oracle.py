"""CMML by the paper's equations: task by task and row by row in float64, without padding, batching or hoisting."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import oracle
import torch
from torch import Tensor

from distmeta.methods import METHODS, method_class
from distmeta.methods.cmml import CMML
from distmeta.methods.contexts import Recurrent
from distmeta.networks import USER_ID
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

RAGGED = ([[5, 3, 1, 0], [7, 6]], [[2, 4, 3, 2], [1, 5]])
SIZES: dict[str, Any] = {
    "embedding": 3, "hidden": (6, 5), "hyper": 7, "units": 4, "encoder_hidden": (5,), "item_ids": True,
    "hidden_support": 0.0,
}  # fmt: skip
VARIANTS = ("cmml-linear", "cmml-sigmoid", "cmml-film", "cmml-softm")


def cmml(name: str, **changes: Any) -> CMML:
    kind: Any = METHODS[name].options
    allowed = {f.name for f in fields(kind)}
    given = {k: v for k, v in {**SIZES, "modules": 3, "module_width": 4, **changes}.items() if k in allowed}
    m: Any = oracle.build(method_class(name), kind(**given))  # type: ignore[arg-type]
    with torch.no_grad():
        m.nothing.copy_(torch.linspace(-0.5, 0.5, len(m.nothing)))
    return m


def mlp(layers: Any, x: Tensor, last: bool = False) -> Tensor:
    """Fully connected layers with ReLU between them, and after the last where `last`."""
    for i, layer in enumerate(layers):
        x = x @ layer.weight + layer.bias
        if last or i + 1 < len(layers):
            x = x.relu()
    return x


def features(m: CMML, batch: TaskBatch, block: TaskBlock, b: int, support: bool) -> tuple[Tensor, Tensor]:
    """[e_u, e_i] [n, d] and labels [n] of a task's real rows, from explicit one-hot matrices."""
    tables = [*m.embedding.users().values(), *m.embedding.items().values()]
    found, all_labels = [torch.zeros(0, sum(t.weight.shape[1] for t in tables), dtype=torch.float64)], []
    for one in [block] if batch.users is None else rows_alone(batch, block, b, support):
        inputs, labels = oracle.one_task(m, batch, one, b if one is block else 0, support)  # type: ignore[arg-type]
        found.append(torch.cat([x @ t.weight for x, t in zip(inputs, tables, strict=True)], 1))
        all_labels.append(labels)
    return torch.cat(found), torch.cat([torch.zeros(0, dtype=torch.float64), *all_labels])


def rows_alone(batch: TaskBatch, block: TaskBlock, b: int, support: bool) -> Iterator[TaskBlock]:
    """Each real row of a scenario as a task of its own, whose user is the row's."""
    side = block.support if support else block.query
    assert side.user is not None
    assert batch.users is not None
    fields = {**batch.user_fields, USER_ID: Bag(batch.users[:, None], None)}
    for r in range(int(side.mask[b].sum())):
        user = {name: bag.take(side.user[b, r : r + 1]) for name, bag in fields.items()}
        row = Rows(*(getattr(side, f)[b : b + 1, r : r + 1] for f in ("item", "label", "mask")))
        yield TaskBlock(block.task[b : b + 1], user, row, row)


def gru(cell: Any, rows: list[Tensor]) -> Tensor:
    h = rows[0].new_zeros(cell.hidden_size)
    for x in rows:
        r, z, n = (cell.weight_ih_l0 @ x + cell.bias_ih_l0).chunk(3)
        hr, hz, hn = (cell.weight_hh_l0 @ h + cell.bias_hh_l0).chunk(3)
        z = torch.sigmoid(z + hz)
        h = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h
    return h


def lstm(cell: Any, rows: list[Tensor]) -> Tensor:
    h = c = rows[0].new_zeros(cell.hidden_size)
    for x in rows:
        i, f, g, o = (cell.weight_ih_l0 @ x + cell.bias_ih_l0 + cell.weight_hh_l0 @ h + cell.bias_hh_l0).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return h


def context(m: CMML, x: Tensor, labels: Tensor, scenario: bool = False) -> Tensor:
    """C [d] of one task."""
    o = m.options
    rows = []
    for row, label in zip(x.detach() if o.detach else x, labels, strict=True):
        y = 2 * label - 1 if scenario else (label - 3) / 2
        if o.positives and y <= 0:
            continue
        if m.label.layer is not None:
            row_times_label = [row * y] if o.labels == "product" else []
            rows.append(torch.cat([row, (y * m.label.layer.weight[0] + m.label.layer.bias).relu(), *row_times_label]))
        else:
            rows.append(torch.cat([row, y[None]]) if o.labels == "value" else row)
    if not rows:
        return m.nothing
    layers = m.encoder.layers
    if isinstance(m.encoder, Recurrent):
        return mlp(layers, {"gru": gru, "lstm": lstm}[o.encoder](m.encoder.cell, rows))
    each = torch.stack([mlp(layers, row) for row in rows])
    return each.mean(0) if o.encoder == "mean" else each.max(0).values


def generated(hyper: Any, c: Tensor) -> list[Tensor]:
    """The hypernetwork's values at each depth that has any."""
    found = []
    for layer, last in zip(hyper.trunk, hyper.heads, strict=True):
        c = (c @ layer.weight + layer.bias).relu()
        if hasattr(last, "weight"):
            found.append(c @ last.weight + last.bias)
    return found


def act(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, 0.01 * z)


def output(m: CMML, x: Tensor, c: Tensor) -> Tensor:
    """The output of one row with features x [d] under the hybrid context c."""
    net: Any = m.backbone
    values = generated(net.hyper, c)
    if m.name == "cmml-linear":
        for layer in net.layers:
            x = act(x @ layer.weight + layer.bias)
        return values[0][:-1] @ x + values[0][-1]
    if m.name == "cmml-softm":
        return soft(net, x, values)
    for layer, v in zip(net.layers, values, strict=True):
        z = x @ layer.weight + layer.bias
        if m.name == "cmml-sigmoid":
            x = act(torch.sigmoid(v) * z)
        else:
            gamma, beta = v[: len(z)], v[len(z) :]
            x = act((1 + gamma if m.options.one_plus else gamma) * z + beta)
    return (x @ net.last.weight + net.last.bias)[0]


def soft(net: Any, x: Tensor, logits: list[Tensor]) -> Tensor:
    """Eq. 12 and 13 module by module: softmax over the sources."""
    m, w = net.m, net.width
    first = net.layers[0]
    obs = [act(x @ first.weight[:, j * w : (j + 1) * w] + first.bias[j * w : (j + 1) * w]) for j in range(m)]
    for layer, sigma in zip(net.modules_, logits[:-1], strict=True):
        after = []
        for i in range(m):
            e = [sigma[i * m + j].exp() for j in range(m)]
            mixed = sum((e[j] / sum(e)) * obs[j] for j in range(m))
            after.append(act(mixed @ layer.weight[i] + layer.bias[i]))
        obs = after
    e = [logits[-1][j].exp() for j in range(m)]
    mixed = sum((e[j] / sum(e)) * obs[j] for j in range(m))
    return (mixed @ net.last.weight + net.last.bias)[0]


def predictions(m: CMML, batch: TaskBatch, block: TaskBlock, b: int) -> Tensor:
    c = context(m, *features(m, batch, block, b, support=True), scenario=batch.users is not None)
    outs = []
    for x in features(m, batch, block, b, support=False)[0]:
        if m.options.hybrid == "none":
            hybrid = c
        elif m.options.hybrid == "dot":
            hybrid = c * x
        else:
            hybrid = mlp([m.hybrid.layer], torch.cat([c, x]), last=True)
        outs.append(output(m, x, hybrid))
        if m.backbone.wide is not None:
            outs[-1] = outs[-1] + (hybrid @ m.backbone.wide.weight + m.backbone.wide.bias)[0]
    return torch.stack(outs)


def reference(m: CMML, batch: TaskBatch) -> Tensor:
    """Losses [B] by Eq. 3 and 5."""
    losses = []
    for block in batch:
        for b in range(len(block.task)):
            labels = features(m, batch, block, b, support=False)[1]
            losses.append((predictions(m, batch, block, b) - labels).square().mean())
    return torch.stack(losses)


def scenarios(batch: TaskBatch, people: int = 4) -> TaskBatch:
    """The batch's tasks as scenarios of `people` users: rows have a user each, and labels 1 and 0 in turn."""
    g = torch.Generator().manual_seed(5)

    def side(rows: Rows) -> Rows:
        label = (1.0 - torch.arange(rows.mask.shape[1]).double() % 2).expand(rows.mask.shape)
        user = torch.randint(people, rows.mask.shape, generator=g)
        return Rows(rows.item, torch.where(rows.mask, label, 7.0), rows.mask, user * rows.mask)

    blocks = tuple(replace(b, user={}, support=side(b.support), query=side(b.query)) for b in batch)
    fields = oracle.bags(oracle.USER_FIELDS, people, g)
    return replace(batch, blocks=blocks, users=torch.tensor([31, 2, 44, 17])[:people], user_fields=fields)


def pairwise_hinge(outputs: Tensor, labels: Tensor, user: Tensor) -> Tensor:
    """Eq. 4 pair by pair."""
    each = []
    for p in range(len(outputs)):
        against = [n for n in range(len(outputs)) if labels[p] == 1 and labels[n] == 0 and user[n] == user[p]]
        if against:
            each.append(sum((1 - outputs[p] + outputs[n]).clamp(min=0) for n in against) / len(against))
    return sum(each) / len(each) if each else outputs.sum() * 0  # type: ignore[return-value]
