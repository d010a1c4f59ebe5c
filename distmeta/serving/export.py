"""A trained feed-forward method as one graph of torch.export, from a support and candidates to their scores.

This is CMML's point (paper 002, §3.5): what is served holds no gradient, no inner loop and none of this package's code.
The number of users, of support rows and of candidates are free; so are the values of a user's multi-hot fields.

    program = exported(method)
    torch.export.save(program, "cmml.pt2")
    scores = torch.export.load("cmml.pt2").module()(*inputs)  # Served.forward says what they are
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

from distmeta.errors import UserError
from distmeta.methods import METHODS, method_class
from distmeta.methods.base import Method
from distmeta.methods.cmml import CMML
from distmeta.methods.contexts import Recurrent
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

User = dict[str, tuple[Tensor, ...]]
"""Field name -> (index int64 [b, M],) of a categorical field, (index, weight float [b, M]) of another, as in a Bag."""


class Served(nn.Module):
    """`adapt` and `predict` of a method in one forward pass over tensors alone.

    Raises:
        UserError: the method needs gradients or statistics to adapt; names those that can be exported.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        if not isinstance(method, CMML):
            able = " ".join(name for name in METHODS if issubclass(method_class(name), CMML))
            raise UserError(
                f"{method.name} adapts by gradients or in closed form, not in one graph; export one of {able}"
            )
        self.method = copy.deepcopy(method).eval().requires_grad_(False)
        if isinstance(self.method.encoder, Recurrent):
            self.method.encoder = Scanned(self.method.encoder)

    def forward(
        self, user: User, support_item: Tensor, support_label: Tensor, support_mask: Tensor, candidate: Tensor
    ) -> Tensor:
        """Scores [b, Q].

        Args:
            user: the users' fields; those that the method does not use may stand here too.
            support_item: item indices of the dataset, int64 [b, S], in time order, padding last.
            support_label: float [b, S]. support_mask: bool [b, S]; all false for a user with nothing.
            candidate: item indices, int64 [b, Q].
        """
        m = self.method
        items = torch.cat([support_item.flatten(), candidate.flatten()])
        place = torch.arange(items.shape[0], device=items.device)
        n = support_item.numel()
        support = Rows(place[:n].view_as(support_item), support_label, support_mask)
        query = Rows(place[n:].view_as(candidate), torch.zeros_like(candidate), torch.ones_like(candidate))
        bags = {name: Bag(values[0], values[1] if len(values) > 1 else None) for name, values in user.items()}
        block = TaskBlock(support_item[:, 0], bags, support, query)
        encoded = m.embedding.encode(TaskBatch(items, (block,)))
        return m.head.score(m.outputs(block, encoded, m.context(block, encoded)))


class Scanned(Recurrent):
    """A trained Recurrent whose recurrence is a scan, as nn.GRU and nn.LSTM are unrolled over a fixed length."""

    def __init__(self, trained: Recurrent) -> None:
        nn.Module.__init__(self)
        self.cell, self.layers = trained.cell, trained.layers

    def state(self, x: Tensor, mask: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        c: Any = self.cell
        # copies: a scan may not close over parameters
        weight, bias = c.weight_hh_l0.clone(), c.bias_hh_l0.clone()
        z = F.linear(x, c.weight_ih_l0, c.bias_ih_l0).transpose(0, 1)
        cell = _lstm if isinstance(c, nn.LSTM) else _gru

        def step(state: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            new = cell(state, row[0], F.linear(state[0], weight, bias))
            kept = [torch.where(row[1], n, old) for n, old in zip(new, state, strict=True)]
            return kept, row[1].clone()  # a scan must put something out

        start = [x.new_zeros(x.shape[0], c.hidden_size) for _ in range(2 if cell is _lstm else 1)]
        (state, *_), _ = scan(step, start, [z, mask.t().unsqueeze(-1)])
        return state


def _gru(state: list[Tensor], input_: Tensor, recurrent: Tensor) -> list[Tensor]:
    (r, z, n), (hr, hz, hn) = input_.chunk(3, -1), recurrent.chunk(3, -1)
    z, n = torch.sigmoid(z + hz), torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return [n + z * (state[0] - n)]


def _lstm(state: list[Tensor], input_: Tensor, recurrent: Tensor) -> list[Tensor]:
    i, f, g, o = (input_ + recurrent).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def example(method: Method, users: int = 3, support: int = 5, candidates: int = 7) -> tuple[Any, ...]:
    """Inputs of `Served.forward` of these sizes, all zeros but the mask."""
    like = next(method.parameters())
    user: User = {}
    for f in method.dataset.user_fields:
        width = 2 if f.type == "multi_categorical" else 1
        index = torch.zeros(users, width, dtype=torch.int64, device=like.device)
        user[f.name] = (index,) if f.type == "categorical" else (index, index.to(like.dtype))
    item = torch.zeros(users, support, dtype=torch.int64, device=like.device)
    return user, item, item.to(like.dtype), torch.ones_like(item, dtype=torch.bool), item.new_zeros(users, candidates)


@torch.no_grad()
def exported(method: Method) -> ExportedProgram:
    """The method as one graph; UserError where it cannot be one."""
    served, inputs = Served(method), example(method)
    b, s, q = Dim("users"), Dim("support"), Dim("candidates")
    user = {}
    for i, f in enumerate(method.dataset.user_fields):
        shape = {0: b, 1: Dim(f"values{i}")} if f.type == "multi_categorical" else {0: b}
        user[f.name] = (shape,) * len(inputs[0][f.name])
    rows = {0: b, 1: s}
    return export(served, inputs, dynamic_shapes=(user, rows, rows, rows, {0: b, 1: q}))
