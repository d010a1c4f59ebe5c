"""What a task's support is condensed into: encoders and hybrid generators of CMML (paper 002, §3.2, §3.3).

An encoder maps the support's rows, [e_u, e_i] and what is said of their labels, to one context C a task, which means
nothing where there are none. A generator joins C with the features of a row to be predicted. Both take features as
parts (adaptation/features.py), so that the user's half is multiplied once a task and an item's once a batch. Rows stand
first in time order, padding after them.

Shape letters: b tasks, S support rows, Q query rows, d the width of user and item side by side, which is C's too.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmeta.adaptation.features import Dense, Features, Gathered, Part, PerTask, Scaled, Unique, total
from distmeta.adaptation.maps import Linear
from distmeta.adaptation.products import affine
from distmeta.data.schema import Label as Range
from distmeta.methods.recurrence import Packing, states
from distmeta.tasks import Rows

LABEL_WIDTH = 64
"""Units of the label's embedding (the authors' code)."""


def linear(layer: Any, x: Features | Tensor) -> Tensor:
    """x W + b of a `Linear`: [b, R, h], or [b, 1, h] of features that are per task."""
    if isinstance(x, Features):
        return x.times(layer.weight, layer.bias)
    return affine(x, layer.weight, layer.bias)


class Label(nn.Module):
    """What the encoder is told of the labels: a ReLU layer of them, that and the row's features times the label, the
    labels themselves, or nothing.

    They are scaled to [−1, 1]; those of scenarios are 0 or 1 whatever the dataset's. The authors' second linear layer
    after the ReLU is left to the encoder's first one. From features times label, the first layer alone has what a
    gradient step would: without, that product must be learned.

    Args:
        d: width of a row's features.
    """

    def __init__(self, label: Range, kind: str, d: int) -> None:
        super().__init__()
        self.ends = label.minimum, label.maximum
        self.layer = Linear(1, LABEL_WIDTH) if kind in ("embedding", "product") else None
        self.product = kind == "product"
        self.width = {"embedding": LABEL_WIDTH, "product": LABEL_WIDTH + d, "value": 1, "none": 0}[kind]

    def scaled(self, rows: Rows) -> Tensor:
        """Labels [b, S] within [−1, 1]; 0 on padding."""
        low, high = self.ends if rows.user is None else (0.0, 1.0)
        return torch.where(rows.mask, (2 * rows.label - (low + high)) / (high - low), 0.0)

    def beside(self, parts: Sequence[Part], rows: Rows) -> list[Part]:
        """What stands beside the `parts` of the rows' features: parts [b, S, …] of `width` in all."""
        y = self.scaled(rows)
        if self.layer is None:
            return [Dense(y.unsqueeze(-1))] if self.width else []
        found: list[Part] = [self._embedded(self.layer, y)]
        return found + [Scaled(p, y.unsqueeze(-1)) for p in parts if self.product]

    def _embedded(self, layer: Linear, y: Tensor) -> Part:
        """ReLU of the layer of labels y [b, S]."""
        if torch.compiler.is_compiling():  # how many different ones there are would be a size of the graph
            return Dense(torch.relu(linear(layer, y.unsqueeze(-1))))
        each, which = torch.unique(y, return_inverse=True)  # few: a rating's steps
        return Gathered(Unique(torch.relu(linear(layer, each.unsqueeze(-1)))), which)

    def positive(self, rows: Rows) -> Rows:
        """The rows whose label is above the middle of its range, moved to the front in their order (paper 002, §4.4,
        Non-negative)."""
        kept = self.scaled(rows) > 0
        s = kept.shape[1]
        # keys that differ: ONNX has no stable sort
        order = torch.argsort(torch.arange(s, device=kept.device) + s * (~kept).long(), dim=1)
        user = None if rows.user is None else rows.user.gather(1, order)
        return Rows(rows.item.gather(1, order), rows.label.gather(1, order), kept.gather(1, order), user)


class Pooling(nn.Module):
    """PE: an MLP with ReLU on each row, then the rows' mean or maximum (Eq. 6)."""

    def __init__(self, d: int, hidden: Sequence[int], out: int, most: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise([d, *hidden, out]))
        self.most = most

    def forward(self, x: Features, mask: Tensor) -> Tensor:
        """C [b, out] of rows x [b, S, d]."""
        first, *middle, last = self.layers
        h = torch.relu(linear(first, x))
        for layer in middle:
            h = torch.relu(linear(layer, h))
        if self.most:
            c = linear(last, h)
            c = c.masked_fill(~mask.unsqueeze(-1), -torch.inf)
            c = F.pad(c, (0, 0, 0, 1), value=-torch.inf).amax(1)  # a row more, as there may be none
        else:  # the mean of a linear map is that of the mean
            share = mask.to(h.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
            c = linear(last, torch.bmm(share.unsqueeze(1), h).squeeze(1))
        return c


class Recurrent(nn.Module):
    """SE: a GRU or LSTM over the whole support in time order, then an MLP with ReLU on the state after the last row
    (the lost Eq. 7). The authors' user setting feeds the rows one by one and keeps the last one's."""

    def __init__(self, d: int, cell: str, units: int, hidden: Sequence[int], out: int) -> None:
        super().__init__()
        self.kind = cell
        self.cell = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](d, units, batch_first=True)
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise([units, *hidden, out]))

    def forward(self, x: Features, mask: Tensor) -> Tensor:
        """C [b, out] of rows x [b, S, d]."""
        first, *others = self.layers
        c = linear(first, self.state(x, mask))
        for layer in others:
            c = linear(layer, torch.relu(c))
        return c

    def state(self, x: Features, mask: Tensor) -> Tensor:
        """The state [b, units] after each task's last row; 0 where it has none."""
        packing = Packing.of(mask)
        z = self.inputs(x.at(packing.task, packing.row)).squeeze(0)
        c: Any = self.cell
        ends = states(self.kind, z, c.weight_hh_l0, c.bias_hh_l0, packing)[packing.last]
        return ends.new_zeros(len(mask), c.hidden_size).index_copy(0, packing.tasks, ends)

    def inputs(self, x: Features) -> Tensor:
        """What the gates get of rows x [b, R, d], the input's biases included: [b, R, gates · units]."""
        whole: Any = self.cell.weight_ih_l0
        slices = zip(x.parts, whole.split([p.width for p in x.parts], 1), x.starts, strict=True)
        return total([self.cell.bias_ih_l0, *(p.product(w.t(), whole, first) for p, w, first in slices)])


def encoder(kind: str, d: int, units: int, hidden: Sequence[int], out: int) -> Pooling | Recurrent:
    """The encoder of that kind (mean, max, gru, lstm) for rows of width d."""
    if kind in ("mean", "max"):
        return Pooling(d, hidden, out, kind == "max")
    return Recurrent(d, kind, units, hidden, out)


class Hybrid(nn.Module):
    """The hybrid context C_h of each query row (the lost Eq. 8): none (C_h = C), dot (C ∘ [e_u, e_i]) or mlp (a ReLU
    layer on [C, e_u, e_i])."""

    def __init__(self, kind: str, d: int) -> None:
        super().__init__()
        self.kind = kind
        self.layer = Linear(2 * d, d) if kind == "mlp" else None

    def forward(self, context: Tensor, parts: Sequence[Part]) -> Features:
        """C_h, [b, Q, d], from C [b, d] and the rows' embeddings; what is the same in all rows of a task stays so."""
        c = context.unsqueeze(1)
        if self.kind == "none":
            return Features(PerTask(c))
        if self.layer is not None:
            whole = Features(PerTask(c), *parts)
            return Features(Dense(torch.relu(linear(self.layer, whole))))
        pieces = zip(parts, c.split([p.width for p in parts], -1), strict=True)
        return Features(*((PerTask if isinstance(p, PerTask) else Dense)(p.rows() * own) for p, own in pieces))
