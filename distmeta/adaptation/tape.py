"""A forward pass over the rows of a block that can write out its own δ.

`backward` walks the pass in reverse and computes δ = ∂L/∂z of every adapted map in ordinary, differentiable
operations. So an exact second-order meta-gradient needs one reverse pass of autograd, over the query loss, and
no graph of a graph (adaptation.md: "δ of an MLP can be written out in forward form").

Shape letters: b tasks, R rows (1 for a value that is the same in all rows of a task), U unique items, F fields.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distmeta.adaptation import chain
from distmeta.adaptation.fast import FastWeights
from distmeta.adaptation.features import Dense, Features, Part, PerTask
from distmeta.adaptation.maps import Layer, Linear, Map, Table
from distmeta.adaptation.products import relu_delta
from distmeta.adaptation.starts import Own
from distmeta.tasks import Bag


class Place(Protocol):
    """Where a group of tables is looked up: the users of a block, or the items of its rows."""

    def base(self) -> Part:
        """The unadapted embeddings of all fields side by side."""
        ...

    def bag(self, name: str) -> Bag:
        """Bags [b, R, M] of one field; the same object at each call."""
        ...


class Node:
    """A value of the pass: one part of features; δ arrives in `backward`."""

    def __init__(self, part: Part, needs: bool) -> None:
        self.part = part
        self.needs = needs
        """Whether an adapted map lies below, so that δ has to flow here."""
        self.delta: Tensor | None = None

    def receive(self, delta: Tensor) -> None:
        self.delta = delta if self.delta is None else self.delta + delta


Records = dict[Map, list[tuple[Features | Bag, Tensor]]]


class Tape:
    """One pass. `fast` holds the weights changed so far; `rates` of it names the adapted maps."""

    def __init__(self, fast: FastWeights) -> None:
        self.fast = fast
        # closures that refer to nodes but never to the tape: a cycle would keep the graph alive until the
        # garbage collector runs, and the allocator would fetch new pages for every batch
        self._reverse: list[Callable[[Records], None]] = []

    def lookup(self, tables: Mapping[str, Table], place: Place) -> Node:
        """Embeddings of all fields of `place` side by side, as adapted so far."""
        fast, part = self.fast, place.base()
        corrections = [
            self.fast.tables[t].correction(place.bag(name), self.fast.overlaps) if t in self.fast.tables else None
            for name, t in tables.items()
        ]
        if any(c is not None for c in corrections):
            kind = PerTask if isinstance(part, PerTask) else Dense
            rows = part.rows()
            widths = [t.weight.shape[1] for t in tables.values()]
            whole = [
                rows.new_zeros(()).expand(*rows.shape[:2], w) if c is None else c
                for c, w in zip(corrections, widths, strict=True)
            ]
            part = kind(rows - torch.cat(whole, dim=-1))
        node = Node(part, any(t in fast.rates for t in tables.values()))

        def reverse(records: Records) -> None:
            if node.needs and node.delta is not None:
                deltas = node.delta.split([t.weight.shape[1] for t in tables.values()], dim=-1)
                for (name, table), delta in zip(tables.items(), deltas, strict=True):
                    if table in fast.rates:
                        records.setdefault(table, []).append((place.bag(name), delta))

        self._reverse.append(reverse)
        return node

    def linear(self, layer: Layer, *inputs: Node) -> Node:
        """x W' + b' of the inputs side by side; per task where all inputs are."""
        x = self._features(inputs)
        per_task = all(isinstance(p, PerTask) for p in x.parts)
        now = self.fast.of(layer, x)
        if now is None:
            assert isinstance(layer, Linear)
            shared = Own(layer)
            z, input_delta = shared.times(x), shared.input_delta
        else:
            z, input_delta = now.forward(x), now.input_delta
        adapted = layer in self.fast.rates
        node = Node(PerTask(z) if per_task else Dense(z), adapted or any(n.needs for n in inputs))

        def reverse(records: Records) -> None:
            delta = node.delta
            if not node.needs or delta is None:
                return
            if adapted:
                records.setdefault(layer, []).append((x, delta))
            for i, n in enumerate(inputs):
                if n.needs:
                    # a per-task input feeds every row: its δ is the sum over rows, taken before the product
                    d = delta.sum(1, keepdim=True) if isinstance(n.part, PerTask) and delta.shape[1] != 1 else delta
                    n.receive(input_delta(d, x, i))

        self._reverse.append(reverse)
        return node

    def relu(self, x: Node, slope: float = 0.0) -> Node:
        """Leaky ReLU with the given slope below 0 (0: plain ReLU)."""
        z = x.part.rows()
        y = torch.nn.functional.leaky_relu(z, slope) if slope else torch.relu(z)
        node = Node(type(x.part)(y) if isinstance(x.part, PerTask | Dense) else Dense(y), x.needs)

        def reverse(records: Records) -> None:
            if x.needs and node.delta is not None:
                x.receive(relu_delta(node.delta, y, slope))

        self._reverse.append(reverse)
        return node

    def chain(self, layers: Sequence[Linear], x: Node, slope: float = 0.0) -> Node:
        """(Leaky) ReLU and dense layer in turn, for each of `layers`: the same as `relu` and `linear` of each, in
        fewer and larger pieces (chain.py)."""
        if not layers:
            return x
        kind = PerTask if isinstance(x.part, PerTask) else Dense
        states = [self.fast.state(layer) for layer in layers]
        z, inputs = chain.forward(states, x.part.rows(), slope)
        adapted = [layer in self.fast.rates for layer in layers]
        node = Node(kind(z), x.needs or any(adapted))

        def reverse(records: Records) -> None:
            if not node.needs or node.delta is None:
                return
            lowest = 0 if x.needs else adapted.index(True) + 1  # below it nothing adapts
            below = chain.deltas(states[lowest:], inputs[lowest:], node.delta, slope)
            deltas = [*(None,) * lowest, *below, node.delta]
            for i, (layer, row) in enumerate(zip(layers, inputs, strict=True)):
                if adapted[i]:
                    records.setdefault(layer, []).append((Features(kind(row)), deltas[i + 1]))
            if x.needs:
                x.receive(deltas[0])

        self._reverse.append(reverse)
        return node

    def add(self, *terms: Node) -> Node:
        """The sum of values of one shape, or per task."""
        first, *others = (t.part.rows() for t in terms)
        node = Node(Dense(sum(others, start=first)), any(t.needs for t in terms))

        def reverse(records: Records) -> None:
            for t in terms:
                if t.needs and node.delta is not None:
                    d = node.delta
                    t.receive(d.sum(1, keepdim=True) if isinstance(t.part, PerTask) and d.shape[1] != 1 else d)

        self._reverse.append(reverse)
        return node

    def dot(self, user: Node, item: Node) -> Node:
        """Inner products [b, R, 1] of a value that is the same in all rows [b, 1, d] and one that is not [b, R, d]."""
        u, i = user.part.rows(), item.part.rows()
        node = Node(Dense((u * i).sum(-1, keepdim=True)), user.needs or item.needs)

        def reverse(records: Records) -> None:
            if node.delta is None:
                return
            if user.needs:
                user.receive((node.delta * i).sum(1, keepdim=True))
            if item.needs:
                item.receive(node.delta * u)

        self._reverse.append(reverse)
        return node

    def backward(self, out: Node, delta: Tensor) -> Records:
        """(input, δ) of every place of use of every adapted map, given ∂L/∂out [b, R, C]; each L is one task's loss."""
        out.receive(delta)
        records: Records = {}
        for reverse in reversed(self._reverse):
            reverse(records)
        return records

    def _features(self, inputs: tuple[Node, ...]) -> Features:
        # the same parts are the same Features in every pass: Gram matrices of inputs that do not move are kept by it
        key = tuple(id(n.part) for n in inputs)
        if key not in self.fast.inputs:
            self.fast.inputs[key] = Features(*(n.part for n in inputs), fixed=not any(n.needs for n in inputs))
        return self.fast.inputs[key]
