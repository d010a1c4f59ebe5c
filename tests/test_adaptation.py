"""The inner loop against plain autograd in float64 (design.md §6, invariant 1) and adaptation.md's six caveats."""

import itertools
from dataclasses import replace
from functools import partial

import oracle
import pytest
import torch
from torch import Tensor

from distmeta.adaptation.cost import Plan
from distmeta.adaptation.fast import FastWeights
from distmeta.adaptation.features import Dense, Features, PerTask
from distmeta.adaptation.inner import Turn, adapt, squared_error
from distmeta.adaptation.maps import Linear, Table
from distmeta.adaptation.norm import squared_norm
from distmeta.adaptation.overlap import overlap
from distmeta.adaptation.starts import Own
from distmeta.adaptation.tape import Node, Tape
from distmeta.errors import RunError
from distmeta.methods import options
from distmeta.methods.gradient import GradientMethod
from distmeta.methods.melu import MeLU
from distmeta.methods.metacs import MetaCS
from distmeta.methods.metasgd import MetaSGD
from distmeta.tasks import Bag, Rows, TaskBatch

RAGGED = ([[5, 3, 1, 0], [7, 6]], [[2, 4, 3, 2], [1, 5]])
CASES = [
    (cls, steps, first_order, form)
    for (cls, steps, first_order) in itertools.product(("melu", "metacs"), (1, 2, 3, 5), (False, True))
    for form in ("auto", "dual", "private")
]


def method(name: str, **changes) -> MeLU | MetaCS:
    base = {"melu": (MeLU, options.MeLU()), "metacs": (MetaCS, options.MetaCS())}[name]
    o = replace(base[1], embedding=3, hidden=(6, 5), local_lr=0.03, item_ids=True, **changes)
    return oracle.build(base[0], o)  # type: ignore[return-value]


def first_block(m: GradientMethod, batch: TaskBatch) -> FastWeights:
    encoded = m.embedding.encode(batch)
    return m.fast_weights(batch.blocks[0], encoded, m.rates(batch, encoded)[0])


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("name", "steps", "first_order", "form"), CASES)
def test_losses_and_meta_gradients_equal_plain_autograd(name, steps, first_order, form):
    m = method(name, steps=steps, first_order=first_order, form=form)
    batch = oracle.batch(*RAGGED)
    ours, theirs = m.loss(batch), oracle.losses(m, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    close(oracle.gradients(ours, m), oracle.gradients(theirs, m))


@pytest.mark.parametrize(("name", "form"), list(itertools.product(("melu", "metacs"), ("auto", "dual", "private"))))
def test_a_linear_path_beside_the_layers_equals_plain_autograd(name, form):
    """Features that feed two maps at once: δ of both places add up below them."""
    m = method(name, steps=3, form=form, wide=True)
    batch = oracle.batch(*RAGGED)
    ours, theirs = m.loss(batch), oracle.losses(m, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    close(oracle.gradients(ours, m), oracle.gradients(theirs, m))


@pytest.mark.parametrize("name", ["melu", "metacs"])
def test_meta_gradient_agrees_with_finite_differences(name):
    m = method(name, steps=2)
    batch = oracle.batch(*RAGGED)
    gradient = oracle.gradients(m.loss(batch), m)
    generator = torch.Generator().manual_seed(3)
    for parameter_name, p in m.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        with torch.no_grad():
            difference = 0.0
            for sign in (1, -1):
                p += sign * 1e-6 * direction
                difference += sign * float(m.loss(batch).sum()) / 2e-6
                p -= sign * 1e-6 * direction
        expected = float((gradient[parameter_name] * direction).sum())
        assert difference == pytest.approx(expected, rel=1e-5, abs=1e-5), parameter_name


@pytest.mark.parametrize("form", ["dual", "private"])
def test_personal_rates(form):
    """PAML's α(h_u) [b, 1, 1]: values, and the gradient that reaches α itself."""
    m = method("metacs", steps=2, form=form)
    batch = oracle.batch(*RAGGED)
    alphas = {id(block): torch.rand(len(block.task), dtype=torch.float64).mul(0.05).requires_grad_() for block in batch}
    m.rates = lambda batch, _: [{a: alphas[id(block)][:, None, None] for a in m.adapted()} for block in batch]  # type: ignore[method-assign]
    ours = m.loss(batch)
    theirs = oracle.losses(m, batch, rate=lambda block, b, _: alphas[id(block)][b])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for alpha in alphas.values():
        a, b = (torch.autograd.grad(x.sum(), alpha, retain_graph=True)[0] for x in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("tuned", "steps", "first_order"), list(itertools.product(("decision", "all"), (1, 3), (False, True)))
)
def test_a_step_for_each_parameter(tuned, steps, first_order):
    """Meta-SGD: values, and the gradients of weights and of the steps themselves, some of them negative."""
    base = options.MetaSGD(embedding=3, hidden=(6, 5), local_lr=0.03, item_ids=True, wide=True)
    m = oracle.build(MetaSGD, replace(base, tuned=tuned, steps=steps, first_order=first_order))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (*m.rate_weights, *m.rate_biases):
            p += 0.03 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    batch = oracle.batch(*RAGGED)
    ours, theirs = m.loss(batch), oracle.losses(m, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    close(oracle.gradients(ours, m), oracle.gradients(theirs, m))


@pytest.mark.parametrize("name", ["melu", "metacs"])
def test_squared_norm_of_the_inner_gradient(name):
    """REG-PAML's regulariser: values and derivatives of ‖∂L/∂θ‖² at the first step; 0 for a task without support."""
    m, batch = method(name, steps=2, wide=True), oracle.batch(*RAGGED)
    encoded, ours, theirs = m.embedding.encode(batch), [], []
    for block, rates in zip(batch, m.rates(batch, encoded), strict=True):
        steps: list[Tensor] = []
        m.fast_weights(block, encoded, rates, watch=lambda records, s=steps: s.append(squared_norm(records)))
        ours.append(steps[0])
    oracle.losses(m, batch, norms=theirs)
    ours = torch.cat(ours)
    assert ours[3] == 0
    ours = ours[[0, 1, 2, 4, 5]]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-9, atol=1e-9)
    close(oracle.gradients(ours, m), oracle.gradients(torch.stack(theirs), m))


def test_caveat_1_first_order_carries_no_graph_of_the_support():
    """First order detaches every stored input: the gradient is that of the query at fixed fast weights, and differs."""
    batch = oracle.batch(*RAGGED)
    first, exact = method("metacs", steps=2, first_order=True, form="dual"), method("metacs", steps=2, form="dual")
    stored = {}
    for m in (first, exact):
        fast = first_block(m, batch)
        pairs = [pair for layer in fast.linear.values() for pair in layer.pairs]
        stored[m] = [t for pair in pairs for t in (pair.delta, *(p.rows() for p in pair.x.parts))]
    assert not any(t.requires_grad for t in stored[first])
    assert all(t.requires_grad for t in stored[exact])
    a, b = oracle.gradients(first.loss(batch), first), oracle.gradients(exact.loss(batch), exact)
    assert max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in a if n != "log_rate") > 0.05


def test_caveat_2_a_map_used_in_several_places_has_one_list_of_pairs():
    """One W twice in a row, and one table on both sides: every place of use sees the steps of all places."""
    torch.manual_seed(0)
    w, table, out = Linear(6, 6).double(), Table(5, 3).double(), Linear(6, 1).double()
    rows = oracle.rows([4, 3, 2], torch.Generator().manual_seed(2))
    left, right = torch.randint(5, (3, 1, 1)), torch.randint(5, (3, 4, 1))

    class At:
        def __init__(self, index: Tensor, kind: type) -> None:
            self.index, self.one = Bag(index, None), kind(table.weight[index[..., 0]])

        def base(self):
            return self.one

        def bag(self, name: str) -> Bag:
            return self.index

    def forward(tape: Tape, places: tuple[At, At]) -> Node:
        h = tape.relu(tape.linear(w, *(tape.lookup({"t": table}, p) for p in places)), slope=0.1)
        return tape.linear(out, tape.relu(tape.linear(w, h), slope=0.1))

    rates = {w: 0.05, table: 0.05, out: 0.05}
    leaves = [w.weight, w.bias, table.weight, out.weight, out.bias]
    expected = []
    for b, n in enumerate((4, 3, 2)):
        fast = list(leaves)

        def run(fast, b=b, n=n):
            x = torch.cat([fast[2][left[b, 0]].expand(n, -1), fast[2][right[b, :n, 0]]], -1)
            h = torch.nn.functional.leaky_relu(x @ fast[0] + fast[1], 0.1)
            h = torch.nn.functional.leaky_relu(h @ fast[0] + fast[1], 0.1)
            return (h @ fast[3] + fast[4]).squeeze(-1)

        for _ in range(3):
            loss = (run(fast) - rows.label[b, :n]).square().mean()
            fast = [f - 0.05 * g for f, g in zip(fast, torch.autograd.grad(loss, fast, create_graph=True), strict=True)]
        expected.append(run(fast).square().sum())
    theirs = torch.autograd.grad(torch.stack(expected).sum(), leaves)
    for form in ("dual", "private"):
        places = At(left, PerTask), At(right, Dense)
        turns = [Turn(partial(forward, places=places), rows)] * 3
        fast = adapt(turns, rates, first_order=False, plan=Plan(3, 4, form))
        y = forward(Tape(fast), places).part.rows().squeeze(-1)
        ours = torch.autograd.grad((y.square() * rows.mask).sum(), leaves)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_caveat_3_pairs_merge_only_where_the_input_stands_still():
    batch = oracle.batch(*RAGGED)
    for name, merged in (("melu", 1), ("metacs", 3)):
        m = method(name, steps=3, form="dual")
        fast = first_block(m, batch)
        first, second, *_ = m.decision
        assert len(fast.linear[first].pairs) == merged
        assert len(fast.linear[second].pairs) == 3
        assert all(len(t.pairs) == 1 for t in fast.tables.values())  # a lookup's input is its index: it never moves


def test_caveat_4_the_form_follows_cost():
    """First layer over features that stand still: dual. A narrow upper layer over many steps: private."""
    first, upper = Linear(256, 64), Linear(64, 64)
    still = Features(Dense(torch.zeros(2, 30, 256)), fixed=True)
    moving = Features(Dense(torch.zeros(2, 30, 64)))
    assert not Plan(1, 10).private(first, still, 30)
    assert not Plan(5, 10).private(first, still, 30)
    assert not Plan(1, 10).private(upper, moving, 15)
    assert Plan(20, 10).private(upper, moving, 40)


def test_caveat_5_what_breaks_the_low_rank_takes_the_private_form():
    """A step size a weight (Meta-SGD) on a dense layer: formed from x_sᵀ d, as the private form allows."""
    torch.manual_seed(0)
    x, d = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    layer = Linear(4, 5).double()
    from distmeta.adaptation.fast import Private

    moved = Private.of(Own(layer)).add(Features(Dense(x)), d, 0.5)
    torch.testing.assert_close(moved.weights[0], layer.weight - 0.5 * x.transpose(1, 2) @ d)
    torch.testing.assert_close(moved.bias, layer.bias - 0.5 * d.sum(1, keepdim=True))


@pytest.mark.parametrize("name", ["melu", "metacs"])
def test_masks_padding_changes_nothing_and_an_empty_support_leaves_the_shared_model(name):
    """Whatever stands on padded rows, in one block or apart, tasks get the same losses and gradients."""
    m = method(name, steps=2)
    together = oracle.batch([[5, 3, 1, 0]], [[2, 4, 3, 2]])
    block = together.blocks[0]

    def cut(r: Rows, b: int) -> Rows:
        n = int(r.mask[b].sum())
        return Rows(r.item[b : b + 1, :n], r.label[b : b + 1, :n], r.mask[b : b + 1, :n])

    apart = TaskBatch(
        together.items,
        tuple(
            replace(
                block,
                task=block.task[b : b + 1],
                user={k: v.take(torch.tensor([b])) for k, v in block.user.items()},
                support=cut(block.support, b),
                query=cut(block.query, b),
            )
            for b in range(4)
        ),
    )
    torch.testing.assert_close(m.loss(together), m.loss(apart), rtol=1e-9, atol=1e-9)
    close(oracle.gradients(m.loss(together), m), oracle.gradients(m.loss(apart), m))
    empty = apart.blocks[3]
    encoded = m.embedding.encode(apart)
    shared = m(Tape(FastWeights({}, Plan(0, 0))), *encoded.place(empty, empty.query)).part.rows().squeeze(-1)
    torch.testing.assert_close(m.loss(apart)[3:], squared_error(shared, empty.query))


def test_predict_does_not_see_the_query_labels_and_equals_the_loss_pass():
    m = method("metacs", steps=2)
    batch = oracle.batch(*RAGGED)
    hidden = TaskBatch(
        batch.items,
        tuple(replace(b, query=replace(b.query, label=torch.full_like(b.query.label, float("nan")))) for b in batch),
    )
    scores = m.predict(m.adapt(hidden), hidden)
    losses = torch.cat([squared_error(s, b.query) for s, b in zip(scores, batch, strict=True)])
    torch.testing.assert_close(losses, m.loss(batch).detach())


@pytest.mark.parametrize("size", [9, 90])
def test_overlap_equals_the_product_of_the_hot_matrices(size):
    g = torch.Generator().manual_seed(0)
    index = torch.randint(1, 9, (2, 5, 3), generator=g)
    weight = torch.rand(2, 5, 3, generator=g, dtype=torch.float64) * (torch.arange(3) < 2)
    bag = Bag(index, weight)
    hot = torch.stack([oracle.hot(Bag(index[b], weight[b]), size) for b in range(2)])
    torch.testing.assert_close(overlap(bag, bag, size, torch.float64), hot @ hot.transpose(1, 2))
    one = Bag(index[:, :, :1], None)
    hot_one = torch.stack([oracle.hot(Bag(index[b, :, :1], None), size) for b in range(2)])
    torch.testing.assert_close(overlap(one, bag, size, torch.float64), hot_one @ hot.transpose(1, 2))


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("form", ["dual", "private"])
@pytest.mark.parametrize("adapted", [(0, 1, 2, 3), (1, 3), (2,), (3,)])
def test_a_chain_equals_its_layers_one_by_one(slope, form, adapted):
    """chain.py's reverse pass against autograd through `relu` and `linear`: values, δ, and gradients of everything,
    learned and personal rates included, whichever layers adapt."""
    torch.manual_seed(0)
    layers = [Linear(a, b).double() for a, b in ((4, 6), (6, 5), (5, 5), (5, 1))]
    rows = oracle.rows([4, 2, 3], torch.Generator().manual_seed(1))
    x, q = (torch.randn(3, n, 4, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    personal = torch.rand(3, 1, 1, dtype=torch.float64).mul(0.1).requires_grad_()
    learned = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    rates = {layers[i]: (personal, learned, 0.07, learned)[i] for i in adapted}
    leaves = [p for layer in layers for p in layer.parameters()] + [x, q, personal, learned]

    def chained(tape: Tape, node: Node) -> Node:
        return tape.chain(layers[1:], tape.linear(layers[0], node), slope)

    def one_by_one(tape: Tape, node: Node) -> Node:
        node = tape.linear(layers[0], node)
        for layer in layers[1:]:
            node = tape.linear(layer, tape.relu(node, slope))
        return node

    results = []
    for forward in (chained, one_by_one):
        support, query = Node(Dense(x), needs=False), Node(Dense(q), needs=False)
        turns = [Turn(partial(forward, node=support), rows)] * 3
        fast = adapt(turns, rates, first_order=False, plan=Plan(3, 5, form))
        scores = forward(Tape(fast), query).part.rows()
        results.append((scores, torch.autograd.grad(scores.square().sum(), leaves, allow_unused=True)))
    (a, gradients), (b, expected) = results
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for g, e in zip(gradients, expected, strict=True):
        assert (g is None or not g.any()) if e is None else g is not None
        if e is not None:
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hidden", [(), (6,), (6, 5, 4)])
def test_any_depth_equals_plain_autograd(hidden):
    o = replace(options.MetaCS(), embedding=3, hidden=hidden, local_lr=0.03, steps=2)
    m = oracle.build(MetaCS, o)
    batch = oracle.batch(*RAGGED)
    ours, theirs = m.loss(batch), oracle.losses(m, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    close(oracle.gradients(ours, m), oracle.gradients(theirs, m))


def test_the_choice_of_forms_is_the_measured_one():
    """The fastest combination on one core at 256-64-64-1 (see cost.py): upper layer dual or private, by S and T."""
    upper = Linear(64, 64)
    moving = Features(Dense(torch.zeros(2, 30, 64)))
    fastest_private = {(30, 1): False, (30, 2): True, (30, 5): True, (15, 1): False, (15, 2): False, (15, 5): True}
    for (s, t), private in fastest_private.items():
        assert Plan(t, 10 if s == 30 else 5).private(upper, moving, s) == private, (s, t)
    assert Plan(1, 10).private(Linear(64, 1), moving, 30)


def test_a_change_of_the_weights_after_the_pass_does_not_pass_for_their_gradient():
    """The chain saves what it differentiates by: weights overwritten before the reverse pass are refused."""
    m = method("melu")
    loss = m.loss(oracle.batch(*RAGGED)).sum()
    with torch.no_grad():
        list(m.decision)[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_benchmark_compares_equal_gradients_and_refuses_others():
    from distmeta.commands import adaptation_cases, benchmark_adaptation

    for model in ("whole", "embeddings"):
        variants = adaptation_cases.whole(model, 2, steps=2, double=True).variants
        benchmark_adaptation.check(variants, model)
        off = {name: v for name, v in variants.items() if name == "loop"}
        off["auto"] = lambda v=variants["auto"]: [g * (1 + 1e-6) for g in v()]
        with pytest.raises(RunError, match="auto and loop differ"):
            benchmark_adaptation.check(off, model)
