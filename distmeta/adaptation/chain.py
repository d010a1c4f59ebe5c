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

from distmeta.adaptation.precision import matmul
from distmeta.adaptation.products import (
    product_transposed,
    products_with,
    through,
    times,
    transposed_product,
    weight_gradient,
)

Gradients = tuple[Tensor | None, ...]
Kept = tuple[Tensor, ...]


class Form(Protocol):
    """W' [d, h] and b' of a layer, as products: arithmetic on tensors without a graph."""

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """x W' + b' [b, R, h], in memory of its own, and what `forward_gradients` wants of it again."""
        ...

    def back(self, delta: Tensor) -> tuple[Tensor, Kept]:
        """δ W'ᵀ [b, R, d], in memory of its own, and what `back_gradients` wants of it again."""
        ...

    def forward_gradients(self, x: Tensor, g: Tensor, kept: Kept) -> tuple[Tensor, Gradients]:
        """From ∂/∂(x W' + b'): ∂/∂x, in memory of its own, and ∂/∂ of each tensor that makes up the form."""
        ...

    def back_gradients(self, delta: Tensor, e: Tensor, kept: Kept) -> tuple[Tensor, Gradients]:
        """From ∂/∂(δ W'ᵀ): ∂/∂δ, in memory of its own, and ∂/∂ of each tensor that makes up the form."""
        ...


class Shared:
    """Weights that no step has changed: weight [d, h], bias [h]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        return times(x, self.weight, self.bias), ()

    def back(self, delta: Tensor) -> tuple[Tensor, Kept]:
        if delta.shape[-1] == 1:  # an outer product, which needs no product of matrices
            return delta * self.weight.view(-1), ()
        return matmul(delta, self.weight.t()), ()

    def forward_gradients(self, x: Tensor, g: Tensor, kept: Kept = ()) -> tuple[Tensor, Gradients]:
        flat = g.flatten(0, 1)
        return self.back(g)[0], (weight_gradient(x.flatten(0, 1), flat), flat.sum(0))

    def back_gradients(self, delta: Tensor, e: Tensor, kept: Kept = ()) -> tuple[Tensor, Gradients]:
        return matmul(e, self.weight), (matmul(e.flatten(0, 1).t(), delta.flatten(0, 1)), None)


class Private:
    """A weight [b, d, h] and a bias [b, 1, h] for each task."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        if self.weight.shape[2] == 1:
            return products_with(x, self.weight).add_(self.bias), ()
        return torch.baddbmm(self.bias, x, self.weight), ()

    def back(self, delta: Tensor) -> tuple[Tensor, Kept]:
        return product_transposed(delta, self.weight), ()

    def forward_gradients(self, x: Tensor, g: Tensor, kept: Kept) -> tuple[Tensor, Gradients]:
        return self.back(g)[0], (transposed_product(x, g), g.sum(1, keepdim=True))

    def back_gradients(self, delta: Tensor, e: Tensor, kept: Kept) -> tuple[Tensor, Gradients]:
        return products_with(e, self.weight), (transposed_product(e, delta), None)


class Pairs:
    """Shared weights and pairs: W' = W − α x_sᵀ δ_s, b' = b − α Σ δ_s; x_s [b, P, d], δ_s [b, P, h], α a number, or a
    scalar or [b, 1, 1] that may be learned. Products with W' run through x x_sᵀ and δ δ_sᵀ [b, R, P]."""

    def __init__(self, weight: Tensor, bias: Tensor, x: Tensor, delta: Tensor, rate: Tensor | float) -> None:
        self.shared = Shared(weight, bias)
        self.x = x
        self.delta = delta
        self.rate = rate

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        gram = torch.bmm(x, self.x.transpose(1, 2)).add_(1)
        scaled = gram * -self.rate
        return self.shared.forward(x)[0].baddbmm_(scaled, self.delta), (gram, scaled)

    def back(self, delta: Tensor) -> tuple[Tensor, Kept]:
        gram = torch.bmm(delta, self.delta.transpose(1, 2))
        scaled = gram * -self.rate
        return self.shared.back(delta)[0].baddbmm_(scaled, self.x), (gram, scaled)

    def forward_gradients(self, x: Tensor, g: Tensor, kept: Kept) -> tuple[Tensor, Gradients]:
        gx, shared = self.shared.forward_gradients(x, g)
        gram, scaled = kept
        cross = torch.bmm(g, self.delta.transpose(1, 2))
        rate = self._rate_gradient(gram, cross)
        gx.baddbmm_(cross.mul_(-self.rate), self.x)
        return gx, (*shared, transposed_product(cross, x), transposed_product(scaled, g), *rate)

    def back_gradients(self, delta: Tensor, e: Tensor, kept: Kept) -> tuple[Tensor, Gradients]:
        gdelta, shared = self.shared.back_gradients(delta, e)
        gram, scaled = kept
        cross = torch.bmm(e, self.x.transpose(1, 2))
        rate = self._rate_gradient(gram, cross)
        gdelta.baddbmm_(cross.mul_(-self.rate), self.delta)
        return gdelta, (*shared, transposed_product(scaled, e), transposed_product(cross, delta), *rate)

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
        ctx.kept = []
        for form in _forms(shapes, tensors):
            if inputs:
                x = _relu_(z, slope)
            inputs.append(x)
            z, kept = form.forward(x)
            ctx.kept.append(kept)
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
            g, gradients[i] = forms[i].forward_gradients(x, g, ctx.kept[i])
            g = through(g if also is None else g.add_(also), x, ctx.slope, out=g)
        return None, None, g, *(t for made in gradients for t in made)


class _Deltas(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shapes: Sequence[Shape], slope: float, delta: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        n = len(shapes)
        forms, deltas = _forms(shapes, others[n:]), [delta]
        ctx.kept = [()] * n
        for i in reversed(range(n)):
            e, ctx.kept[i] = forms[i].back(deltas[0])
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
            g, gradients[i] = form.back_gradients(delta, e, ctx.kept[i])
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
