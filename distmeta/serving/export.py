"""A trained feed-forward method as one graph of torch.export, from a support and candidates to their scores.

This is CMML's point (paper 002, §3.5): what is served holds no gradient, no inner loop and none of this package's code.
The number of users, of support rows and of candidates are free; so are the values of a user's multi-hot fields.

    program = exported(method)
    torch.export.save(program, "cmml.pt2")
    scores = torch.export.load("cmml.pt2").module()(*inputs)  # what they are, Served.forward and `inputs` say
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

from distmeta.adaptation.features import Features
from distmeta.data.schema import Dataset
from distmeta.errors import UserError
from distmeta.methods import METHODS, method_class
from distmeta.methods.base import Method
from distmeta.methods.cmml import CMML
from distmeta.methods.contexts import Recurrent
from distmeta.networks import Embedding, Encoded
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

User = dict[str, tuple[Tensor, ...]]
"""Field name -> (index int64 [b, M],) of a categorical field, (index, weight float [b, M]) of another, as in a Bag."""

People = tuple[Tensor, Tensor, Tensor]
"""Of scenarios: user indices of the dataset int64 [V], and whose each support row [b, S] and each candidate [b, Q] is,
int64 positions in those."""

MEANT = {"categorical": "one each", "multi_categorical": "0 on padding", "numeric": "always 0"}
WEIGHT = {
    "multi_categorical": "1 / (number of the user's values) on each, 0 on padding",
    "numeric": "({0.name} - {0.mean:g}) / {0.std:g}",
}
"""How `Bag` holds the values of a field, by its type."""


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
        self.method.embedding = Baked(self.method.embedding, method.dataset.items)
        if isinstance(self.method.encoder, Recurrent):
            self.method.encoder = Scanned(self.method.encoder)

    def forward(
        self,
        user: User,
        support_item: Tensor,
        support_label: Tensor,
        support_mask: Tensor,
        candidate: Tensor,
        people: People | None = None,
    ) -> Tensor:
        """Scores [b, Q].

        Args:
            user: the users' fields, of scenarios those of its V users.
            support_item: item indices of the dataset, int64 [b, S], in time order, padding last.
            support_label: float [b, S]. support_mask: bool [b, S]; all false for a user with nothing.
            candidate: item indices, int64 [b, Q].
            people: the users of the rows, where tasks are scenarios.
        """
        m, bags = self.method, {n: Bag(v[0], v[1] if len(v) > 1 else None) for n, v in user.items()}
        users, support_user, candidate_user = people or (None, None, None)

        def batch(item: Tensor, rows: Rows) -> tuple[TaskBlock, Encoded]:
            """A block whose support and query both are those rows: the encoder sees one, the backbone the other."""
            block = TaskBlock(support_mask[:, :1], {} if people else bags, rows, rows)
            whole = TaskBatch(item.flatten(), (block,), users=users, user_fields=bags if people else {})
            return block, m.embedding.encode(whole)

        # two batches, so that the encoder's layers do not see the candidates
        known = batch(support_item, Rows(_places(support_item), support_label, support_mask, support_user))
        unknown = torch.zeros_like(candidate)  # of candidates the items alone are looked at
        block, encoded = batch(candidate, Rows(_places(candidate), unknown, unknown, candidate_user))
        return m.heads.of(block).score(m.outputs(block, encoded, m.context(*known)))


def _places(item: Tensor) -> Tensor:
    """Where each of the items [b, R] stands when they are flat."""
    return torch.arange(item.numel(), device=item.device).view_as(item)


class Baked(Embedding):
    """A trained Embedding whose items are worked out: what was looked up in several tables is one row of one."""

    def __init__(self, trained: Embedding, items: int) -> None:
        nn.Module.__init__(self)
        self.user_names, self.user_tables = trained.user_names, trained.user_tables
        self.user_vectors = trained.user_vectors
        self.user_width, self.item_width = trained.user_width, trained.item_width
        with torch.no_grad():
            every, _ = trained.item_rows(torch.arange(items, device=next(trained.parameters()).device))
        self.register_buffer("item", every)

    def item_rows(self, items: Tensor) -> tuple[Tensor, dict[str, Bag]]:
        return F.embedding(items, self.get_buffer("item")), {}


class Scanned(Recurrent):
    """A trained Recurrent whose recurrence is a scan, as nn.GRU and nn.LSTM are unrolled over a fixed length."""

    def __init__(self, trained: Recurrent) -> None:
        nn.Module.__init__(self)
        self.cell, self.layers = trained.cell, trained.layers

    def state(self, x: Features, mask: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        c: Any = self.cell
        # copies: a scan may not close over parameters
        weight, bias = c.weight_hh_l0.t().clone(), c.bias_hh_l0.clone()
        z = self.inputs(x).transpose(0, 1)
        cell = _lstm if isinstance(c, nn.LSTM) else _gru

        def step(state: list[Tensor], row: Tensor) -> tuple[list[Tensor], Tensor]:
            new = cell(state, row, torch.addmm(bias, state[0], weight))
            return new, new[0].clone()

        start = [z.new_zeros(z.shape[1], c.hidden_size) for _ in range(2 if cell is _lstm else 1)]
        _, states = scan(step, start, z)
        last = (mask.sum(1) - 1).clamp(min=0)  # what follows is padding
        return states.gather(0, last[None, :, None].expand(1, -1, c.hidden_size)).squeeze(0)


def _gru(state: list[Tensor], input_: Tensor, recurrent: Tensor) -> list[Tensor]:
    (r, z, n), (hr, hz, hn) = input_.chunk(3, -1), recurrent.chunk(3, -1)
    z, n = torch.sigmoid(z + hz), torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return [n + z * (state[0] - n)]


def _lstm(state: list[Tensor], input_: Tensor, recurrent: Tensor) -> list[Tensor]:
    i, f, g, o = (input_ + recurrent).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def example(method: Method, scenarios: bool, users: int = 3, support: int = 5, candidates: int = 7) -> tuple[Any, ...]:
    """Inputs of `Served.forward` of these sizes, all zeros but the mask."""
    like = next(method.parameters())
    user: User = {}
    for f in method.dataset.user_fields:
        width = 2 if f.type == "multi_categorical" else 1
        index = torch.zeros(users, width, dtype=torch.int64, device=like.device)
        user[f.name] = (index,) if f.type == "categorical" else (index, index.to(like.dtype))
    item = torch.zeros(users, support, dtype=torch.int64, device=like.device)
    candidate, mask = item.new_zeros(users, candidates), torch.ones_like(item, dtype=torch.bool)
    inputs = user, item, item.to(like.dtype), mask, candidate
    # clones: one tensor twice would be one input of the graph
    return (*inputs, (item.new_zeros(users), item.clone(), candidate.clone())) if scenarios else inputs


@torch.no_grad()
def exported(method: Method, scenarios: bool = False) -> ExportedProgram:
    """The method as one graph; UserError where it cannot be one.

    Args:
        scenarios: the tasks that it serves are scenarios, whose rows have users of their own.
    """
    served, inputs = Served(method), example(method, scenarios)
    b, s, q = Dim("users"), Dim("support"), Dim("candidates")
    one = Dim("people") if scenarios else b
    user = {}
    for i, f in enumerate(method.dataset.user_fields):
        shape = {0: one, 1: Dim(f"values{i}")} if f.type == "multi_categorical" else {0: one}
        user[f.name] = (shape,) * len(inputs[0][f.name])
    rows, candidates = {0: b, 1: s}, {0: b, 1: q}
    shapes: tuple[Any, ...] = (user, rows, rows, rows, candidates)
    return export(served, inputs, dynamic_shapes=(*shapes, ({0: one}, rows, candidates)) if scenarios else shapes)


def given(batch: TaskBatch, block: TaskBlock, dataset: Dataset) -> tuple[Any, ...]:
    """What an exported graph takes for a block of tasks; `dataset` is the method's."""
    bags = block.user if batch.users is None else batch.user_fields
    known = {f.name: bags[f.name] for f in dataset.user_fields}
    user = {n: (b.index,) if b.weight is None else (b.index, b.weight) for n, b in known.items()}
    s, q = block.support, block.query
    rows = user, batch.items[s.item], s.label, s.mask, batch.items[q.item]
    return rows if batch.users is None else (*rows, (batch.users, s.user, q.user))


def described(dataset: Dataset, scenarios: bool = False) -> list[dict[str, Any]]:
    """Name, dtype, shape and meaning of each tensor that the graph takes, in its order; free sizes go by name."""
    one = "people" if scenarios else "users"
    found = []
    for i, f in enumerate(dataset.user_fields):
        shape = [one, f"values{i}" if f.type == "multi_categorical" else 1]
        found.append((f"user_{f.name}", "int64", shape, f"indices of {f.name}, 0 to {f.size - 1}; {MEANT[f.type]}"))
        if f.type != "categorical":
            found.append((f"user_{f.name}_weight", "float32", shape, WEIGHT[f.type].format(f)))
    low, high = (0, 1) if scenarios else (dataset.label.minimum, dataset.label.maximum)
    rows, candidates = ["users", "support"], ["users", "candidates"]
    found += [
        ("support_item", "int64", rows, f"item indices, 0 to {dataset.items - 1}, in time order, padding last"),
        ("support_label", "float32", rows, f"labels from {low:g} to {high:g}; anything on padding"),
        ("support_mask", "bool", rows, "false on padding; all false for a user with nothing"),
        ("candidate", "int64", candidates, f"item indices to score, 0 to {dataset.items - 1}"),
    ]
    if scenarios:
        found += [
            ("people", "int64", [one], "the users of the rows, by their index in the dataset"),
            ("support_user", "int64", rows, "whose each support row is: a position in people"),
            ("candidate_user", "int64", candidates, "whom each candidate is scored for: a position in people"),
        ]
    return [dict(zip(("name", "dtype", "shape", "meaning"), one, strict=True)) for one in found]
