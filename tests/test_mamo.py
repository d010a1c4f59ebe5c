"""MAMO against the paper's equations user by user (mamo_oracle.py): losses, meta-gradients, and what is written."""

import itertools
from dataclasses import replace
from typing import Any

import mamo_oracle
import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from distmeta import config as config_module
from distmeta.data.protocols.base import KINDS
from distmeta.data.schema import Dataset, Label
from distmeta.errors import UserError
from distmeta.exchange import Exchange
from distmeta.memory.base import Arrays, Shared
from distmeta.methods import options
from distmeta.methods.mamo import MAMO
from distmeta.parallel.shared import share
from distmeta.tasks import Rows, TaskBatch

RAGGED = ([[5, 3, 1, 0], [7, 6]], [[2, 4, 3, 2], [1, 5]])
NOBODY = TaskBatch(torch.zeros(0, dtype=torch.int64), ())


def batch_of(*ids: int) -> TaskBatch:
    """The ragged batch for six tasks; the fourth has no support."""
    batch = oracle.batch(*RAGGED)
    first = len(batch.blocks[0].task)
    for block, part in zip(batch, (ids[:first], ids[first:]), strict=True):
        block.task[:] = torch.tensor(part) * KINDS
    return batch


def read(m: MAMO) -> Arrays:
    return m.shared["memory"].read({})


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda s, n=name: f"{n}: {s}"
        )


def equal(ours: Arrays, theirs: Arrays) -> None:
    """Bit for bit."""
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


FORMS = ("auto", "dual", "private")
CASES: list[dict[str, Any]] = [
    *(
        {"steps": steps, "first_order": first, "form": form}
        for steps, first, form in itertools.product((1, 2, 3), (False, True), FORMS)
    ),
    *({"recommender": r, "form": form} for r, form in itertools.product(("dnn", "nmf"), FORMS)),
    *({"classes": True, "wide": True, "form": form} for form in FORMS),
    *(
        {"per_item": True, "first_order": first, "form": form, "recommender": r}
        for first, form, r in ((False, "auto", "memory"), (False, "dual", "memory"), (True, "private", "dnn"))
    ),
    {"layers": 1, "hidden": (), "tau": 0.7},
    {"layers": 3, "slots": 1, "temperature": 1.0},
    {"tau": 0.0, "recommender": "dnn", "wide": True},
    {"steps": 0},
    {"learn_rates": False},
]


@pytest.mark.parametrize("changes", CASES, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_losses_and_meta_gradients_equal_plain_autograd(changes):
    m, batch = mamo_oracle.mamo(**changes), oracle.batch(*RAGGED)
    ours, theirs = m.loss(batch), torch.stack([user.loss for user in mamo_oracle.visit(m, batch)])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    a, b = oracle.gradients(ours, m), oracle.gradients(theirs, m)
    agree(a, b)


def test_the_meta_gradient_agrees_with_finite_differences():
    """Attention is a constant of the profile; differences see it as one where it is the same for all profiles."""
    m, batch = mamo_oracle.mamo(temperature=0.0), oracle.batch(*RAGGED)
    gradient = oracle.gradients(m.loss(batch), m)
    generator = torch.Generator().manual_seed(3)
    for name, p in m.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        difference = 0.0
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-6 * direction
                difference += sign * float(m.loss(batch).sum()) / 2e-6
                p -= sign * 1e-6 * direction
        assert difference == pytest.approx(float((gradient[name] * direction).sum()), rel=1e-5, abs=1e-5), name


WRITES: list[dict[str, Any]] = [
    *({"write": w, "erase": e} for w, e in itertools.product(("mean", "sequential"), ("attended", "all"))),
    {"write": "sequential", "steps": 0},
    {"steps": 3, "first_order": True, "recommender": "dnn"},
    {"write": "sequential", "per_item": True, "form": "dual"},
    {"classes": True, "form": "private", "slots": 1},
    {"tau": 0.0, "layers": 1},
]


@pytest.mark.parametrize("changes", WRITES, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_what_is_written_equals_the_equations(changes):
    """Two batches of other tasks in turn, with a meta-update between: the second reads what the first wrote, and what
    is written is of the weights and step sizes that the step began with."""
    m = mamo_oracle.mamo(**changes)
    for batch in (batch_of(9, 2, 7, 4, 1, 3), batch_of(30, 11, 2, 9, 5, 1)):
        before, losses = mamo_oracle.memory(m), m.loss(batch)
        expected = mamo_oracle.written(m, before, mamo_oracle.visit(m, batch))
        losses.sum().backward()
        m.write()
        with torch.no_grad():
            for p in m.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
                    p.grad = None
        agree(mamo_oracle.memory(m), expected)
        assert all((before[name] != v).any() for name, v in expected.items())


@pytest.mark.parametrize("staleness", [1, 2])
def test_what_is_written_from_a_stale_read(staleness):
    """In a server's memory, steps behind: all that a user has is of the memory that was read, M_uI too, and is written
    to the newest, which forgets as much as any."""
    m = mamo_oracle.mamo()
    state = m.shared["memory"].snapshot()
    share(m, config_module.TrainOptions(staleness=staleness), Exchange())
    m.shared["memory"].restore(state)
    known = [mamo_oracle.memory(m)]
    for n in range(5):
        batch, stale = oracle.batch(*RAGGED, seed=n), known[max(0, n - staleness)]
        users = mamo_oracle.visit(m, batch, stale)
        losses = m.loss(batch)
        torch.testing.assert_close(losses, torch.stack([u.loss for u in users]), rtol=1e-9, atol=1e-9)
        losses.sum().backward()
        m.write()
        m.shared["memory"].advance()
        known.append(mamo_oracle.written(m, known[-1], users))
    m.shared["memory"].flush()
    agree(mamo_oracle.memory(m), known[-1])
    assert (known[-1]["preference"] - known[-2]["preference"]).abs().max() > 1e-3


def test_a_task_without_support_writes_its_profile_no_gradient_and_the_matrix_it_read():
    m = mamo_oracle.mamo(write="sequential", slots=1, alpha=0.5, beta=0.25, gamma=0.125)
    batch = oracle.batch([[0]], [[3]])
    before = mamo_oracle.memory(m)
    m.loss(batch).sum().backward()
    m.write()
    p_u = m.embedding.encode(batch).users(batch.blocks[0]).detach()
    expected = {"profile": 0.5 * before["profile"] + 0.5 * p_u, "preference": before["preference"]}
    agree(mamo_oracle.memory(m), expected | {f"gradient{i}": 0.75 * before[f"gradient{i}"] for i in range(2)}, 1e-12)


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_block_of_empty_supports_is_what_padding_makes_of_it(form, per_item):
    """Where no task has a row, columns of padding or none at all: the same losses, and the same is written."""
    padded = oracle.batch([[0, 0]], [[3, 2]])
    block = padded.blocks[0]
    s = block.support
    none = replace(block, support=Rows(s.item[:, :0], s.label[:, :0], s.mask[:, :0]))
    results = []
    for batch in (padded, TaskBatch(padded.items, (none,))):
        m = mamo_oracle.mamo(form=form, per_item=per_item)
        losses = m.loss(batch)
        losses.sum().backward()
        m.write()
        results.append({"losses": losses.detach(), **mamo_oracle.memory(m)})
    agree(*results, tolerance=1e-12)


@pytest.mark.parametrize("write", ["mean", "sequential"])
def test_writes_do_not_depend_on_how_a_batch_is_spread(write):
    """What 1, 2, 3, 5 workers write, one of them without tasks and in any order, makes the same memory (1e-12)."""
    m = mamo_oracle.mamo(write=write)
    whole, state = batch_of(9, 2, 7, 4, 1, 3), m.shared["memory"].snapshot()
    tasks = [(block, torch.tensor([b])) for block in whole for b in range(len(block.task))]

    def of(part: list[int]) -> Arrays:
        """What a worker with these of the tasks writes."""
        blocks = [tasks[i][0].take(tasks[i][1]) for i in part]
        if blocks:
            m.loss(TaskBatch(whole.items, tuple(blocks))).sum().backward()
        m.write()
        pending = m.shared["memory"].pending
        assert pending is not None
        m.shared["memory"].discard()
        return pending

    results, reports = [], []
    for spread in ([[*range(6)]], [[4, 1, 5], [2, 0, 3]], [[3], [], [5, 4, 0, 1, 2]], [[1], [4, 0], [3], [2, 5], []]):
        writes = [of(part) for part in spread]
        m.shared["memory"].restore(state)
        memory: Any = m.shared["memory"].memory
        memory.merge(writes)
        results.append(mamo_oracle.memory(m))
        reports.append(m.shared["memory"].report())
        m.shared["memory"].restore(state)
    m.loss(whole).sum().backward()  # the batch as it is, in padded blocks
    m.write()
    for found in (*results[1:], mamo_oracle.memory(m)):
        agree(results[0], found, 1e-12)
    for found in reports[1:]:
        assert found["entropy"] == pytest.approx(reports[0]["entropy"], rel=1e-12)
        assert found["usage"] == pytest.approx(reports[0]["usage"], rel=1e-12)


@pytest.mark.parametrize("write", ["mean", "sequential"])
def test_a_worker_without_tasks_writes_nothing(write):
    """Never yet, nor between steps, nor where it was not even asked for losses."""
    m = mamo_oracle.mamo(write=write)
    before = read(m)
    m.write()
    equal(read(m), before)
    m.loss(oracle.batch(*RAGGED)).sum().backward()
    m.write()
    before = read(m)
    for _ in range(2):
        m.write()
        equal(read(m), before)
        m.loss(NOBODY)


def test_memories_are_only_read_where_nothing_is_learned():
    """Algorithm 2: adapting and predicting, however often, and facts; training steps around them write as without."""
    m, plain = mamo_oracle.mamo(), mamo_oracle.mamo()
    test = oracle.batch(*RAGGED, seed=8)

    def use() -> None:
        answers = []
        for _ in range(3):
            answers.append(m.predict(state := m.adapt(test), test))
            m.facts(state, test)
        assert all(torch.equal(a, b) for a, b in zip(answers[0], answers[2], strict=True))
        with torch.no_grad():
            m.loss(test)

    for n in range(3):
        before = m.shared["memory"].snapshot()
        use()
        assert m.shared["memory"].pending is None
        equal(m.shared["memory"].snapshot(), before)
        for each in (m, plain):
            each.loss(oracle.batch(*RAGGED, seed=n)).sum().backward()
            each.write()
        assert any((before[name] != v).any() for name, v in read(m).items())
        equal(read(m), read(plain))
    use()
    m.write()  # nothing is left over from there
    equal(read(m), read(plain))


def test_what_is_predicted_looks_at_no_query_label_and_equals_the_loss_pass():
    """Batch by batch, and in one: the answers for a task are its own."""
    m, batch = mamo_oracle.mamo(), oracle.batch(*RAGGED)
    hidden = TaskBatch(
        batch.items,
        tuple(replace(b, query=replace(b.query, label=torch.full_like(b.query.label, float("nan")))) for b in batch),
    )
    scores = m.predict(m.adapt(hidden), hidden)
    losses = [m.head.error(s, b.query) for s, b in zip(scores, batch, strict=True)]
    torch.testing.assert_close(torch.cat(losses), m.loss(batch).detach())
    for block, together in zip(hidden, scores, strict=True):
        alone = TaskBatch(hidden.items, (block.take(torch.tensor([1])),))
        torch.testing.assert_close(m.predict(m.adapt(alone), alone)[0], together[1:2], rtol=1e-9, atol=1e-9)


def test_classes_predict_the_expected_rating():
    m, batch = mamo_oracle.mamo(classes=True), oracle.batch(*RAGGED)
    users, scores = mamo_oracle.visit(m, batch), m.predict(m.adapt(batch), batch)
    shown = scores[0][0, : int(batch.blocks[0].query.mask[0].sum())]
    expected = users[0].outputs.softmax(1) @ torch.arange(1, 6).double()
    torch.testing.assert_close(shown, expected.detach(), rtol=1e-9, atol=1e-9)
    assert 1 < float(shown.min()) < float(shown.max()) < 5


def test_facts_are_each_tasks_attention():
    m, batch = mamo_oracle.mamo(), oracle.batch(*RAGGED)
    users, facts = mamo_oracle.visit(m, batch), m.facts(m.adapt(batch), batch)
    a = torch.stack([u.attention for u in users])
    for k in range(3):
        torch.testing.assert_close(torch.cat(facts[f"slot_{k}"]), a[:, k], rtol=1e-9, atol=1e-9)
    entropy = -(a * a.log()).sum(1) / np.log(3)
    torch.testing.assert_close(torch.cat(facts["entropy"]), entropy, rtol=1e-9, atol=1e-9)
    m.loss(batch).sum().backward()
    m.write()
    read(m)
    report = m.shared["memory"].report()
    assert report["entropy"] == pytest.approx(float(entropy.mean()))
    assert report["usage"] == pytest.approx(a.mean(0).tolist())
    assert "entropy" not in mamo_oracle.mamo(slots=1).facts([], batch)


def test_bad_input_is_one_sentence():
    def made(dataset: Dataset, **changes: Any) -> MAMO:
        return MAMO(options.MAMO(**{**mamo_oracle.SMALL, **changes}), dataset, oracle.items())

    plain = replace(oracle.dataset(), user_fields=())
    with pytest.raises(
        UserError, match=r"^world: has no user fields to tell users apart by, which mamo's memory needs"
    ):
        made(plain)
    with pytest.raises(UserError, match=r"^world: has no item fields to tell items apart by; add --item-ids$"):
        made(replace(oracle.dataset(), item_fields=()), item_ids=False)
    made(replace(oracle.dataset(), item_fields=()), item_ids=True)
    clicks = replace(oracle.dataset(), label=Label("click", 0, 1))
    with pytest.raises(UserError, match=r"^--classes: the labels are clicks, of which there are two; leave it out$"):
        made(clicks, classes=True)
    with pytest.raises(UserError, match=r"^--query-loss absolute: the labels are clicks"):
        made(clicks, query_loss="absolute")
    with pytest.raises(UserError, match=r"^--query-loss absolute: with --classes the loss is the cross-entropy; leave"):
        made(oracle.dataset(), classes=True, query_loss="absolute")
    halves = replace(oracle.dataset(), label=Label("rating", 0.5, 5))
    with pytest.raises(UserError, match=r"^--classes: the ratings are 0\.5 to 5; a class is a whole one; leave it"):
        made(halves, classes=True)
    for flags, said in (
        ({"slots": "0"}, "slots"),
        ({"erase": "none"}, "attended"),
        ({"write": "last"}, "sequential"),
        ({"recommender": "rum"}, "nmf"),
        ({"alpha": "1.5"}, "alpha"),
        ({"temprature": "3"}, "temperature"),
    ):
        with pytest.raises(UserError, match=said):
            config_module.build(options.MAMO, flags, "test")


@pytest.mark.parametrize(
    ("train", "changes", "said"),
    [
        ({"staleness": 1}, {"write": "sequential"}, "^--staleness 1: --write sequential needs what the step itself"),
        ({"state_shards": 2}, {}, "^--state-shards 2: Attentive is not made for several shards; leave it at 1$"),
    ],
)
def test_what_the_memory_cannot_be_is_said(train, changes, said):
    with pytest.raises(UserError, match=said):
        share(mamo_oracle.mamo(**changes), config_module.TrainOptions(**train), Exchange())


@pytest.mark.parametrize("write", ["mean", "sequential"])
def test_single_precision_stays_and_is_as_good_as_it_can_be(write):
    """The memory of a run keeps its precision, step after step: a checkpoint's arrays are what they were."""
    exact, single = mamo_oracle.mamo(write=write), mamo_oracle.mamo(write=write).float()
    state = single.shared["memory"].snapshot()
    single.shared["memory"].restore({n: v if n == "seen" else v.astype(np.float32) for n, v in state.items()})
    for n in range(3):
        batch = oracle.batch(*RAGGED, seed=n)
        for m, b in ((exact, batch), (single, batch.to("cpu", torch.float32))):
            m.loss(b).sum().backward()
            m.write()
    found = read(single)
    assert {v.dtype for v in found.values()} == {np.dtype(np.float32)}
    for name, value in read(exact).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_clicks_train():
    """The sigmoid's cross-entropy, inside and out; the memories as they are."""
    torch.manual_seed(0)
    clicks = replace(oracle.dataset(), label=Label("click", 0, 1))
    m = MAMO(options.MAMO(**mamo_oracle.SMALL), clicks, oracle.items()).double()
    m.shared = Shared.of(m.memories())
    batch = oracle.batch(*RAGGED)
    blocks = tuple(
        replace(
            b, support=replace(b.support, label=b.support.label % 2), query=replace(b.query, label=b.query.label % 2)
        )
        for b in batch
    )
    batch = TaskBatch(batch.items, blocks)
    before = {n: v.copy() for n, v in read(m).items()}
    losses = m.loss(batch)
    losses.sum().backward()
    m.write()
    assert all((before[name] != v).any() for name, v in read(m).items())
    assert torch.isfinite(losses).all()
    scores = m.predict(m.adapt(batch), batch)
    assert all(float(s.min()) > 0 and float(s.max()) < 1 for s in scores)
