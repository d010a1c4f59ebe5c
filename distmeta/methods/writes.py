"""Memories that are written row by row through erase and add gates, with a reverse pass of their own.

Each task has K slots of width d, empty at first. Row t erases from slot k what its weight and gate say, and adds:
v_tk = v_(t−1)k ∘ (1 − w_tk e_t) + w_tk a_t. What of the gradient does not need the gradient of later rows is formed for
all rows at once; left to a step back is one product. Rows lie packed as in recurrence.py.

Shape letters: N rows in all, K slots, d their width, b tasks.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distmeta.methods.recurrence import Packing


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, erase: Tensor, add: Tensor, packing: Packing) -> Tensor:
        w = weight.unsqueeze(2)
        kept = torch.mul(w, -erase.unsqueeze(1)).add_(1)
        slots = torch.mul(w, add.unsqueeze(1))  # at first what each row adds, then what is there after it
        steps = zip(packing.counts, kept.split(packing.counts), slots.split(packing.counts), strict=True)
        before = None
        for k, keep, now in steps:
            if before is not None:
                now.addcmul_(before[:k], keep)
            before = now
        ctx.save_for_backward(weight, erase, add, kept, slots)
        ctx.packing = packing
        return slots[packing.last]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> Any:  # type: ignore[override]
        (weight, erase, add, kept, slots), counts = ctx.saved_tensors, ctx.packing.counts
        both = kept.new_empty(len(kept), 2, *kept.shape[1:])
        d, through = both.unbind(1)  # the gradient of what is there after a row, and that times what was before it
        d[ctx.packing.last] = grad[0]  # the others' comes from the row after them
        through[: sum(counts[:1])] = 0  # before a task's first row there is nothing
        steps = list(zip(*(t.split(counts) for t in (d, through, kept, slots)), strict=True))
        for (earlier, _, _, before), (here, product, keep, _) in reversed(list(pairwise(steps))):
            m = len(here)
            torch.mul(here, keep, out=earlier[:m])
            torch.mul(here, before[:m], out=product)
        by_weight = torch.matmul(both, torch.stack((add, -erase), 1).unsqueeze(3)).squeeze(3).sum(1)
        of_add, of_erase = torch.matmul(weight[:, None, None], both).squeeze(2).unbind(1)
        return by_weight, -of_erase, of_add, None


def written(weight: Tensor, erase: Tensor, add: Tensor, packing: Packing) -> Tensor:
    """The slots [k_0, K, d] of `packing.tasks` after all their rows.

    Args:
        weight: w [N, K], packed. erase: e, add: a [N, d].
    """
    return _Written.apply(weight, erase, add, packing)  # type: ignore[return-value]
