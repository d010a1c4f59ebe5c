"""s²Meta against plain autograd in float64, task by task and without padding; its gates and its stop by hand."""

import json
import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import scenarioworld as world
import torch
from cmml_oracle import RAGGED, features, mlp, pairwise_hinge, scenarios
from torch import Tensor
from torch.nn import functional as F

from distmeta import cli, draws
from distmeta.methods import gates, options
from distmeta.methods.gates import Gates, Steps
from distmeta.methods.s2meta import S2Meta
from distmeta.tasks import TaskBatch

SMALL: dict[str, Any] = {"embedding": 3, "hidden": (6, 5), "units": 3, "steps": 6, "least_steps": 1, "item_ids": True}


def s2meta(**changes: Any) -> S2Meta:
    m: Any = oracle.build(S2Meta, options.S2Meta(**{**SMALL, **changes}))  # type: ignore[arg-type]
    with torch.no_grad():
        for own in m.gates:  # nothing that the folding of scale and shift could hide behind
            if own.scale is not None:
                own.scale.copy_(torch.linspace(0.5, 1.5, len(own.scale)))
                own.shift.copy_(torch.linspace(-0.4, 0.3, len(own.shift)))
            own.levels.copy_(torch.tensor([-1.0, 2.0]))
        m.stop.head.bias.fill_(-0.5)
    return m


# ---- the paper's steps, one task at a time


def smooth(x: Tensor) -> tuple[Tensor, Tensor]:
    small = x.abs() < math.exp(-10)
    return torch.where(small, -1.0, x.abs().log() / 10), torch.where(small, math.exp(10) * x, x.sign())


def gated(own: Gates, seen: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Input and forget gate [n] of what is seen [n, 5], and the state after it."""
    i, f, o, g = (seen @ own.seen.t() + state[0] @ own.recurrent.t() + own.bias).chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    if own.scale is not None:
        h = F.layer_norm(h, h.shape[1:], own.scale, own.shift)
    both = torch.sigmoid(h @ own.heads.t() + own.levels)
    return both[:, 0], both[:, 1], (h, c)


def error(m: S2Meta, x: Tensor, y: Tensor, theta: list[Tensor], user: Tensor | None) -> Tensor:
    layers = [type("Layer", (), {"weight": w, "bias": b}) for w, b in zip(theta[::2], theta[1::2], strict=True)]
    out = mlp(layers, x).squeeze(1) + m.heads.users.start
    return (out - y).square().mean() if user is None else pairwise_hinge(out, y, user)


def one(m: S2Meta, batch: TaskBatch, block: Any, b: int) -> tuple[Tensor, Tensor, int]:
    """Query loss of one task, what teaches the stop controller, and how many steps it took."""
    (x, y), (xq, yq) = (features(m, batch, block, b, side) for side in (True, False))  # type: ignore[arg-type]
    users = [None if s.user is None else s.user[b] for s in (block.support, block.query)]
    theta: list[Tensor] = list(m.backbone.layers.parameters())
    each: list[tuple[Any, Tensor]] = list(zip(m.gates, theta, strict=True))
    states = [(g.state.expand(p.numel(), -1), g.cell.expand(p.numel(), -1)) for g, p in each]
    stop = (m.stop.state[None], m.stop.cell[None])
    going: list[Tensor] = []
    before: list[Tensor] = []
    for t in range(m.options.steps if len(y) else 0):
        loss = error(m, x.detach(), y, theta, users[0])
        grads = torch.autograd.grad(loss, theta, retain_graph=True, materialize_grads=True)
        loss = loss.detach()
        stop = m.stop.lstm(smooth(torch.stack([*(g.norm() for g in grads), loss]))[0][None], stop)
        p = torch.sigmoid(m.stop.head(stop[0])).squeeze()
        u = draws.uniform(batch.seed, batch.epoch, int(block.task[b]), t, purpose="s2meta/stop")
        if t >= m.options.least_steps and float(u) < float(p.detach()):
            break
        going.append(torch.log(1 - p))
        before.append(error(m, xq, yq, theta, users[1]).detach())
        moved = []
        for k, (value, grad) in enumerate(zip(theta, grads, strict=True)):
            grad = grad.clamp(-1, 1).flatten()
            seen = [*smooth(grad), *smooth(value.detach().flatten()), smooth(loss)[0].expand(len(grad))]
            order = [seen[0], seen[2], seen[1], seen[3], seen[4]]
            i, f, states[k] = gated(m.gates[k], torch.stack(order, 1), states[k])  # type: ignore[arg-type]
            moved.append((f * value.flatten() - i * grad).view_as(value))
        theta = moved
    final = error(m, xq, yq, theta, users[1])
    n = len(going)
    worth = [v - final.detach() - m.options.penalty * (n - t) for t, v in enumerate(before)]
    return final, sum((-a * w for a, w in zip(going, worth, strict=True)), torch.zeros(())), n


@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_norm": False, "penalty": 0.1, "hidden": (4,)}, {"steps": 3, "least_steps": 3}, {"steps": 0}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["users", "scenarios"])
@pytest.mark.parametrize("at_once", [4096, 7])
def test_losses_and_gradients_equal_plain_autograd(monkeypatch, changes, kind, at_once):
    """In parts of a task's tensor and several tasks at once, and with tasks that stop at different steps."""
    monkeypatch.setattr(gates, "_AT_ONCE", at_once)
    m, batch = s2meta(**changes), oracle.batch(*RAGGED)
    batch = scenarios(batch) if kind == "scenarios" else batch
    found = [one(m, batch, block, b) for block in batch for b in range(len(block.task))]
    if not changes:
        assert len({n for *_, n in found}) > 2, "the tasks stop together: the test shows too little"
    ours, theirs = m.loss(batch), torch.stack([final for final, *_ in found])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    taught = theirs.sum() + sum(extra for _, extra, _ in found)
    for (key, a), b in zip(oracle.gradients(ours, m).items(), oracle.gradients(taught, m).values(), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda s, key=key: f"{key}: {s}")


def grad(of: Tensor) -> Tensor:
    assert of.grad is not None
    return of.grad


def test_one_coordinate_s_first_step_by_hand():
    """One unit, no norm: θ' = f θ − i g, and its derivatives by θ, by both gates' levels and by the output weight."""
    torch.manual_seed(0)
    own = Gates(1, False, 0.2, 1.0).double()
    g, theta, loss = 0.3, -1e-5, 2.5
    w = own.seen.detach().tolist()
    seen = [math.log(0.3) / 10, -1.0, 1.0, math.exp(10) * theta, math.log(2.5) / 10]
    h0, c0 = own.state.item(), own.cell.item()
    a = [sum(p * q for p, q in zip(row, seen, strict=True)) for row in w]
    a = [x + own.recurrent[k].item() * h0 + own.bias[k].item() for k, x in enumerate(a)]
    sigma = [1 / (1 + math.exp(-x)) for x in a]
    cell = sigma[1] * c0 + sigma[0] * math.tanh(a[3])
    h = sigma[2] * math.tanh(cell)
    i, f = (1 / (1 + math.exp(-(own.heads[k].item() * h + own.levels[k].item()))) for k in (0, 1))
    start = torch.tensor([theta], dtype=torch.float64, requires_grad=True)
    cells = [own()]
    steps = Steps(False, (1,), start.detach().expand(1, -1).clone())
    given = (torch.tensor([[g]], dtype=torch.float64), start.detach()[None], torch.tensor([loss], dtype=torch.float64))
    moved, rate = steps.take(cells, torch.tensor([0]), *given)
    assert float(moved) == pytest.approx(f * theta - i * g, rel=1e-12)
    assert float(rate) == pytest.approx(i, rel=1e-12)
    steps.result(start, cells).sum().backward()
    assert grad(start).item() == pytest.approx(f, rel=1e-12)
    by_i, by_f = -g * i * (1 - i), theta * f * (1 - f)
    assert grad(own.levels).tolist() == pytest.approx([by_i, by_f], rel=1e-10)
    by_h = by_i * own.heads[0].item() + by_f * own.heads[1].item()
    by_o = by_h * math.tanh(cell) * sigma[2] * (1 - sigma[2])
    assert grad(own.seen)[2].tolist() == pytest.approx([by_o * x for x in seen], rel=1e-10)
    by_c = by_h * sigma[2] * (1 - math.tanh(cell) ** 2)
    assert grad(own.cell).item() == pytest.approx(by_c * sigma[1], rel=1e-10)


# ---- when to stop


def constant_stop(p: float, **changes: Any) -> S2Meta:
    """Every step is the last with probability p."""
    m = s2meta(**changes)
    with torch.no_grad():
        m.stop.head.weight.zero_()
        m.stop.head.bias.fill_(math.log(p / (1 - p)))
    return m


def test_the_stop_controller_is_taught_what_going_on_was_worth():
    """Two steps, p = .25 before each: the bias's gradient is Σ p (L_t − L_T − penalty · (T − t))."""
    m, batch = constant_stop(0.25, steps=2, least_steps=2, penalty=0.125), oracle.batch([[5, 3]], [[4, 6]])
    m.loss(batch).sum().backward()
    curve = []
    for n in range(3):
        m.options = replace(m.options, steps=n, least_steps=n)
        curve.append(m.loss(batch).detach())
    wanted = 0.25 * ((curve[0] - curve[2] - 0.25) + (curve[1] - curve[2] - 0.125)).sum()
    assert grad(m.stop.head.bias).item() == pytest.approx(float(wanted), rel=1e-10)
    assert abs(float(wanted)) > 1e-3


def test_a_served_task_stops_where_a_draw_more_likely_than_not_had():
    """p = .3: .7² < ½ < .7, so the second step it may stop at; whatever the seed, the epoch and the task's id."""
    batch = oracle.batch([[5, 0, 3]], [[2, 2, 2]])
    others = replace(batch.blocks[0], task=batch.blocks[0].task + 50)
    for p, wanted in ((0.3, 3), (0.6, 2), (0.001, 6)):
        m = constant_stop(p, least_steps=2)
        state, same = m.adapt(batch), m.adapt(replace(batch, blocks=(others,), seed=7, epoch=3))
        assert state[0].steps.tolist() == [wanted, 0, wanted]
        assert torch.equal(state[0].theta, same[0].theta)
        assert torch.equal(state[0].theta[1], m.backbone.start())
        facts = m.facts(state, batch)
        assert facts["inner_steps"][0].tolist() == [wanted, 0, wanted]
        assert facts["step_size"][0][1] == 0
        assert bool((facts["step_size"][0][[0, 2]] > 0).all() and (facts["step_size"][0] < 1).all())


def test_training_s_stops_are_drawn_of_seed_epoch_and_task(monkeypatch):
    """Of many tasks, as many stop at each step as p says; another epoch's draws are others."""
    m = constant_stop(0.5, steps=20, least_steps=1)
    batch = oracle.batch([[2] * 400], [[1] * 400])
    counts: list[Tensor] = []
    result = Steps.result
    monkeypatch.setattr(Steps, "result", lambda steps, *given: counts.append(steps.counts()) or result(steps, *given))
    for epoch in (0, 1):
        m.loss(replace(batch, epoch=epoch))
    assert counts[0].min() == 1
    assert 1.85 < counts[0].double().mean() < 2.15  # 1 + a geometric number of mean 1, ± .07
    assert not torch.equal(*counts)


# ---- through the commands


def test_scenarios_are_learned_by_command(tmp_path, capsys):
    world.make(tmp_path / "data", themes=False)
    flags = [x for k, v in world.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    flags += ["--embedding", "8", "--hidden", "16", "--batch-size", "8", "--lr", "0.01", "--pretrained", "als"]
    words = ["train", "s2meta", "--data", str(tmp_path / "data"), "--protocol", "cmml-scenario", *flags]
    assert cli.main([*words, "--pretrained-width", "4", "--epochs", "3", "--run", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_loss"] < 0.98 * lines[0]["train_loss"]
    assert "Recall@10 minus that of" in capsys.readouterr().out
