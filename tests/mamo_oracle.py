"""MAMO (paper 003) user by user, in plain autograd and float64: the oracle of tests/test_mamo.py.

Written from the paper's equations. Every user has copies of its own of θ_u, θ_i, θ_r and M_uI, inputs are explicit
one-hot, multi-hot or scalar matrices, and what is written to the memories is formed as whole matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor
from torch.nn import functional as F

from distmeta.memory.base import Shared
from distmeta.methods import options
from distmeta.methods.mamo import MAMO
from distmeta.tasks import TaskBatch, TaskBlock

SMALL: dict[str, Any] = {"embedding": 3, "width": 4, "hidden": (5,), "local_lr": 0.1, "item_ids": True, "steps": 2}
Weights = dict[str, Tensor]
"""θ by name; "user0", "user1", … are the layers' weights, "user0 bias" … their biases."""


@dataclass
class User:
    """What one user comes to in a step."""

    task: int
    attention: Tensor
    """a_u [K]."""
    outputs: Tensor
    """The network's for the query rows [n, C], with graph."""
    loss: Tensor
    """Query loss, with graph."""
    wrote: Weights
    """x_u of each part of the memory: p_u, the support's gradients with the bias's as the last row, M_uI adapted."""


def mamo(**changes: Any) -> MAMO:
    """In float64, of a world where profiles, slots and the layers' step sizes differ."""
    m: Any = oracle.build(MAMO, options.MAMO(**{**SMALL, **changes}))
    m.shared = Shared.of(m.memories())
    with torch.no_grad():
        for table in (*m.embedding.users().values(), *m.embedding.items().values()):
            table.weight.mul_(5)
        m.log_rate += 0.5 * torch.linspace(-1, 1, len(m.log_rate), dtype=torch.float64)
    fill(m)
    return m


def fill(m: MAMO, seed: int = 5) -> None:
    """Slots such as training leaves: none at its start, none like another."""
    generator = np.random.default_rng(seed)
    parts = {name: 0.5 * generator.normal(size=v.shape) for name, v in m.shared["memory"].read({}).items()}
    m.shared["memory"].restore({**parts, "seen": np.zeros(2 + m.options.slots)})


def shared(m: MAMO) -> Weights:
    """φ, in the order of the adapted layers' step sizes: user network, item network, θ_r."""
    found: Weights = {}
    for name, layers in (("user", m.users), ("item", m.items), ("decision", m.decision.layers)):
        for i, layer in enumerate(layers):
            found |= {f"{name}{i}": layer.weight, f"{name}{i} bias": layer.bias}  # type: ignore[dict-item]
    if m.options.recommender == "memory":
        found["preference"] = torch.zeros(())  # has a step size; a user's is read from the memory
    if m.wide is not None:
        found |= {"wide": m.wide.weight, "wide bias": m.wide.bias}
    return found


def step_sizes(m: MAMO) -> dict[str, Tensor]:
    """ρ of each adapted layer; a bias has its weight's."""
    names = [n for n in shared(m) if not n.endswith("bias")]
    rates = dict(zip(names, m.log_rate.exp(), strict=True))
    return rates | {f"{n} bias": rate for n, rate in rates.items()}


def attention(p_u: Tensor, profile: Tensor, temperature: float) -> Tensor:
    """Eq. 3, a constant of p_u."""
    cosine = torch.stack([p_u @ slot / (p_u.norm() * slot.norm()) for slot in profile])
    e = (temperature * cosine).exp()
    return (e / e.sum()).detach()


def start(m: MAMO, a_u: Tensor, known: Weights) -> Weights:
    """θ and M_uI before the first step: Eq. 4, 7, 9 and 10."""
    theta = dict(shared(m))
    for i in range(len(m.users)) if m.options.tau else ():
        b_u = sum(a * slot for a, slot in zip(a_u, known[f"gradient{i}"], strict=True))
        theta[f"user{i}"] = theta[f"user{i}"] - m.options.tau * b_u[:-1]  # type: ignore[index]
        theta[f"user{i} bias"] = theta[f"user{i} bias"] - m.options.tau * b_u[-1]  # type: ignore[index]
    if "preference" in theta:
        mixed: Tensor = sum(a * slot for a, slot in zip(a_u, known["preference"], strict=True))  # type: ignore[assignment]
        theta["preference"] = mixed.requires_grad_()
    return theta


def network(m: MAMO, theta: Weights, p_u: Tensor, p_i: Tensor) -> Tensor:
    """Outputs [n, C] (Eq. 1 and 2) of the rows p_u, p_i."""
    sides = []
    for name, e, depth in (("user", p_u, len(m.users)), ("item", p_i, len(m.items))):
        for i in range(depth):
            e = F.leaky_relu(e @ theta[f"{name}{i}"] + theta[f"{name}{i} bias"], 0.01)
        sides.append(e)
    joined = torch.cat(sides, 1)
    if m.options.recommender == "memory":
        h = joined @ theta["preference"]
    else:
        h = joined if m.options.recommender == "dnn" else (sides[0] * sides[1]).sum(1, keepdim=True)
    for i in range(len(m.decision.layers)):
        h = F.leaky_relu(h, 0.01) if i else h
        h = h @ theta[f"decision{i}"] + theta[f"decision{i} bias"]
    if m.wide is not None:
        h = h + torch.cat([p_u, p_i], 1) @ theta["wide"] + theta["wide bias"]
    return h


def error(m: MAMO, outputs: Tensor, labels: Tensor) -> Tensor:
    if m.options.classes:
        return F.cross_entropy(outputs, (labels - 1).long())
    return (outputs[:, 0] - labels).square().mean()


def one_user(m: MAMO, known: Weights, batch: TaskBatch, block: TaskBlock, b: int) -> User:
    """Algorithm 1, lines 5 to 13, for task b of the block."""
    users = m.embedding.users()
    tables = [t.weight for t in (*users.values(), *m.embedding.items().values())]

    def embedded(support: bool) -> tuple[Callable[[Weights, slice], Tensor], Tensor]:
        inputs, labels = oracle.one_task(m, batch, block, b, support)
        x = [hot @ table for hot, table in zip(inputs, tables, strict=True)]
        p_u, p_i = torch.cat(x[: len(users)], 1), torch.cat(x[len(users) :], 1)
        return lambda theta, rows: network(m, theta, p_u[rows], p_i[rows]), labels

    fields = [oracle.hot(block.user[name].take(torch.tensor([b])), len(t.weight)) for name, t in users.items()]
    p_u = torch.cat([x @ t.weight for x, t in zip(fields, users.values(), strict=True)], 1)[0]
    a_u = attention(p_u, known["profile"], m.options.temperature)
    theta, rates = start(m, a_u, known), step_sizes(m)
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    support, labels = embedded(True)
    n = len(labels)
    turns = [slice(i, i + 1) for i in range(n)] if m.options.per_item else [slice(None)] * bool(n)
    for rows in turns * m.options.steps:
        loss = error(m, support(theta, rows), labels[rows])
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=not m.options.first_order)
        for (name, value), g in zip(theta.items(), gradients, strict=True):  # the dict's keys stay: no new ones
            total[name] = total[name] + g
            theta[name] = value - rates[name] * g  # Eq. 11
    query, labels = embedded(False)
    wrote = {"profile": p_u.detach()}
    for i in range(len(m.users)) if m.options.tau else ():
        wrote[f"gradient{i}"] = torch.cat([total[f"user{i}"], total[f"user{i} bias"][None]]).detach()
    if "preference" in theta:
        wrote["preference"] = theta["preference"].detach()
    outputs = query(theta, slice(None))
    return User(int(block.task[b]), a_u, outputs, error(m, outputs, labels), wrote)


def memory(m: MAMO) -> Weights:
    """M_P, M_U by layer and M_UI [K, 2 d_e, d_e] as they are now, M_UI of its parts, one below the other."""
    parts = {name: torch.from_numpy(value.copy()) for name, value in m.shared["memory"].read({}).items()}
    joined = [parts.pop(name) for name in list(parts) if name.startswith("preference")]
    return {**parts, **({"preference": torch.cat(joined, 1)} if joined else {})}


def visit(m: MAMO, batch: TaskBatch, known: Weights | None = None) -> list[User]:
    """Every task of the batch, in its order, with the memory as it is now, or the one given."""
    known = known or memory(m)
    return [one_user(m, known, batch, block, b) for block in batch for b in range(len(block.task))]


def written(m: MAMO, before: Weights, users: list[User]) -> Weights:
    """The memory after Eq. 5, 6 and 8 for all users of a step, by the rule that the options name."""
    o, after = m.options, dict(before)
    for name, slots in before.items():
        r = {"profile": o.alpha, "preference": o.gamma}.get(name, o.beta)
        new = []
        for k, slot in enumerate(slots):
            if o.write == "mean":
                erased = sum(u.attention[k] for u in users) / len(users) if o.erase == "attended" else 1.0
                slot = (1 - r * erased) * slot + r * sum(u.attention[k] * u.wrote[name] for u in users) / len(users)
            else:
                for u in sorted(users, key=lambda u: u.task):
                    erased = u.attention[k] if o.erase == "attended" else 1.0
                    slot = (1 - r * erased) * slot + r * u.attention[k] * u.wrote[name]
            new.append(slot)
        after[name] = torch.stack(new)
    return after
