"""CMML against the paper's equations (cmml_oracle.py): losses, gradients, what the encoders see, and its options."""

import json
from dataclasses import replace
from typing import Any

import oracle
import pytest
import scenarioworld as world
import torch
from cmml_oracle import RAGGED, SIZES, VARIANTS, act, cmml, features, pairwise_hinge, predictions, reference, scenarios
from torch import Tensor

from distmeta import cli
from distmeta import config as config_module
from distmeta.data.schema import Label as Range
from distmeta.errors import UserError
from distmeta.methods import heads, method_class, options
from distmeta.methods.cmml import CMML, CMMLSoftM, sized
from distmeta.tasks import Rows, TaskBatch

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"encoder": e}) for name in VARIANTS for e in ("mean", "max", "gru")),
    *((name, {"hybrid": h}) for name in VARIANTS for h in ("none", "mlp")),
    *((name, {"wide": True, "labels": "product"}) for name in VARIANTS),
    ("cmml-film", {"wide": True, "labels": "product", "encoder": "gru", "hybrid": "none", "detach": True}),
    ("cmml-linear", {"encoder": "lstm", "labels": "value"}),
    ("cmml-linear", {"encoder": "max", "encoder_hidden": (5, 4), "labels": "none", "hidden": (6,)}),
    ("cmml-film", {"encoder": "gru", "detach": True}),
    ("cmml-film", {"one_plus": True, "detach": True, "hyper_bias": 0.3}),
    ("cmml-film", {"positives": True}),
    ("cmml-sigmoid", {"positives": True, "encoder": "gru", "hybrid": "none"}),
    ("cmml-softm", {"module_layers": 3, "modules": 2}),
    ("cmml-softm", {"module_layers": 1, "encoder": "lstm"}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_losses_and_gradients_equal_the_equations(name, changes):
    m, batch = cmml(name, **changes), oracle.batch(*RAGGED)
    ours, theirs = m.loss(batch), reference(m, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for (key, a), b in zip(oracle.gradients(ours, m).items(), oracle.gradients(theirs, m).values(), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda s, key=key: f"{key}: {s}")


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_equal_the_equations_and_need_no_gradient(name):
    m, batch = cmml(name, encoder="gru"), oracle.batch(*RAGGED)
    with torch.inference_mode():
        scores = m.predict(m.adapt(batch), batch)
    for block, score in zip(batch, scores, strict=True):
        for b in range(len(block.task)):
            torch.testing.assert_close(score[b, block.query.mask[b]], predictions(m, batch, block, b).detach())


def contexts(m: CMML, batch: TaskBatch) -> Tensor:
    return torch.cat(m.adapt(batch))


def reordered(batch: TaskBatch, order: list[int]) -> TaskBatch:
    (block,) = batch.blocks
    s = block.support
    support = Rows(s.item[:, order], s.label[:, order], s.mask[:, order])
    return replace(batch, blocks=(replace(block, support=support),))


@pytest.mark.parametrize(("encoder", "ordered"), [("mean", False), ("max", False), ("gru", True), ("lstm", True)])
def test_order_is_seen_by_the_sequence_encoders_alone(encoder, ordered):
    m, batch = cmml("cmml-film", encoder=encoder, encoder_hidden=(32,)), oracle.batch([[5, 5, 5]], [[2, 2, 2]])
    moved = (contexts(m, batch) - contexts(m, reordered(batch, [1, 0, 2, 3, 4]))).abs().amax(1)
    assert bool((moved > 1e-6).all() if ordered else (moved < 1e-12).all())


@pytest.mark.parametrize("encoder", ["mean", "gru", "lstm"])
def test_every_support_row_reaches_the_context(encoder):
    """The authors' GRU of the user setting saw the last one only."""
    m, batch = cmml("cmml-film", encoder=encoder, encoder_hidden=(32,)), oracle.batch([[5, 5]], [[1, 1]])
    (block,) = batch.blocks
    for row in range(5):
        label = block.support.label.clone()
        label[:, row] = 6 - label[:, row] + (label[:, row] == 3)
        other = replace(batch, blocks=(replace(block, support=replace(block.support, label=label)),))
        assert bool(((contexts(m, batch) - contexts(m, other)).abs().amax(1) > 1e-9).all()), row


@pytest.mark.parametrize("encoder", ["mean", "max", "gru", "lstm"])
def test_padding_is_not_seen(encoder):
    """Rows beyond the mask may hold anything, and there may be more of them."""
    m, batch = cmml("cmml-film", encoder=encoder), oracle.batch([[4, 2, 0]], [[1, 1, 1]])
    (block,) = batch.blocks
    s = block.support
    junk = torch.full((3, 3), 7)
    wide = Rows(
        torch.cat([torch.where(s.mask, s.item, 9), junk], 1),
        torch.cat([torch.where(s.mask, s.label, -50.0), junk * 1e6], 1),
        torch.cat([s.mask, junk < 0], 1),
    )
    other = replace(batch, blocks=(replace(block, support=wide),))
    torch.testing.assert_close(contexts(m, batch), contexts(m, other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("encoder", ["mean", "max", "gru"])
def test_users_with_nothing_at_all_are_predicted_from_their_features(name, encoder):
    """The context is the learned one, also in a batch without a single support row; other features, other scores."""
    m = cmml(name, encoder=encoder)
    batch = oracle.batch([[0, 0, 0]], [[3, 3, 3]])
    assert batch.blocks[0].support.item.shape[1] in (0, 1)
    (block,) = batch.blocks
    none = replace(block.support, **{f: getattr(block.support, f)[:, :0] for f in ("item", "label", "mask")})
    for b in (batch, replace(batch, blocks=(replace(block, support=none),))):
        assert bool((contexts(m, b) == m.nothing).all())
        (scores,) = m.predict(m.adapt(b), b)
        assert bool(scores.isfinite().all())
        assert len(scores.unique()) > 3
        gradients = oracle.gradients(m.loss(b), m)  # type: ignore[arg-type]
        assert all(bool(g.isfinite().all()) for g in gradients.values())
        assert bool((gradients["nothing"] != 0).any())


def test_hidden_supports_are_drawn_by_task_and_epoch():
    batch = oracle.batch([[4] * 200], [[2] * 200])
    shown, hidden, some = (cmml("cmml-film", hidden_support=p) for p in (0.0, 1.0, 0.3))
    seen, blind = shown.loss(batch), hidden.loss(batch)

    def is_blind(epoch: int) -> Tensor:
        loss = some.loss(replace(batch, epoch=epoch))
        assert bool(((loss == seen) | (loss == blind)).all())
        return loss == blind

    assert 35 < int(is_blind(0).sum()) < 85
    assert bool((is_blind(0) == is_blind(0)).all())
    assert not bool((is_blind(0) == is_blind(1)).all())
    torch.testing.assert_close(contexts(hidden, batch), contexts(shown, batch), msg="new users keep their support")


def test_routes_are_probabilities_over_the_sources():
    m, batch = cmml("cmml-softm", module_layers=3), oracle.batch(*RAGGED)
    assert isinstance(m, CMMLSoftM)
    for block, routes in zip(batch, m.routes(m.adapt(batch), batch), strict=True):
        b, q = block.query.item.shape
        assert [tuple(r.shape) for r in routes] == [(b, q, 3, 3), (b, q, 3, 3), (b, q, 1, 3)]
        for r in routes:
            torch.testing.assert_close(r.sum(-1), torch.ones_like(r.sum(-1)))
            assert float(r[:2].std(-1).min()) > 0, "they differ where there is a support"
    same = cmml("cmml-softm", hybrid="none")
    assert isinstance(same, CMMLSoftM)
    assert [r.shape[1] for r in same.routes(same.adapt(batch), batch)[0]] == [1, 1], "one route a task, made once"


def test_one_plus_without_a_generated_change_is_the_backbone_alone():
    m: Any = cmml("cmml-film", one_plus=True)
    with torch.no_grad():
        for layer in m.backbone.hyper.heads:
            layer.weight.zero_()
    batch = oracle.batch(*RAGGED)
    block = batch.blocks[0]
    x = features(m, batch, block, 1, support=False)[0]
    plain = act(act(x @ m.backbone.layers[0].weight + m.backbone.layers[0].bias) @ m.backbone.layers[1].weight
                + m.backbone.layers[1].bias)  # fmt: skip
    expected = (plain @ m.backbone.last.weight + m.backbone.last.bias).squeeze(1)
    torch.testing.assert_close(m.predict(m.adapt(batch), batch)[0][1, :4], expected.detach())


# ---- losses

CLICKS = replace(oracle.dataset(), label=Range("click", 0.0, 1.0))


def test_hinge_by_hand():
    """Positives 2, .5; negatives 1.2, −1: gaps 1 − 2 + 1.2 = .2, 0; 1 − .5 + 1.2 = 1.7, 0: (.2 + 1.7) / 4."""
    output = torch.tensor([[2.0, 1.2, 0.5, -1.0, 9.0], [1.0, 3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    label = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    rows = Rows(torch.zeros(2, 5, dtype=torch.int64), label, mask)
    torch.testing.assert_close(heads.hinge(output, rows), torch.tensor([1.9 / 4, 0.0], dtype=torch.float64))
    output.requires_grad_()
    (gradient,) = torch.autograd.grad(heads.hinge(output, rows).sum(), output)
    torch.testing.assert_close(gradient, heads.hinge_delta(output.detach(), rows))
    torch.testing.assert_close(gradient[0], torch.tensor([-0.25, 0.5, -0.25, 0.0, 0.0], dtype=torch.float64))


def test_scores_of_the_hinge_keep_the_order_of_large_outputs():
    score = heads.chosen(CLICKS, "hinge").score(torch.tensor([14.0, 14.001, 20.0, 20.001, -20.0]))
    assert bool((score[:4].diff() > 0).all())
    assert 0 < float(score[4]) < float(score[3]) < 1


@pytest.mark.parametrize(("loss", "start"), [("auto", 0.0), ("cross-entropy", 0.0), ("hinge", 0.0)])
def test_clicks_are_learned_by_the_loss_asked_for(loss, start):
    torch.manual_seed(0)
    m: Any = method_class("cmml-film")(options.CMMLFilm(**SIZES, query_loss=loss), CLICKS, oracle.items()).double()
    g = torch.Generator().manual_seed(0)

    def clicked(rows: Rows) -> Rows:
        return replace(rows, label=torch.randint(2, rows.label.shape, generator=g).double() * rows.mask)

    ragged = oracle.batch([[5, 3, 0]], [[6, 4, 5]])
    blocks = [replace(b, support=clicked(b.support), query=clicked(b.query)) for b in ragged]
    batch = replace(ragged, blocks=tuple(blocks))
    (raw,) = (m.outputs(b, m.embedding.encode(batch), c) for b, c in zip(batch, m.adapt(batch), strict=True))
    expected = heads.hinge(raw, blocks[0].query) if loss == "hinge" else heads.cross_entropy(raw, blocks[0].query)
    torch.testing.assert_close(m.loss(batch), expected)
    assert bool((expected > 0).all())
    (scores,) = m.predict(m.adapt(batch), batch)
    torch.testing.assert_close(scores, torch.sigmoid(raw).detach())
    assert float(raw.detach().mean()) == pytest.approx(start, abs=1)


def test_an_untrained_method_predicts_about_the_middle_of_the_ratings():
    batch = oracle.batch(*RAGGED)
    for name in VARIANTS:
        m = cmml(name)
        assert all(bool(((s - 3).abs() < 1).all()) for s in m.predict(m.adapt(batch), batch)), name


@pytest.mark.parametrize(
    ("loss", "dataset", "words"),
    [
        ("hinge", oracle.dataset(), "--query-loss hinge: the labels are ratings; choose auto, squared or absolute"),
        ("absolute", CLICKS, "--query-loss absolute: the labels are clicks; choose auto, cross-entropy or hinge"),
    ],
)
def test_a_loss_that_the_labels_do_not_have_is_refused(loss, dataset, words):
    with pytest.raises(UserError, match=words):
        method_class("cmml-film")(options.CMMLFilm(**SIZES, query_loss=loss), dataset, oracle.items())


# ---- scenarios


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cmml-linear", {"encoder": "mean", "user_ids": True}),
        ("cmml-sigmoid", {"encoder": "gru", "hybrid": "mlp", "wide": True, "labels": "product"}),
        ("cmml-film", {"encoder": "max", "positives": True, "detach": True}),
        ("cmml-softm", {"encoder": "gru", "hybrid": "none", "positives": True, "user_ids": True}),
    ],
    ids=str,
)
def test_scenarios_equal_the_equations(name, changes):
    """Each row has its own user, and Eq. 4 compares those of one user, on a dataset of ratings."""
    m, batch = cmml(name, **changes), scenarios(oracle.batch([[5, 3, 0], [8]], [[6, 9, 3], [40]]))
    theirs = []
    for block in batch:
        for b in range(len(block.task)):
            labels = features(m, batch, block, b, support=False)[1]
            assert block.query.user is not None
            theirs.append(pairwise_hinge(predictions(m, batch, block, b), labels, block.query.user[b]))
    ours, expected = m.loss(batch), torch.stack(theirs)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    for (key, a), b in zip(oracle.gradients(ours, m).items(), oracle.gradients(expected, m).values(), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda s, key=key: f"{key}: {s}")
    block, (score, _) = batch.blocks[0], m.predict(m.adapt(batch), batch)
    torch.testing.assert_close(score[1], torch.sigmoid(predictions(m, batch, block, 1)).detach())


def test_scenarios_are_learned_by_command(tmp_path, capsys):
    world.make(tmp_path / "data", themes=False)
    flags = [x for k, v in world.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    flags += ["--embedding", "8", "--hidden", "16", "16", "--hyper", "16", "--batch-size", "8", "--lr", "0.01"]
    words = ["train", "cmml-film", "--data", str(tmp_path / "data"), "--protocol", "cmml-scenario", *flags]
    assert cli.main([*words, "--epochs", "6", "--item-ids", "--run", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_loss"] < 0.98 * lines[0]["train_loss"]
    assert lines[0]["train_loss"] < 1.2, "a hinge of equal scores is 1"
    assert "Recall@10 minus that of" in capsys.readouterr().out


def test_user_ids_are_for_scenarios():
    with pytest.raises(UserError, match="--user-ids: the tasks are users"):
        cmml("cmml-film", user_ids=True).adapt(oracle.batch(*RAGGED))


def test_a_method_that_needs_the_task_s_user_says_so_of_scenarios():
    m: Any = oracle.build(method_class("paml"), options.PAML(embedding=3))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the tasks are scenarios, which have no user of their own"):
        m.adapt(scenarios(oracle.batch(*RAGGED)))


# ---- options


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"encoder": "gri"}, "--encoder is 'gri' \\(did you mean gru\\?\\); choose one of auto mean max gru lstm"),
        ({"hidden_support": 1.5}, "--hidden-support must be at most 1"),
        ({"sizes": "users"}, "--sizes is 'users' \\(did you mean user\\?\\)"),
    ],
)
def test_misuse_of_options_is_one_sentence(flags, words):
    with pytest.raises(UserError, match=words):
        config_module.load(None, "cmml-film", flags)


def test_sizes_of_the_paper():
    """§7.2.2, §7.2.1 and §4.1.4; what is given goes before them."""
    user, scenario, text = (sized(options.CMMLSoftM(sizes=s)) for s in ("user", "scenario", "text"))
    assert isinstance(user, options.CMMLSoftM)
    assert isinstance(scenario, options.CMMLSoftM)
    assert (user.encoder, user.encoder_hidden, user.hidden, user.hyper) == ("mean", (64,), (64, 64), 256)
    assert (scenario.encoder, scenario.units, scenario.encoder_hidden, scenario.hyper) == ("gru", 256, (256,), 64)
    assert (text.encoder, text.units, text.encoder_hidden, text.hidden) == ("gru", 128, (128, 128), (64, 64, 64))
    assert (user.module_layers, scenario.module_layers) == (2, 3)
    own = sized(options.CMML(sizes="text", encoder="mean", hidden=(8,), hyper=3))
    assert (own.encoder, own.hidden, own.hyper, own.encoder_hidden) == ("mean", (8,), 3, (128, 128))


def test_help_says_the_sizes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "cmml-softm", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "--sizes user|scenario|text",
        "mean encoder 64, backbone 64 64",
        "gru of 128 and 128 128",
        "--modules",
    ):
        assert words in out, words
