"""Vectors that are learned beforehand: against dense solves and autograd, and from a command to its checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import scenarioworld as world
import tiny
import torch
from cmml_oracle import cmml, scenarios
from numpy.typing import NDArray

from distmeta import cli, draws
from distmeta.commands import train
from distmeta.data import tasktable
from distmeta.data.protocols import QUERY
from distmeta.data.scenarios import training_pairs, unasked_pairs
from distmeta.data.schema import Dataset
from distmeta.methods import pretrained
from distmeta.methods.pretrained import Pairs, als, ascent, learn
from distmeta.parallel import checkpoint, trainer
from distmeta.storage import Location

SIZES = ["--embedding", "4", "--hidden", "8", "8", "--hyper", "8", "--encoder-hidden", "8", "--pretrained-width", "5"]
FLAGS = [x for k, v in world.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]
FLAGS += ["--protocol", "cmml-scenario", "--batch-size", "4", "--lr", "0.01", "--threads", "1", *SIZES]


def drawn(users: int, items: int, share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (user, item) of numbers with gaps, by (user, item)."""
    chance = draws.uniform(np.arange(users)[:, None], np.arange(items), purpose="test/pairs")
    user, item = np.nonzero(chance < share)
    return 3 * user + 1, 2 * item


def test_als_is_alternating_dense_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hu et al., Eq. 4 and 5, with every pair's confidence written out."""
    monkeypatch.setattr(pretrained, "SWEEPS", 3)
    pairs = Pairs.of(*drawn(40, 25, 0.2))
    p = torch.zeros(len(pairs.users), len(pairs.items), dtype=torch.float64)
    p[pairs.user, pairs.item] = 1
    c, eye = 1 + pretrained.ALPHA * p, pretrained.PENALTY * torch.eye(4, dtype=torch.float64)
    start = draws.normal(pretrained.SEED, np.arange(len(p.T))[:, None], np.arange(4), purpose="pretrained/als")
    y, x = torch.from_numpy(start) / 2, torch.zeros(0)
    for _ in range(pretrained.SWEEPS):
        x = torch.stack([torch.linalg.solve(y.T @ c[u].diag() @ y + eye, y.T @ (c[u] * p[u])) for u in range(len(p))])
        y = torch.stack(
            [torch.linalg.solve(x.T @ c[:, i].diag() @ x + eye, x.T @ (c[:, i] * p[:, i])) for i in range(len(p.T))]
        )
    *_, (done, ours) = als(pairs, 4)
    assert done == 1
    torch.testing.assert_close(ours, (x, y), rtol=1e-10, atol=1e-12)


def test_bpr_ascends_its_objective() -> None:
    w, h, other = (torch.randn(7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sizes = sum(v.square().sum() for v in (w, h, other))
    value = torch.nn.functional.logsigmoid((w * h - w * other).sum(1)).sum() - pretrained.DECAY / 2 * sizes
    torch.testing.assert_close(ascent(w, h, other), torch.autograd.grad(value, (w, h, other)))


@pytest.mark.parametrize("kind", ["als", "bpr"])
def test_planted_tastes_are_found(kind: str) -> None:
    """Users like what their two numbers point at: pairs left out rank above those never taken."""
    users, items = 150, 80
    taste, kind_of = (draws.normal(np.arange(n)[:, None], [0, 1], purpose=f"test/{n}") for n in (users, items))
    liked = np.asarray(taste @ kind_of.T > 0.8)
    held = liked & (draws.uniform(np.arange(users)[:, None], np.arange(items), purpose="test/held") < 0.2)
    shown = liked & ~held
    *_, (_, (x, y)) = pretrained.LEARN[kind](Pairs.of(*np.nonzero(shown)), 4)
    score = np.zeros((users, items))
    some_users, some_items = (np.unique(a) for a in np.nonzero(shown))
    score[np.ix_(some_users, some_items)] = (x @ y.T).numpy()
    aucs = [(score[u, held[u]][:, None] > score[u, ~liked[u]]).mean() for u in some_users if held[u].any()]
    assert np.mean(aucs) > 0.85


def test_who_took_everything_and_who_took_nothing() -> None:
    """The first teaches BPR nothing and breaks nothing; the second is an average user, and such an item 0."""
    user, item = np.r_[np.repeat(2, 4), 5, 5, 7], np.r_[0, 1, 3, 4, 0, 3, 4]
    for kind in ("als", "bpr"):
        users, items = torch.full((9, 3), 7.0), torch.full((6, 3), 7.0)
        said = list(learn(kind, user, item, (users, items)))
        assert said[-1] == f"{kind} vectors of 3 users and 4 items from 7 positives: 100%"
        known = [2, 5, 7]
        assert bool((users[[0, 1, 8]] == users[0]).all())
        torch.testing.assert_close(users[0], users[known].mean(0))
        assert bool((items[[2, 5]] == 0).all())
        torch.testing.assert_close(
            torch.stack((users[known].square().mean(), items.square().sum() / 12)), torch.ones(2)
        )


def test_vectors_are_features_as_ids_are() -> None:
    """With the tables of a method that learns ids, the loss is that method's, and so is every gradient."""
    ids = cmml("cmml-film", user_ids=True, item_ids=True)
    vectors = cmml("cmml-film", item_ids=False, pretrained="als", pretrained_width=3, pretrained_frozen=False)
    places = {"user_tables.3": "user_vectors", "item_tables.3": "item_vectors"}
    names = {n: n for n, _ in ids.named_parameters()}
    names |= {f"embedding.{a}.weight": f"embedding.{b}.weight" for a, b in places.items()}
    batch = scenarios(oracle.batch([[5, 3, 0]], [[4, 6, 2]]))
    with torch.no_grad():
        for theirs, ours in names.items():
            vectors.get_parameter(ours).copy_(ids.get_parameter(theirs))
    losses = vectors.loss(batch), ids.loss(batch)
    torch.testing.assert_close(*losses)
    found = [oracle.gradients(loss, m) for loss, m in zip(losses, (vectors, ids), strict=True)]  # type: ignore[arg-type]
    for theirs, ours in names.items():
        torch.testing.assert_close(found[0][ours], found[1][theirs])
    assert all(bool((found[0][f"embedding.{name}.weight"] != 0).any()) for name in places.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Location:
    where = tmp_path_factory.mktemp("pretrained") / "data"
    world.make(where, themes=False)
    return Location.of(where)


def test_what_is_asked_about_is_not_told(data: Location) -> None:
    table, dataset = tasktable.make(data, "cmml-scenario", 0, world.SMALL), Dataset.open(data)
    asked = {
        (u, i)
        for split in ("valid", "test")
        for task in world.stored(table, split).values()
        for u, i, role in zip(task["user"], task["item"], task["role"], strict=True)
        if role == QUERY
    }
    pairs = [set(zip(*(a.tolist() for a in f(table, dataset)), strict=True)) for f in (training_pairs, unasked_pairs)]
    assert asked & pairs[0]
    assert pairs[1] == pairs[0] - asked


def trained(run: Path, data: Location, *flags: str, workers: int = 1) -> dict[int, dict[str, Any]]:
    """The parameters of each of the run's checkpoints, by step."""
    words = ["cmml-film", "--data", data.path, *FLAGS, "--run", str(run), *flags]
    config, where = train.parse(words), Location.of(run).make_dir()
    table, dataset = tasktable.make(data, "cmml-scenario", 0, world.SMALL), Dataset.open(data)
    for done in tiny.together(workers, lambda e: trainer.train(config, where, dataset, data, table, e, lambda _: None)):
        done.result()
    return {n: checkpoint.load(where, checkpoint.read(where, n), "params") for n in checkpoint.complete(where)}


@pytest.mark.parametrize("kind", ["als", "bpr"])
def test_frozen_vectors_stay_and_others_are_learned_on(kind: str, tmp_path: Path, data: Location) -> None:
    user, item = unasked_pairs(tasktable.make(data, "cmml-scenario", 0, world.SMALL), Dataset.open(data))
    tables = torch.zeros(world.USERS, 5), torch.zeros(world.ITEMS, 5)
    list(learn(kind, user, item, tables))
    names = [f"embedding.{side}_vectors.weight" for side in ("user", "item")]
    for flag, stays in (("--pretrained-frozen", True), ("--no-pretrained-frozen", False)):
        first, *_, last = trained(tmp_path / flag, data, "--pretrained", kind, flag, "--epochs", "1").values()
        for name, table in zip(names, tables, strict=True):
            torch.testing.assert_close(first[name], table, rtol=0, atol=0)
            assert bool((last[name] == table).all()) == stays
        assert not bool((first["nothing"] == last["nothing"]).all())


def test_vectors_are_the_same_for_any_workers_and_after_a_restart(
    tmp_path: Path, data: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--pretrained", "als", "--epochs", "1"]
    one, two = (trained(tmp_path / str(n), data, *flags, workers=n) for n in (1, 2))
    assert min(one) == min(two) == 0
    for name, value in one[0].items():
        torch.testing.assert_close(two[0][name], value, rtol=0, atol=0)
    last = max(one)
    (Location.of(tmp_path / "1") / f"checkpoints/step-{last:09d}/checkpoint.json").remove()
    monkeypatch.setattr(pretrained, "LEARN", {})  # whoever begins anew fails
    again = trained(tmp_path / "1", data, *flags)
    assert all(bool((again[last][name] == value).all()) for name, value in one[last].items())


def test_pretrained_by_command(tmp_path: Path, data: Location, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "cmml-softm", "--data", data.path, *FLAGS, "--pretrained", "bpr", "--run", str(tmp_path / "run")]
    assert cli.main([*words, "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert "bpr vectors of 40 users and " in said
    assert "Recall@10 minus that of" in said
    words = ["train", "cmml-film", "--data", data.path, "--pretrained", "als", "--run", str(tmp_path / "users")]
    assert cli.main(words) == 2
    assert "--pretrained: the vectors are of scenarios' users and items; give --protocol" in capsys.readouterr().err
