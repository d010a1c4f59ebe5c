"""A small world made by hand, and meta-learning on it by plain autograd, one task at a time: the independent oracle.

Nothing here uses distmeta.adaptation: inputs are explicit one-hot, multi-hot or scalar matrices, every adapted
weight is a copy of its own, and gradients come from torch.autograd.grad with or without create_graph.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distmeta.adaptation.maps import Each
from distmeta.data.schema import Dataset, Field, Label
from distmeta.methods.gradient import GradientMethod
from distmeta.networks import ITEM_ID
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

USER_FIELDS = (Field("job", "categorical", 5), Field("tags", "multi_categorical", 7), Field("age", "numeric"))
ITEM_FIELDS = (
    Field("kind", "categorical", 4),
    Field("people", "multi_categorical", 90),
    Field("price", "numeric"),
)
ITEMS = 12


def dataset() -> Dataset:
    return Dataset("world", Label("rating", 1, 5), USER_FIELDS, ITEM_FIELDS, users=50, items=ITEMS, interactions=500)


def bags(fields: Sequence[Field], n: int, g: torch.Generator) -> dict[str, Bag]:
    """Random bags of n entities; multi-hot ones hold up to three values (90 indices: the value-by-value overlap)."""
    out = {}
    for f in fields:
        if f.type == "categorical":
            out[f.name] = Bag(torch.randint(f.size, (n, 1), generator=g), None)
        elif f.type == "numeric":
            out[f.name] = Bag(torch.zeros(n, 1, dtype=torch.int64), torch.randn(n, 1, generator=g, dtype=torch.float64))
        else:
            index = torch.randint(1, min(f.size, 9), (n, 3), generator=g)
            count = torch.randint(1, 4, (n, 1), generator=g)
            real = torch.arange(3) < count
            out[f.name] = Bag(index * real, real / count.double())
    return out


def rows(lengths: Sequence[int], g: torch.Generator) -> Rows:
    """Random rows of tasks with the given lengths, padded; labels on padding are large, to show if they leak."""
    width = max(*lengths, 1)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    label = torch.randint(1, 6, mask.shape, generator=g).double()
    return Rows(torch.randint(ITEMS, mask.shape, generator=g) * mask, torch.where(mask, label, 1e3), mask)


def batch(support: Sequence[Sequence[int]], query: Sequence[Sequence[int]], seed: int = 0) -> TaskBatch:
    """A batch of blocks with the given support and query lengths."""
    g = torch.Generator().manual_seed(seed)
    blocks, first = [], 0
    for s, q in zip(support, query, strict=True):
        ids = torch.arange(first, first + len(s))
        first += len(s)
        blocks.append(TaskBlock(ids, bags(USER_FIELDS, len(s), g), rows(s, g), rows(q, g)))
    return TaskBatch(torch.randperm(ITEMS, generator=g), tuple(blocks))


def items(seed: int = 1) -> dict[str, Bag]:
    return bags(ITEM_FIELDS, ITEMS, torch.Generator().manual_seed(seed))


def hot(bag: Bag, size: int) -> Tensor:
    """Bags [n, M] as a matrix [n, size]."""
    x = torch.zeros(len(bag.index), size, dtype=torch.float64)
    weight = torch.ones(bag.index.shape, dtype=torch.float64) if bag.weight is None else bag.weight.double()
    for n in range(len(x)):
        for m in range(bag.index.shape[1]):
            x[n, bag.index[n, m]] += weight[n, m]
    return x


def one_task(
    method: GradientMethod, batch: TaskBatch, block: TaskBlock, b: int, support: bool
) -> tuple[list[Tensor], Tensor]:
    """Input matrices (one a table, users' first; real rows only) and labels of task b's support or query rows."""
    side = block.support if support else block.query
    n = int(side.mask[b].sum())
    ids = batch.items[side.item[b, :n]]
    inputs = []
    for name, table in method.embedding.users().items():
        bag = block.user[name].take(torch.full((n,), b))
        inputs.append(hot(bag, len(table.weight)))
    for name, table in method.embedding.items().items():
        bag = Bag(ids[:, None], None) if name == ITEM_ID else items()[name].take(ids)
        inputs.append(hot(bag, len(table.weight)))
    return inputs, side.label[b, :n]


def network(parameters: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    x = features = torch.cat([m @ parameters[f"table{i}"] for i, m in enumerate(inputs)], -1)
    depth = sum(name.startswith("W") for name in parameters)
    for layer in range(depth):
        x = x @ parameters[f"W{layer}"] + parameters[f"b{layer}"]
        if layer + 1 < depth:
            x = x.relu()
    if "wide" in parameters:
        x = x + features @ parameters["wide"] + parameters["wide bias"]
    return x.squeeze(-1)


def parameters(method: GradientMethod) -> dict[str, Tensor]:
    """The method's shared parameters by the names that `network` uses."""
    tables = [*method.embedding.users().values(), *method.embedding.items().values()]
    named = {f"table{i}": t.weight for i, t in enumerate(tables)}
    for i, layer in enumerate(method.decision.layers):
        named |= {f"W{i}": layer.weight, f"b{i}": layer.bias}
    if method.decision.wide is not None:
        named |= {"wide": method.decision.wide.weight, "wide bias": method.decision.wide.bias}
    return named


def losses(method: GradientMethod, batch: TaskBatch, rate=None, norms: list[Tensor] | None = None) -> Tensor:
    """Query loss [B] of every task after the inner loop, each with its own copy of every adapted weight.

    rate(block, b, map) -> step size; default: the method's own, the same for all tasks.
    norms: where given, the squared norm of each task's first inner gradient is put into it.
    """
    shared = parameters(method)
    adapted = {id(m.weight) for m in method.adapted()} | {id(m.bias) for m in method.adapted() if hasattr(m, "bias")}
    owner = {id(p): m for m in method.adapted() for p in m.parameters()}
    out = []
    for block, own in zip(batch, method.rates(batch, method.embedding.encode(batch)), strict=True):
        for b in range(len(block.task)):
            inputs, labels = one_task(method, batch, block, b, support=True)
            fast = dict(shared)
            for step in range(method.options.steps if len(labels) else 0):
                loss = (network(fast, inputs) - labels).square().mean()
                names = [n for n in fast if id(shared[n]) in adapted]
                gradients = torch.autograd.grad(
                    loss, [fast[n] for n in names], create_graph=not method.options.first_order
                )
                if norms is not None and step == 0:
                    norms.append(sum(g.square().sum() for g in gradients))  # type: ignore[arg-type]
                for n, g in zip(names, gradients, strict=True):
                    m = owner[id(shared[n])]
                    alpha = rate(block, b, m) if rate else own[m]
                    if isinstance(alpha, Each):
                        alpha = alpha.bias if shared[n] is getattr(m, "bias", None) else alpha.weight
                    fast[n] = fast[n] - alpha * g
            inputs, labels = one_task(method, batch, block, b, support=False)
            out.append((network(fast, inputs) - labels).square().mean())
    return torch.stack(out)


def gradients(loss: Tensor, method: GradientMethod) -> dict[str, Tensor]:
    """Meta-gradient of the summed loss by parameter name; zero where it does not reach."""
    named = {n: p for n, p in method.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(loss.sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if v is None else v for (n, p), v in zip(named.items(), values, strict=True)}


def build(cls: type[GradientMethod], options, seed: int = 0) -> GradientMethod:
    torch.manual_seed(seed)
    return cls(replace(options), dataset(), items()).double()
