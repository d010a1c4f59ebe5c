"""MAMO's memories by themselves: rules of writing against loops over users, any spread over workers, what is reported,
and why the slots collapse as printed."""

import itertools
from dataclasses import replace
from typing import Any

import mamo_oracle
import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from distmeta.data.schema import Dataset, Field, Label
from distmeta.memory.attentive import PROFILE, Attentive, Factors, written
from distmeta.memory.base import Arrays, Shared
from distmeta.methods import options
from distmeta.methods.mamo import MAMO
from distmeta.tasks import Bag, TaskBatch

RATES = {PROFILE: 0.5, "matrix": 0.3, "based": 0.2}
RULES = list(itertools.product((False, True), (False, True)))


def memory(sequential: bool, attended: bool, slots: int = 3, rates: dict[str, float] | None = None) -> Attentive:
    """Profiles [K, 4] and two kinds of matrices [K, 3, 2], in float64."""
    g = np.random.default_rng(0)
    shapes = {PROFILE: (4,), "matrix": (3, 2), "based": (3, 2)}
    start = {name: g.normal(size=(slots, *shape)) for name, shape in shapes.items()}
    return Attentive(start, rates or RATES, sequential, attended)


class Users:
    """Users with profiles, sums of 0 to 3 products, and sums of as many that start from a mix of the slots."""

    def __init__(self, n: int, slots: int = 3, seed: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)
        self.task = torch.randperm(10 * n, generator=g)[:n]
        self.attention, self.mix = (torch.rand(n, slots, generator=g, dtype=torch.float64) for _ in range(2))
        self.attention /= self.attention.sum(1, keepdim=True)
        self.profile = torch.randn(n, 4, generator=g, dtype=torch.float64)
        self.owner = torch.arange(n).repeat_interleave(torch.randint(4, (n,), generator=g))
        self.x = torch.randn(len(self.owner), 3, generator=g, dtype=torch.float64)
        self.delta = torch.randn(len(self.owner), 2, generator=g, dtype=torch.float64)

    def write(self, memory: Attentive, who: list[int]) -> Arrays:
        """What a worker with these users writes."""
        rows = torch.cat([torch.zeros(0, dtype=torch.int64), *((self.owner == u).nonzero()[:, 0] for u in who)])
        owner = torch.tensor([who.index(u) for u in self.owner[rows].tolist()], dtype=torch.int64)
        x, delta, at = self.x[rows], self.delta[rows], torch.tensor(who, dtype=torch.int64)
        factors = {
            PROFILE: Factors(torch.ones(len(who), 1).double(), -self.profile[at], torch.arange(len(who))),
            "matrix": Factors(x, delta, owner),
            "based": Factors(x, delta, owner, self.mix[at]),
        }
        read = {name: torch.from_numpy(v) for name, v in memory.read({}).items()}
        return written(self.task[at], self.attention[at], factors, read, memory.sequential)

    def values(self, memory: Attentive, u: int) -> dict[str, np.ndarray]:
        """x_u of each part, as the matrix it is."""
        products = -sum((torch.outer(self.x[r], self.delta[r]) for r in (self.owner == u).nonzero()[:, 0].tolist()),
                        start=torch.zeros(3, 2, dtype=torch.float64))  # fmt: skip
        based = sum(c * slot for c, slot in zip(self.mix[u].numpy(), memory.parts["based"], strict=True))
        values = {PROFILE: self.profile[u].numpy(), "matrix": products.numpy()}
        return values | {"based": products.numpy() + based}

    def by_hand(self, memory: Attentive) -> Arrays:
        """The memory after all users, by the printed equations and the rule; changes nothing."""
        values = [self.values(memory, u) for u in range(len(self.task))]
        a, n, after = self.attention.numpy(), len(self.task), {}
        for name, slots in memory.parts.items():
            r, new = RATES[name], slots.copy()
            for k in range(len(slots)):
                if memory.sequential:
                    for u in self.task.argsort().tolist():
                        erased = a[u, k] if memory.attended else 1.0
                        new[k] = (1 - r * erased) * new[k] + r * a[u, k] * values[u][name]
                else:
                    erased = a[:, k].mean() if memory.attended else 1.0
                    new[k] = (1 - r * erased) * slots[k] + r * sum(a[u, k] * values[u][name] for u in range(n)) / n
            after[name] = new
        return after


def close(ours: Arrays, theirs: Arrays, tolerance: float = 1e-12) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(("sequential", "attended"), RULES)
def test_both_rules_equal_loops_over_the_users_however_they_are_spread(sequential, attended, slots):
    """1, 2, 3 and 5 writes, some of no users and shuffled; two steps, so that the second reads what the first wrote."""
    spreads: list[list[list[int]]] = [
        [[*range(7)]],
        [[6, 0, 3, 2], [5, 1, 4]],
        [[], [4], [0, 6, 1, 2, 5, 3]],
        [[1, 5], [], [3], [6, 2, 0], [4]],
        [[u] for u in (3, 1, 0, 6, 5, 2, 4)],
    ]
    for spread in spreads:
        m = memory(sequential, attended, slots)
        for seed in (1, 2):
            users = Users(7, slots, seed)
            expected, before = users.by_hand(m), m.read({})
            kept = {name: v.copy() for name, v in before.items()}
            m.merge([users.write(m, part) for part in spread])
            close(m.read({}), expected)
            close(before, kept, 0)  # an answer does not change when the memory goes on
            assert all((kept[name] != v).any() for name, v in expected.items())


@pytest.mark.parametrize("attended", [False, True])
def test_users_in_turn_are_a_composition(attended):
    """The batch at once is the users' own writes applied one after another, where what they write is not of the memory
    itself; and the order of their ids counts, not that of their arrival."""
    users, at_once, in_turn, backwards = Users(6), *(memory(True, attended) for _ in range(3))
    at_once.merge([users.write(at_once, [*range(6)])])
    order = users.task.argsort().tolist()
    for u in order:
        in_turn.merge([users.write(in_turn, [u])])
    for u in reversed(order):
        backwards.merge([users.write(backwards, [u])])
    for name in (PROFILE, "matrix"):
        np.testing.assert_allclose(at_once.parts[name], in_turn.parts[name], rtol=1e-12, atol=1e-12)
        assert np.abs(at_once.parts[name] - backwards.parts[name]).max() > 1e-3


@pytest.mark.parametrize(("sequential", "attended"), RULES)
def test_a_step_without_any_task_changes_nothing(sequential, attended):
    m, users = memory(sequential, attended), Users(4)
    before = m.snapshot()
    m.merge([users.write(m, []), users.write(m, [])])
    close(m.snapshot(), before, 0)
    assert m.report()["entropy"] is None
    assert m.report()["usage"] == [0.0] * 3


@pytest.mark.parametrize("sequential", [False, True])
def test_a_restored_memory_goes_on_bit_for_bit(sequential):
    """Answers and reports after a snapshot, through further steps; the snapshot itself does not move with them."""
    first, users = memory(sequential, True), [Users(5, seed=n) for n in range(4)]
    for step in users[:2]:
        first.merge([step.write(first, [0, 1]), step.write(first, [4, 2, 3])])
    snapshot = first.snapshot()
    kept = {name: v.copy() for name, v in snapshot.items()}
    second = memory(sequential, True)
    second.restore(snapshot)
    for step in users[2:]:
        for m in (first, second):
            m.merge([step.write(m, [0, 1]), step.write(m, [4, 2, 3])])
        close(first.read({}), second.read({}), 0)
    close(snapshot, kept, 0)
    report = first.report()
    assert report == second.report()
    assert report["entropy"] == pytest.approx(np.mean([_entropy(u.attention) for u in users]))  # of all four steps


def _entropy(attention: Tensor) -> float:
    return float(-(attention * attention.log()).sum(1).mean() / np.log(attention.shape[1]))


def test_what_is_reported_by_hand():
    """Three tasks over two slots: one all to the first (entropy 0), two undecided (1). Slots 45 degrees apart,
    and a third that is 0, which is like none."""
    profile = np.array([[2.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    for slots, alike in ((2, np.sqrt(0.5)), (3, np.sqrt(0.5) / 3)):
        m = Attentive({PROFILE: profile[:slots]}, {PROFILE: 0.0}, False, True)
        attention = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])[:, :slots]
        factors = {PROFILE: Factors(torch.ones(3, 1), torch.ones(3, 2), torch.arange(3))}
        read = {PROFILE: torch.from_numpy(profile[:slots]).float()}
        parts = ([0], [2, 1])
        writes = [
            written(
                torch.tensor(p),
                attention[p],
                {n: Factors(f.x[p], f.delta[p], torch.arange(len(p))) for n, f in factors.items()},
                read,
                False,
            )
            for p in parts
        ]
        m.merge(writes)
        report = m.report()
        assert report["entropy"] == pytest.approx(2 / 3 * np.log(2) / np.log(slots))
        assert report["usage"] == pytest.approx([2 / 3, 1 / 3, 0.0][:slots])
        assert report["alike"] == pytest.approx(alike)
        assert m.report() == {"entropy": None, "usage": [0.0] * slots, "alike": report["alike"]}


def test_one_slot_is_a_running_mean():
    """K = 1: everybody's attention is 1, `all` and `attended` are one, and no entropy or likeness is said."""
    users, results = Users(6, slots=1), []
    for attended in (False, True):
        m = memory(False, attended, slots=1)
        before = m.read({})
        m.merge([users.write(m, [*range(6)])])
        np.testing.assert_allclose(m.parts[PROFILE], 0.5 * before[PROFILE] + 0.5 * users.profile.numpy().mean(0))
        results.append(m.read({}))
        assert m.report() == {"entropy": None, "usage": [1.0], "alike": None}
    close(*results)


GROUPS = Dataset("groups", Label("rating", 1, 5), (Field("group", "categorical", 4),), oracle.ITEM_FIELDS, 50, 12, 500)


def groups(**changes: Any) -> tuple[MAMO, TaskBatch]:
    """A world of three kinds of users whose profiles have nothing in common; ten of each, K = 3."""
    torch.manual_seed(0)
    o = options.MAMO(**{**mamo_oracle.SMALL, **changes})
    m = MAMO(o, GROUPS, oracle.items()).double()
    m.shared = Shared.of(m.memories())
    with torch.no_grad():
        m.embedding.users()["group"].weight[1:] = torch.eye(3)
    batch = oracle.batch([[4] * 30], [[2] * 30])
    block = batch.blocks[0]
    user = {"group": Bag(torch.arange(30)[:, None] % 3 + 1, None)}
    return m, TaskBatch(batch.items, (replace(block, user=user),))


def repeated(m: MAMO, batch: TaskBatch, times: int) -> dict[str, Any]:
    """What is reported after so many steps that wrote and learned nothing else; of the last of them."""
    for n in range(times):
        m.loss(batch)
        m.write()
        if n + 2 == times:
            m.shared["memory"].flush()
            m.shared["memory"].report()
    m.shared["memory"].flush()
    return m.shared["memory"].report()


@pytest.mark.parametrize("erase", ["all", "attended"])
def test_slots_collapse_as_printed_and_tell_groups_apart_with_a_temperature(erase):
    """As printed, a softmax of cosines gives a slot at most e² times another's share of a profile, so each write pulls
    all slots towards the mean profile, whence shares come closer still: they end as one. A temperature breaks that;
    what is erased does not matter to it, for that is a matter of the slots' lengths."""
    printed = repeated(*groups(temperature=1.0, erase=erase), 100)
    assert printed["alike"] == pytest.approx(1, abs=1e-3)
    assert printed["entropy"] == pytest.approx(1, abs=1e-3)
    m, batch = groups(temperature=10.0, erase=erase)
    ours = repeated(m, batch, 100)
    assert ours["entropy"] < 0.01
    assert ours["alike"] < 0.01
    assert ours["usage"] == pytest.approx([1 / 3] * 3, abs=0.01)
    a = torch.stack([m.facts([], batch)[f"slot_{k}"][0] for k in range(3)], 1)
    assert sorted(a[:3].argmax(1).tolist()) == [0, 1, 2]  # a group a slot


def test_preferences_fade_where_a_write_erases_more_than_it_brings():
    """Without inner steps a user writes back the matrix M_uI = Σ_k a_uk M_k that was read. Summed over the slots,
    `all` erases γ Σ_k M_k and brings γ M_uI, which is a K-th of that where attention is even: what users prefer fades
    by 1 − γ (1 − 1/K) a step though nobody wrote anything else. `attended` erases γ Σ_k a_uk M_k = γ M_uI: as much as
    it brings, so the sum stays whatever the attention."""
    for temperature, times in ((0.0, 20), (10.0, 20)):
        for erase in ("all", "attended"):
            m, batch = groups(temperature=temperature, erase=erase, steps=0, gamma=0.1)
            mamo_oracle.fill(m)
            before = mamo_oracle.memory(m)["preference"]
            repeated(m, batch, times)
            after = mamo_oracle.memory(m)["preference"]
            if erase == "attended":
                torch.testing.assert_close(after.sum(0), before.sum(0), rtol=1e-12, atol=1e-12)
            elif temperature == 0:
                left = (1 - 0.1 * (1 - 1 / 3)) ** times
                torch.testing.assert_close(after.sum(0), left * before.sum(0), rtol=1e-12, atol=1e-12)
            else:
                assert after.norm() < 0.5 * before.norm()
    m, batch = groups(slots=1, erase="all", steps=0)
    mamo_oracle.fill(m)
    before = mamo_oracle.memory(m)["preference"]
    repeated(m, batch, 20)  # with one slot, all is what it brings
    torch.testing.assert_close(mamo_oracle.memory(m)["preference"], before, rtol=1e-12, atol=1e-12)
