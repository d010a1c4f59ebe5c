"""Batched products whose gradients come out contiguous.

Autograd differentiates `a @ b.transpose(1, 2)` into a transposed view, and every elementwise operation that then
meets a contiguous tensor runs unvectorised (measured: 10 times slower on a CPU). These know their own layout.

Shape letters: b tasks, R and S rows, d inputs, h outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distmeta.adaptation import precision


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (g,), (a, b) = grad, ctx.saved_tensors
        return (
            torch.bmm(g, b) if ctx.needs_input_grad[0] else None,
            outer(g, a) if ctx.needs_input_grad[1] else None,
        )


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a.transpose(1, 2), b)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (g,), (a, b) = grad, ctx.saved_tensors
        return (
            inner(b, g) if ctx.needs_input_grad[0] else None,
            torch.bmm(a, g) if ctx.needs_input_grad[1] else None,
        )


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (g,), (x, weight) = grad, ctx.saved_tensors
        flat = g.flatten(0, -2)
        return (
            precision.matmul(g, weight.t()) if ctx.needs_input_grad[0] else None,
            weight_gradient(x.flatten(0, -2), flat) if ctx.needs_input_grad[1] else None,
            flat.sum(0) if ctx.needs_input_grad[2] else None,
        )


class _Descend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, delta: Tensor, rate: Tensor | float) -> Any:
        ctx.save_for_backward(x, delta, *([rate] if isinstance(rate, Tensor) else []))
        ctx.number, ctx.shapes = rate, (weight.shape, None if bias is None else bias.shape)
        scaled = delta * -rate
        moved = transposed_product(x, scaled).add_(weight)
        return moved if bias is None else (moved, scaled.sum(1, keepdim=True).add_(bias))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        (g, *gbias), (x, delta, *learned) = grad, ctx.saved_tensors
        rate = learned[0] if learned else ctx.number
        gx = product_transposed(delta, g).mul_(-rate) if ctx.needs_input_grad[2] else None
        moved, grate = products_with(x, g), None
        if gbias:
            moved.add_(gbias[0])
        if ctx.needs_input_grad[4]:
            grate = (moved * delta).sum((1, 2), keepdim=True).neg_().sum_to_size(rate.shape)
        own, shared = ctx.shapes
        return g.sum_to_size(own), gbias[0].sum_to_size(shared) if gbias else None, gx, moved.mul_(-rate), grate


class _DescendEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, delta: Tensor, rate: Tensor) -> Tensor:
        gradient = transposed_product(x, delta)
        ctx.save_for_backward(x, delta, rate, gradient)
        ctx.own = weight.shape
        return torch.addcmul(weight, rate, gradient, value=-1)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, delta, rate, gradient) = grad, ctx.saved_tensors
        moved = g * -rate
        return (
            g.sum_to_size(ctx.own) if ctx.needs_input_grad[0] else None,
            product_transposed(delta, moved) if ctx.needs_input_grad[1] else None,
            products_with(x, moved) if ctx.needs_input_grad[2] else None,
            (g * gradient).sum(0).neg_() if ctx.needs_input_grad[3] else None,
        )


class _ReluDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, delta: Tensor, y: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(y)
        ctx.slope = slope
        return through(delta, y, slope)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return relu_delta(grad[0], y, ctx.slope), None, None


def through(delta: Tensor, y: Tensor, slope: float, out: Tensor | None = None) -> Tensor:
    """δ through a (leaky) ReLU with output y, without a graph; written to `out` (which may be δ) where given."""
    if slope:
        if out is None:
            return torch.ops.aten.leaky_relu_backward.default(delta, y, slope, False)
        return torch.ops.aten.leaky_relu_backward.grad_input(delta, y, slope, False, grad_input=out)
    if out is None:
        return torch.ops.aten.threshold_backward.default(delta, y, 0)
    return torch.ops.aten.threshold_backward.grad_input(delta, y, 0, grad_input=out)


def times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W + b without a graph: [..., d], [d, h], [h] -> [..., h]."""
    if not precision.rounds(x):
        return F.linear(x, weight.t(), bias)
    z = precision.matmul(x, weight)
    return z if bias is None else z.add_(bias)


def weight_gradient(x: Tensor, g: Tensor) -> Tensor:
    """xᵀ g [d, h] from [n, d] and [n, h], with the narrower matrix as the left one: a tenth faster where d > h."""
    if x.shape[1] > g.shape[1] > 1:
        return precision.matmul(g.t(), x).t().contiguous()
    return precision.matmul(x.t(), g)


def products_with(x: Tensor, w: Tensor) -> Tensor:
    """x w, task by task, without a graph: [b, R, d], [b, d, h] -> [b, R, h].

    One output is a weighted sum over the inputs: the library's batched product is several times slower at it. So
    for the two below.
    """
    return (x * w.transpose(1, 2)).sum(-1, keepdim=True) if w.shape[-1] == 1 else torch.bmm(x, w)


def product_transposed(delta: Tensor, w: Tensor) -> Tensor:
    """δ wᵀ, task by task, without a graph: [b, R, h], [b, d, h] -> [b, R, d]."""
    return delta * w.transpose(1, 2) if w.shape[-1] == 1 else torch.bmm(delta, w.transpose(1, 2))


def transposed_product(x: Tensor, delta: Tensor) -> Tensor:
    """xᵀ δ, task by task, without a graph: [b, R, d], [b, R, h] -> [b, d, h]."""
    if delta.shape[-1] == 1:
        return torch.bmm(delta.transpose(1, 2), x).transpose(1, 2)
    return torch.bmm(x.transpose(1, 2), delta)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W + b: [..., d], [d, h], [h] -> [..., h]."""
    return _Affine.apply(x, weight, bias)  # type: ignore[return-value]


def back(delta: Tensor, weight: Tensor) -> Tensor:
    """δ Wᵀ: [..., h], [d, h] -> [..., d]."""
    return affine(delta, weight.t()) if precision.rounds(delta) else torch.matmul(delta, weight.t())


def descend(weight: Tensor, bias: Tensor, x: Tensor, delta: Tensor, rate: Tensor | float) -> tuple[Tensor, Tensor]:
    """W − α xᵀ δ [b, d, h] and b − α Σ δ [b, 1, h], from shared weights [d, h], [h] or private ones."""
    return _Descend.apply(weight, bias, x, delta, rate)  # type: ignore[return-value]


def descend_weight(weight: Tensor, x: Tensor, delta: Tensor, rate: Tensor | float) -> Tensor:
    """The first of `descend`."""
    return _Descend.apply(weight, None, x, delta, rate)  # type: ignore[return-value]


def descend_each(weight: Tensor, x: Tensor, delta: Tensor, rate: Tensor) -> Tensor:
    """W − A ∘ xᵀ δ [b, d, h] with a step size for each element, A [d, h]; W shared or private as in `descend`."""
    return _DescendEach.apply(weight, x, delta, rate)  # type: ignore[return-value]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ, task by task: [b, R, d], [b, S, d] -> [b, R, S]."""
    return _Inner.apply(a, b)  # type: ignore[return-value]


def outer(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b, task by task: [b, S, d], [b, S, h] -> [b, d, h]."""
    return _Outer.apply(a, b)  # type: ignore[return-value]


def relu_delta(delta: Tensor, y: Tensor, slope: float) -> Tensor:
    """δ through a (leaky) ReLU with output y (of the same sign as its input). Its derivative by y is zero almost
    everywhere and is not formed."""
    return _ReluDelta.apply(delta, y, slope)  # type: ignore[return-value]
