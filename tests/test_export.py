"""A CMML as one exported graph against the method in eager, for sizes other than those it was traced with."""

import io
from typing import Any

import oracle
import pytest
import torch
from cmml_oracle import cmml, scenarios

from distmeta.errors import UserError
from distmeta.methods import options
from distmeta.methods.cmml import CMMLFilm
from distmeta.methods.melu import MeLU
from distmeta.serving.export import Served, exported, given

CASES = [
    ("cmml-linear", {"encoder": "mean", "labels": "product", "wide": True}),
    ("cmml-sigmoid", {"encoder": "gru", "positives": True}),
    ("cmml-film", {"encoder": "max", "hybrid": "mlp"}),
    ("cmml-film", {"encoder": "lstm", "hybrid": "none", "labels": "product", "wide": True}),
    ("cmml-softm", {"encoder": "mean"}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_the_graph_answers_as_the_method_does(name, changes):
    """To 1e-5, whatever the numbers of users, support rows and candidates, saved and loaded; no support included."""
    m = cmml(name, **changes).float()
    file = io.BytesIO()
    torch.export.save(exported(m), file)
    file.seek(0)
    graph = torch.export.load(file).module()
    for ragged in (([[5, 3, 1, 0]], [[2, 4, 3, 2]]), ([[40]], [[1000]]), ([[1]], [[1]]), ([[0, 0]], [[9, 9]])):
        batch = oracle.batch(*ragged).to("cpu", torch.float32)
        (expected,) = m.predict(m.adapt(batch), batch)
        found = graph(*given(batch, batch.blocks[0], m.dataset))
        assert found.shape == expected.shape
        mask = batch.blocks[0].query.mask
        torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
        assert not found.requires_grad


@pytest.mark.parametrize(
    ("name", "encoder", "pretrained"), [("cmml-film", "gru", "none"), ("cmml-softm", "mean", "als")]
)
def test_scenarios_have_a_graph_too(name, encoder, pretrained):
    m = cmml(name, encoder=encoder, user_ids=True, pretrained=pretrained, pretrained_width=6).float()
    for table in (m.embedding.user_vectors, m.embedding.item_vectors):
        if table is not None:
            torch.nn.init.normal_(table.weight)
    graph = exported(m, scenarios=True).module()
    for people in (4, 1):
        batch = scenarios(oracle.batch([[9, 4]], [[11, 30]]), people).to("cpu", torch.float32)
        block = batch.blocks[0]
        (expected,) = m.predict(m.adapt(batch), batch)
        mask = block.query.mask
        torch.testing.assert_close(graph(*given(batch, block, m.dataset))[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_users_without_fields_have_a_graph():
    dataset = oracle.dataset().without([f.name for f in oracle.USER_FIELDS])
    m: Any = CMMLFilm(options.CMMLFilm(embedding=3), dataset, oracle.items()).float()
    batch = oracle.batch([[4, 0]], [[3, 5]]).to("cpu", torch.float32)
    inputs = given(batch, batch.blocks[0], dataset)
    assert not inputs[0]
    mask = batch.blocks[0].query.mask
    (expected,) = m.predict(m.adapt(batch), batch)
    torch.testing.assert_close(exported(m).module()(*inputs)[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_the_graph_holds_none_of_the_package_s_code():
    program = exported(cmml("cmml-softm", encoder="gru").float())
    for node in program.graph.nodes:
        if node.op == "call_function":
            module = getattr(node.target, "__module__", "")
            assert module.startswith(("torch", "_operator")), node.target


def test_a_method_that_needs_gradients_is_refused():
    m: Any = oracle.build(MeLU, options.MeLU(embedding=3))
    with pytest.raises(UserError, match=r"melu adapts by gradients .* export one of cmml-linear cmml-sigmoid"):
        Served(m)


def test_rows_of_padding_may_hold_anything():
    m = cmml("cmml-sigmoid", encoder="gru").float()
    batch = oracle.batch([[4, 2]], [[3, 3]]).to("cpu", torch.float32)
    user, item, label, mask, candidate = given(batch, batch.blocks[0], m.dataset)
    graph = exported(m).module()
    wide = [torch.cat([x, torch.ones_like(x)], 1) for x in (item, label)]
    more = graph(user, *wide, torch.cat([mask, torch.zeros_like(mask)], 1), candidate)
    torch.testing.assert_close(graph(user, item, label, mask, candidate), more)
