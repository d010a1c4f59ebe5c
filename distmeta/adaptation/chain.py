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
from typing import Any, Protocol

import torch
from torch import Tensor

from distmeta.adaptation.products import through

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
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).view(*x.shape[:2], self.weight.shape[1])

    def back(self, delta: Tensor) -> Tensor:
        return torch.mm(delta.flatten(0, 1), self.weight.t()).view(*delta.shape[:2], self.weight.shape[0])

    def forward_gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, Gradients]:
        flat = g.flatten(0, 1)
        return self.back(g), (torch.mm(x.flatten(0, 1).t(), flat), flat.sum(0))

    def back_gradients(self, delta: Tensor, e: Tensor) -> tuple[Tensor, Gradients]:
        flat = e.flatten(0, 1)
        product = torch.mm(flat, self.weight).view(*e.shape[:2], self.weight.shape[1])
        return product, (torch.mm(flat.t(), delta.flatten(0, 1)), None)


class Private:
    """A weight [b, d, h] and a bias [b, 1, h] for each task."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.expand(-1, x.shape[1], -1), x, self.weight)

    def back(self, delta: Tensor) -> Tensor:
        return torch.bmm(delta, self.weight.transpose(1, 2))

    def forward_gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, Gradients]:
        return self.back(g), (torch.bmm(x.transpose(1, 2), g), g.sum(1, keepdim=True))

    def back_gradients(self, delta: Tensor, e: Tensor) -> tuple[Tensor, Gradients]:
        return torch.bmm(e, self.weight), (torch.bmm(e.transpose(1, 2), delta), None)


class Pairs:
    """Shared weights and pairs: W' = W − α x_sᵀ δ_s, b' = b − α Σ δ_s; x_s [b, P, d], δ_s [b, P, h], α scalar or
    [b, 1, 1]. Products with W' run through x x_sᵀ and δ δ_sᵀ [b, R, P]."""

    def __init__(self, weight: Tensor, bias: Tensor, x: Tensor, delta: Tensor, rate: Tensor) -> None:
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
        gx, (gweight, gbias) = self.shared.forward_gradients(x, g)
        gram, cross = self._gram(x), self._delta_gram(g)
        grate = (gram * cross).sum_to_size(self.rate.shape).neg_()
        gram, cross = gram.mul_(-self.rate), cross.mul_(-self.rate)
        gx.baddbmm_(cross, self.x)
        return gx, (gweight, gbias, _transposed(cross, x), _transposed(gram, g), grate)

    def back_gradients(self, delta: Tensor, e: Tensor) -> tuple[Tensor, Gradients]:
        gdelta, (gweight, _) = self.shared.back_gradients(delta, e)
        gram, cross = self._delta_gram(delta), torch.bmm(e, self.x.transpose(1, 2))
        grate = (gram * cross).sum_to_size(self.rate.shape).neg_()
        gram, cross = gram.mul_(-self.rate), cross.mul_(-self.rate)
        gdelta.baddbmm_(cross, self.delta)
        return gdelta, (gweight, None, _transposed(gram, e), _transposed(cross, delta), grate)


def _transposed(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b, task by task."""
    return torch.bmm(a.transpose(1, 2), b)


State = tuple[type[Shared] | type[Private] | type[Pairs], tuple[Tensor, ...]]
"""A form and the tensors it is made of."""


def _forms(kinds: Sequence[type], tensors: Sequence[Tensor]) -> list[Any]:
    counts = {Shared: 2, Private: 2, Pairs: 5}
    starts = [sum(counts[k] for k in kinds[:i]) for i in range(len(kinds))]
    return [k(*tensors[i : i + counts[k]]) for k, i in zip(kinds, starts, strict=True)]


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kinds: Sequence[type], slope: float, z: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = []
        for i, form in enumerate(_forms(kinds, tensors)):
            if i == 0:  # not ours to overwrite
                x = torch.nn.functional.leaky_relu(z, slope) if slope else torch.relu(z)
            else:
                x = torch.nn.functional.leaky_relu_(z, slope) if slope else torch.relu_(z)
            inputs.append(x)
            z = form.forward(x)
        ctx.save_for_backward(*inputs, *tensors)
        ctx.kinds, ctx.slope = kinds, slope
        ctx.set_materialize_grads(False)
        return z, *inputs

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Any, ...]:
        n = len(ctx.kinds)
        inputs, tensors = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        g, *given = grad
        gradients: list[Gradients] = []
        forms = _forms(ctx.kinds, tensors)
        for form, x, also in zip(reversed(forms), reversed(inputs), reversed(given), strict=True):
            assert g is not None  # δ of the top layer is made of z
            g, made = form.forward_gradients(x, g)
            gradients.insert(0, made)
            if also is not None:
                g += also
            g = through(g, x, ctx.slope, out=g)
        return None, None, g, *(t for made in gradients for t in made)


class _Deltas(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kinds: Sequence[type], slope: float, delta: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        n = len(kinds)
        inputs, tensors = others[:n], others[n:]
        deltas = [delta]
        for form, x in zip(reversed(_forms(kinds, tensors)), reversed(inputs), strict=True):
            e = form.back(deltas[0])
            deltas.insert(0, through(e, x, slope, out=e))
        ctx.save_for_backward(*inputs, *deltas[1:], *tensors)
        ctx.kinds, ctx.slope = kinds, slope
        ctx.set_materialize_grads(False)
        return tuple(deltas[:-1])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Any, ...]:
        n = len(ctx.kinds)
        inputs, deltas, tensors = (ctx.saved_tensors[i:j] for i, j in ((0, n), (n, 2 * n), (2 * n, None)))
        gradients: list[Gradients] = []
        g: Tensor | None = None
        for form, x, delta, also in zip(_forms(ctx.kinds, tensors), inputs, deltas, grad, strict=True):
            if g is None and also is None:  # nobody asked for this δ, nor for those below
                gradients.append((None,) * len(_made_of(form)))
                continue
            if g is None:
                assert also is not None
                e = through(also, x, ctx.slope)
            else:
                e = through(g if also is None else g.add_(also), x, ctx.slope, out=g)
            g, made = form.back_gradients(delta, e)
            gradients.append(made)
        return None, None, g, *(None,) * n, *(t for made in gradients for t in made)


def _made_of(form: Form) -> range:
    return range(5 if isinstance(form, Pairs) else 2)


def forward(states: Sequence[State], z: Tensor, slope: float) -> tuple[Tensor, list[Tensor]]:
    """z ← relu(z) W' + b' for each layer: the last z [b, R, h], and each layer's input relu(z) [b, R, d]."""
    z, *inputs = _Forward.apply(  # type: ignore[misc]
        [kind for kind, _ in states], slope, z, *(t for _, tensors in states for t in tensors)
    )
    return z, inputs


def deltas(states: Sequence[State], inputs: Sequence[Tensor], delta: Tensor, slope: float) -> list[Tensor]:
    """δ ← (δ W'ᵀ) ∘ relu'(x) from the last layer's δ [b, R, h] down: ∂L/∂z below each layer, in the layers' order.

    The derivative by x of relu' is zero almost everywhere and is not formed.
    """
    return list(
        _Deltas.apply(  # type: ignore[arg-type]
            [kind for kind, _ in states], slope, delta, *inputs, *(t for _, tensors in states for t in tensors)
        )
    )
