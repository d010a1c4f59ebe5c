"""ReLU and dense layer in turn, n times, as two autograd nodes: one for the pass, one for its δ.

Small tasks make small tensors, and an operation on one costs as much in bookkeeping as in arithmetic. So the upper
layers of an MLP, whatever form their fast weights have, run as a whole: `forward` is z ← relu(z) W' + b', layer by
layer, and `deltas` is δ ← (δ W'ᵀ) ∘ relu'(x), layer by layer from the top. Both are differentiable, by a reverse pass
written out here. With g = ∂/∂z of the first and e = ∂/∂(δ W'ᵀ) of the second

    ∂/∂x = g W'ᵀ        ∂/∂δ = e W'        ∂/∂W' = xᵀ g + eᵀ δ        ∂/∂b' = Σ g

which a form of fast weights (Shared, Pairs, Private) turns into gradients of what it is made of.

Shape letters: b tasks, R rows, P rows of pairs (S a step), d inputs, h outputs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from distmeta.adaptation.products import product_transposed, products_with, through, transposed_product, weight_gradient

Gradients = tuple[Tensor | None, ...]


class Form(Protocol):
    """W' [d, h] and b' of a layer, as products: arithmetic on tensors without a graph."""

    def forward(self, x: Tensor) -> Tensor:
        """x W' + b' [b, R, h], in memory of its own."""
        ...

    def back(self, delta: Tensor) -> Tensor:
        """δ W'ᵀ [b, R, d], in memory of its own."""
        ...

    def forward_gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, Gradients]:
        """From ∂/∂(x W' + b'): ∂/∂x, in memory of its own, and ∂/∂ of each tensor that makes up the form."""
        ...

    def back_gradients(self, delta: Tensor, e: Tensor) -> tuple[Tensor, Gradients]:
        """From ∂/∂(δ W'ᵀ): ∂/∂δ, in memory of its own, and ∂/∂ of each tensor that makes up the form."""
        ...


class Shared:
    """Weights that no step has changed: weight [d, h], bias [h]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)

    def back(self, delta: Tensor) -> Tensor:
        if delta.shape[-1] == 1:  # an outer product, which needs no product of matrices
            return delta * self.weight.view(-1)
        return torch.matmul(delta, self.weight.t())

    def forward_gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, Gradients]:
        flat = g.flatten(0, 1)
        return self.back(g), (weight_gradient(x.flatten(0, 1), flat), flat.sum(0))

    def back_gradients(self, delta: Tensor, e: Tensor) -> tuple[Tensor, Gradients]:
        return torch.matmul(e, self.weight), (torch.mm(e.flatten(0, 1).t(), delta.flatten(0, 1)), None)


class Private:
    """A weight [b, d, h] and a bias [b, 1, h] for each task."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[2] == 1:
            return products_with(x, self.weight).add_(self.bias)
        return torch.baddbmm(self.bias, x, self.weight)

    def back(self, delta: Tensor) -> Tensor:
        return product_transposed(delta, self.weight)

    def forward_gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, Gradients]:
        return self.back(g), (transposed_product(x, g), g.sum(1, keepdim=True))

    def back_gradients(self, delta: Tensor, e: Tensor) -> tuple[Tensor, Gradients]:
        return products_with(e, self.weight), (transposed_product(e, delta), None)


class Pairs:
    """Shared weights and pairs: W' = W − α x_sᵀ δ_s, b' = b − α Σ δ_s; x_s [b, P, d], δ_s [b, P, h], α a number, or a
    scalar or [b, 1, 1] that may be learned. Products with W' run through x x_sᵀ and δ δ_sᵀ [b, R, P]."""

    def __init__(self, weight: Tensor, bias: Tensor, x: Tensor, delta: Tensor, rate: Tensor | float) -> None:
        self.shared = Shared(weight, bias)
        self.x = x
        self.delta = delta
        self.rate = rate

    def _gram(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.x.transpose(1, 2)).add_(1)

    def _delta_gram(self, delta: Tensor) -> Tensor:
        return torch.bmm(delta, self.delta.transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.forward(x).baddbmm_(self._gram(x).mul_(-self.rate), self.delta)

    def back(self, delta: Tensor) -> Tensor:
        return self.shared.back(delta).baddbmm_(self._delta_gram(delta).mul_(-self.rate), self.x)

    def forward_gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, Gradients]:
        gx, shared = self.shared.forward_gradients(x, g)
        gram, cross = self._gram(x), self._delta_gram(g)
        rate = self._rate_gradient(gram, cross)
        gram, cross = gram.mul_(-self.rate), cross.mul_(-self.rate)
        gx.baddbmm_(cross, self.x)
        return gx, (*shared, transposed_product(cross, x), transposed_product(gram, g), *rate)

    def back_gradients(self, delta: Tensor, e: Tensor) -> tuple[Tensor, Gradients]:
        gdelta, shared = self.shared.back_gradients(delta, e)
        gram, cross = self._delta_gram(delta), torch.bmm(e, self.x.transpose(1, 2))
        rate = self._rate_gradient(gram, cross)
        gram, cross = gram.mul_(-self.rate), cross.mul_(-self.rate)
        gdelta.baddbmm_(cross, self.delta)
        return gdelta, (*shared, transposed_product(gram, e), transposed_product(cross, delta), *rate)

    def _rate_gradient(self, a: Tensor, b: Tensor) -> Gradients:
        if not isinstance(self.rate, Tensor):
            return ()
        return ((a * b).sum_to_size(self.rate.shape).neg_() if self.rate.requires_grad else None,)


class State(NamedTuple):
    """A form, the tensors it is made of, and numbers beside them."""

    kind: type[Shared] | type[Private] | type[Pairs]
    tensors: tuple[Tensor, ...]
    numbers: tuple[float, ...] = ()


Shape = tuple[type, int, tuple[float, ...]]
"""A state without its tensors, of which it tells the number: those go to autograd one by one."""


def _forms(shapes: Sequence[Shape], tensors: Sequence[Tensor]) -> list[Any]:
    forms, start = [], 0
    for kind, count, numbers in shapes:
        forms.append(kind(*tensors[start : start + count], *numbers))
        start += count
    return forms


def _relu(z: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(z, slope) if slope else torch.relu(z)


def _relu_(z: Tensor, slope: float) -> Tensor:
    return F.leaky_relu_(z, slope) if slope else torch.relu_(z)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shapes: Sequence[Shape], slope: float, z: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        x = _relu(z, slope)  # z is not ours to overwrite; those of the layers above are
        inputs: list[Tensor] = []
        for form in _forms(shapes, tensors):
            if inputs:
                x = _relu_(z, slope)
            inputs.append(x)
            z = form.forward(x)
        ctx.save_for_backward(*inputs, *tensors)
        ctx.shapes, ctx.slope = shapes, slope
        ctx.set_materialize_grads(False)
        return z, *inputs

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Any, ...]:
        n, saved = len(ctx.shapes), ctx.saved_tensors
        forms = _forms(ctx.shapes, saved[n:])
        g, gradients = grad[0], [()] * n
        for i in reversed(range(n)):
            assert g is not None  # δ of the top layer is made of z
            x, also = saved[i], grad[1 + i]
            g, gradients[i] = forms[i].forward_gradients(x, g)
            g = through(g if also is None else g.add_(also), x, ctx.slope, out=g)
        return None, None, g, *(t for made in gradients for t in made)


class _Deltas(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shapes: Sequence[Shape], slope: float, delta: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        n = len(shapes)
        forms, deltas = _forms(shapes, others[n:]), [delta]
        for i in reversed(range(n)):
            e = forms[i].back(deltas[0])
            deltas.insert(0, through(e, others[i], slope, out=e))
        ctx.save_for_backward(*others[:n], *deltas[1:], *others[n:])
        ctx.shapes, ctx.slope = shapes, slope
        ctx.set_materialize_grads(False)
        return tuple(deltas[:-1])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Any, ...]:
        n, saved = len(ctx.shapes), ctx.saved_tensors
        gradients: list[Gradients] = [(None,) * count for _, count, _ in ctx.shapes]
        g: Tensor | None = None
        for i, form in enumerate(_forms(ctx.shapes, saved[2 * n :])):
            x, delta, also = saved[i], saved[n + i], grad[i]
            if g is not None:
                e = through(g if also is None else g.add_(also), x, ctx.slope, out=g)
            elif also is not None:
                e = through(also, x, ctx.slope)  # not ours to overwrite
            else:
                continue  # nobody asked for this δ, nor for those below
            g, gradients[i] = form.back_gradients(delta, e)
        return None, None, g, *(None,) * n, *(t for made in gradients for t in made)


def _apart(states: Sequence[State]) -> tuple[list[Shape], list[Tensor]]:
    return [(s.kind, len(s.tensors), s.numbers) for s in states], [t for s in states for t in s.tensors]


def forward(states: Sequence[State], z: Tensor, slope: float) -> tuple[Tensor, list[Tensor]]:
    """z ← relu(z) W' + b' for each layer: the last z [b, R, h], and each layer's input relu(z) [b, R, d]."""
    shapes, tensors = _apart(states)
    z, *inputs = _Forward.apply(shapes, slope, z, *tensors)  # type: ignore[misc]
    return z, inputs


def deltas(states: Sequence[State], inputs: Sequence[Tensor], delta: Tensor, slope: float) -> list[Tensor]:
    """δ ← (δ W'ᵀ) ∘ relu'(x) from the last layer's δ [b, R, h] down: ∂L/∂z below each layer, in the layers' order.

    The derivative by x of relu' is zero almost everywhere and is not formed.
    """
    shapes, tensors = _apart(states)
    return list(_Deltas.apply(shapes, slope, delta, *inputs, *tensors))  # type: ignore[arg-type]
