"""MAMO's memories (paper 003): K slots of profiles M_P, of gradients M_U, of preference matrices M_UI, in one.

A task u answers to slot k by its attention a_uk, and what it has for a part of the memory (its profile, its gradient,
its adapted preference matrix) is x_u. As printed (Eq. 5, 6, 8) each user writes  M_k ← (1 − r) M_k + r a_uk x_u  with a
rate r (α, β, γ), and it is not said how the users of a batch go together. Here

- `mean`:        M_k ← (1 − r ē_k) M_k + r · mean_u a_uk x_u, where ē_k is the mean of e_uk;
- `sequential`:  M_k ← (1 − r e_uk) M_k + r a_uk x_u, user by user in the order of their task ids.

Printed is e_uk = 1 (`--erase all`): a slot forgets also what the user does not replace, so that with K slots M_UI
fades, by 1 − r (1 − 1/K) a step where attention is even. With e_uk = a_uk (`attended`) it forgets as much as it takes
in. The composition of affine maps is affine, so either rule is one weighted sum over the tasks.

Shape letters: b tasks, n rows, d inputs, h outputs, K slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta.memory.base import Arrays, Memory

PROFILE = "profile"
"""The part that attention is drawn by; its entries [K, d] are vectors."""


@dataclass(frozen=True)
class Factors:
    """What b tasks have for a part of the memory: x_u = Σ_j mix_uj M_j − Σ_rows x δᵀ over the rows of the task.

    Of products and not of matrices a task: adaptation.md, Write-back.
    """

    x: Tensor
    """[n, d]."""
    delta: Tensor
    """[n, h]."""
    owner: Tensor
    """int64 [n]: position among the b tasks of each row's."""
    mix: Tensor | None = None
    """[b, K]: the slots' shares in x_u, where it starts from the memory itself."""

    def weighted(self, weight: Tensor, slots: Tensor) -> Tensor:
        """Σ_u w_uk x_u for w [b, K]: [K, d, h]. `slots`: the memory [K, d, h] that the tasks read."""
        k, d, h = weight.shape[1], self.x.shape[1], self.delta.shape[1]
        spread = (weight[self.owner].unsqueeze(2) * self.delta.unsqueeze(1)).flatten(1)
        total = (self.x.t() @ spread).view(d, k, h).transpose(0, 1).neg()
        return total if self.mix is None else total + ((weight.t() @ self.mix) @ slots.flatten(1)).view(k, d, h)


class Attentive(Memory):
    """Slots, by part.

    A read is answered with every part. A write is what `written` makes of a worker's tasks, by the same rule.

    Args:
        start: the parts before anything was written, [K, ...] each.
        rates: r of each part.
        sequential: the rule.
        attended: whether e_uk is a_uk and not 1.
    """

    alike = True

    def __init__(
        self, start: Mapping[str, NDArray[Any]], rates: Mapping[str, float], sequential: bool, attended: bool
    ) -> None:
        self.parts = {name: np.array(value) for name, value in start.items()}
        self.rates, self.sequential, self.attended = dict(rates), sequential, attended
        self.prompt = "--write sequential" if sequential else ""
        self.slots = len(self.parts[PROFILE])
        self.seen = np.zeros(2 + self.slots)
        """Since the last report: tasks, the sum of their attention's entropies, of their attention to each slot."""

    def read(self, request: Arrays) -> Arrays:
        """All parts."""
        return dict(self.parts)

    def merge(self, writes: Sequence[Arrays]) -> None:
        """Apply one step's writes."""
        count = int(sum(w["count"][0] for w in writes))
        if not count:
            return
        attended = np.sum([w["attended"] for w in writes], axis=0)
        self.seen += [count, sum(w["entropy"][0] for w in writes), *attended]
        if self.sequential:
            self._in_turn(writes)
            return
        erased = attended / count if self.attended else np.ones(self.slots)
        for name, old in self.parts.items():
            r = self.rates[name]
            new = np.sum([w[name] for w in writes], axis=0)
            self.parts[name] = _scaled(1 - r * erased, old) + new * (r / count)

    def _in_turn(self, writes: Sequence[Arrays]) -> None:
        task = np.concatenate([w["task"] for w in writes])
        attention = torch.from_numpy(np.concatenate([w["attention"] for w in writes]))
        order = torch.from_numpy(task.argsort())
        first = np.cumsum([0, *(len(w["task"]) for w in writes[:-1])])
        for name, old in self.parts.items():
            r, erased = self.rates[name], attention if self.attended else torch.ones_like(attention)
            left = (1 - r * erased[order]).flip(0).cumprod(0).flip(0)  # of what was there before each user's write
            weight = torch.empty_like(attention)
            weight[order] = r * attention[order] * torch.cat([left[1:], torch.ones_like(left[:1])])
            each = [{k.removeprefix(f"{name}."): v for k, v in w.items() if k.startswith(f"{name}.")} for w in writes]
            joined = {k: torch.from_numpy(np.concatenate([e[k] for e in each])) for k in each[0]}
            joined["owner"] = torch.from_numpy(
                np.concatenate([e["owner"] + start for e, start in zip(each, first, strict=True)])
            )
            new = Factors(**joined).weighted(weight, torch.from_numpy(_matrices(old)).to(weight)).numpy()
            self.parts[name] = _scaled(left[0].numpy(), old) + new.reshape(old.shape)

    def snapshot(self) -> Arrays:
        """All parts, and what is counted for the next report."""
        return {**{name: value.copy() for name, value in self.parts.items()}, "seen": self.seen.copy()}

    def restore(self, snapshot: Arrays) -> None:
        """Become what the snapshot was taken of."""
        self.parts = {name: snapshot[name].copy() for name in self.parts}
        self.seen = snapshot["seen"].copy()

    def report(self) -> dict[str, Any]:
        """Since the last call: the mean entropy of the tasks' attention over ln K (1: they tell no slots apart), each
        slot's share of the attention; and the mean cosine between the profiles of two slots (1: they are one)."""
        tasks, entropy, *attended = self.seen.tolist()
        self.seen = np.zeros_like(self.seen)
        usage = [a / tasks for a in attended] if tasks else [0.0] * self.slots
        if self.slots == 1:
            return {"entropy": None, "usage": usage, "alike": None}
        unit = self.parts[PROFILE] / np.maximum(np.linalg.norm(self.parts[PROFILE], axis=1, keepdims=True), 1e-12)
        cosine = (unit @ unit.T)[np.triu_indices(self.slots, 1)].mean()
        return {"entropy": entropy / tasks if tasks else None, "usage": usage, "alike": float(cosine)}


def written(
    task: Tensor, attention: Tensor, factors: Mapping[str, Factors], read: Mapping[str, Tensor], sequential: bool
) -> Arrays:
    """A worker's write: of the rule `mean` sums over its tasks, of `sequential` the factors, which need all workers'.

    Args:
        task: int64 [b]. attention: [b, K]. read: the parts that the tasks read.
    """
    k = attention.shape[1]
    entropy = torch.special.entr(attention).sum() / (np.log(k) or 1.0)
    arrays = {"count": torch.tensor([float(len(task))]), "attended": attention.sum(0), "entropy": entropy[None]}
    if not sequential:
        for name, f in factors.items():
            slots = read[name]
            arrays[name] = f.weighted(attention, slots.view(len(slots), -1, f.delta.shape[1])).view_as(slots)
    else:
        arrays |= {"task": task, "attention": attention}
        for name, f in factors.items():
            own = {"x": f.x, "delta": f.delta, "owner": f.owner, **({} if f.mix is None else {"mix": f.mix})}
            arrays |= {f"{name}.{key}": value for key, value in own.items()}
    return {name: value.detach().cpu().numpy() for name, value in arrays.items()}


def _scaled(weight: NDArray[Any], slots: NDArray[Any]) -> NDArray[Any]:
    return weight.astype(slots.dtype).reshape(-1, *[1] * (slots.ndim - 1)) * slots


def _matrices(slots: NDArray[Any]) -> NDArray[Any]:
    return slots if slots.ndim == 3 else slots[:, None, :]
