"""What the engine is measured against: MAML in plain torch, one task at a time and under torch.func.vmap.

Nothing here uses distmeta.adaptation. Both are written as a good user would write them: features are looked up by
index and never expanded to one-hot rows, and under vmap embeddings that do not adapt are looked up outside: "vmap"
row by row, "vmap rows" each item once a batch. Embeddings that adapt are given to vmap as whole tables ("vmap"), or
("vmap rows": more work, done beforehand and not timed) as the rows that a task touches, with an index of its own.

Shape letters: B tasks, R rows (S support, Q query), U unique items, M values of a field, V values that a task
touches, e width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map

Inputs = list[tuple[Tensor, Tensor | None]]
"""Per field: index [..., R, M] and weight or None (one); without tables one pair: the rows x [..., R, d] and None."""
Side = tuple[Inputs, Tensor]
"""Inputs and labels [..., R] of support or query rows."""
Gradient = Callable[[Callable[..., Tensor], list[Tensor], Side], Sequence[Tensor]]
Rates = Sequence[Tensor | float]
"""Step size of each fast parameter: a number, or one for each element."""


def mlp(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """W [d, h] and b [h] of each dense layer in turn, ReLU between them: [..., d] -> [...]."""
    *hidden, (w, b) = zip(weights[::2], weights[1::2], strict=True)
    for v, c in hidden:
        x = (x @ v + c).relu()
    return (x @ w + b).squeeze(-1)


def embed(tables: Sequence[Tensor], inputs: Inputs) -> Tensor:
    """Embeddings of all fields side by side, [..., e · fields]; the rows themselves where there are no tables."""
    if not tables:
        return inputs[0][0]
    columns = []
    for table, (index, weight) in zip(tables, inputs, strict=True):
        rows = F.embedding(index, table)
        columns.append(rows.squeeze(-2) if weight is None else (rows * weight.unsqueeze(-1)).sum(-2))
    return torch.cat(columns, -1)


def task_loss(
    gradient: Gradient, fixed: list[Tensor], fast: list[Tensor], tables: int, steps: int, lr: Rates, s: Side, q: Side
) -> Tensor:
    """Query loss of one task after `steps` exact inner steps on all of `fast`.

    Args:
        gradient: of the support loss by the fast parameters, differentiable.
        fixed: tables that do not adapt; `fast`: `tables` tables that do, then the weights.
    """

    def loss(p: list[Tensor], inputs: Inputs, label: Tensor) -> Tensor:
        return (mlp(p[tables:], embed(fixed + p[:tables], inputs)) - label).square().mean()

    for _ in range(steps):
        fast = [p - a * g for p, a, g in zip(fast, lr, gradient(loss, fast, s), strict=True)]
    return loss(fast, *q)


def by_autograd(loss: Callable[..., Tensor], fast: list[Tensor], support: Side) -> Sequence[Tensor]:
    return torch.autograd.grad(loss(fast, *support), fast, create_graph=True)


def by_func(loss: Callable[..., Tensor], fast: list[Tensor], support: Side) -> Sequence[Tensor]:
    return grad(loss)(fast, *support)


def one(side: Side, task: int) -> Side:
    """The inputs and labels of one task."""
    return [(index[task], None if w is None else w[task]) for index, w in side[0]], side[1][task]


def loop(
    fixed: list[Tensor],
    fast: list[Tensor],
    tables: int,
    steps: int,
    lr: Rates,
    support: Side,
    query: Side,
    leaves: list[Tensor],
) -> list[Tensor]:
    """Meta-gradient by `leaves` of the summed query losses, one task at a time.

    The graph of each task is freed before the next one's is built: keeping all of them is slower.
    """
    total = [torch.zeros_like(p) for p in leaves]
    for b in range(len(support[1])):
        loss = task_loss(by_autograd, fixed, fast, tables, steps, lr, one(support, b), one(query, b))
        for t, g in zip(total, torch.autograd.grad(loss, leaves), strict=True):
            t += g
    return total


def vmapped(
    rows: list[Tensor],
    fast: list[Tensor],
    tables: int,
    steps: int,
    lr: Rates,
    support: Side,
    query: Side,
    leaves: list[Tensor],
) -> list[Tensor]:
    """Meta-gradient by `leaves` of the summed query losses of all tasks under one vmap.

    Args:
        rows: adapted tables that each task has rows of its own of, [B, V, e]; `fast`: adapted parameters that all
            tasks share (`tables` tables among them, then the weights).
    """
    own = len(rows)

    def loss(mine: list[Tensor], shared: list[Tensor], s: Side, q: Side) -> Tensor:
        return task_loss(by_func, [], mine + shared, own + tables, steps, lr, s, q)

    mapped = tree_map(lambda t: None if t is None else 0, (support, query))
    losses = vmap(loss, in_dims=(0, None, *mapped))(rows, fast, support, query)
    return list(torch.autograd.grad(losses.sum(), leaves))


def touched(support: Inputs, query: Inputs) -> tuple[list[Tensor], Inputs, Inputs]:
    """The values of each field that each task touches [B, V], padded, and both sides' inputs as indices into them."""
    values: list[Tensor] = []
    sides: tuple[Inputs, Inputs] = ([], [])
    for (i, v), (j, w) in zip(support, query, strict=True):
        both = torch.cat([i.flatten(1), j.flatten(1)], 1)
        unique = [torch.unique(task) for task in both]
        width = max(len(u) for u in unique)
        # padded with a value that is larger than any, so that each row stays sorted
        large = int(both.max()) + 1
        table = torch.stack([F.pad(u, (0, width - len(u)), value=large) for u in unique])
        for side, index, weight in ((sides[0], i, v), (sides[1], j, w)):
            side.append((torch.searchsorted(table, index.flatten(1).contiguous()).view(index.shape), weight))
        values.append(table.masked_fill(table == large, 0))
    return values, *sides
