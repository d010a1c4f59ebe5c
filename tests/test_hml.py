"""HML against per-task loops of plain autograd; assignment without a leak; surveys, new starts, planted clusters."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import polars as pl
import pytest
import tiny
import torch
from torch import Tensor

from distmeta import config as config_module
from distmeta.data.loader import Loader, read_items
from distmeta.data.protocols import KINDS
from distmeta.data.sources import synthetic
from distmeta.errors import UserError
from distmeta.exchange import Exchange
from distmeta.methods import options
from distmeta.methods.hml import HML
from distmeta.methods.melu import MeLU
from distmeta.parallel import checkpoint, clusters, trainer
from distmeta.parallel.clusters import Survey, k_means
from distmeta.parallel.update import MetaUpdate, build_method
from distmeta.parallel.validation import read_metrics
from distmeta.storage import Location
from distmeta.tasks import TaskBatch

SMALL: dict[str, Any] = {"embedding": 3, "hidden": (6, 5), "local_lr": 0.03, "item_ids": True, "steps": 2}
PAPER: dict[str, Any] = {"warm_epochs": 0, "htc": "query", "htc_steps": 1}
RAGGED = ([[5, 3, 1, 0, 6], [7, 6, 4]], [[2, 4, 3, 2, 4], [1, 5, 5]])


def hml(**changes: Any) -> HML:
    return oracle.build(HML, options.HML(**{**PAPER, **SMALL, **changes}))  # type: ignore[arg-type]


def train_options(**flags: Any) -> config_module.TrainOptions:
    return config_module.build(config_module.TrainOptions, flags, "test")


class Apart:
    """K ordinary MeLUs with the parameters of `hml`, or those of its decision where the embeddings are shared."""

    def __init__(self, own: str, clusters: int = 3) -> None:
        torch.manual_seed(0)
        o = options.MeLU(**SMALL)
        self.models = [MeLU(o, oracle.dataset(), oracle.items()).double() for _ in range(clusters)]
        self.first = self.models[0].embedding
        self.shared = own == "decision"
        for m in self.models[1:]:
            if self.shared:
                m.embedding = self.first

    def row(self, k: int) -> list[Tensor]:
        """The parameters that initialisation k has of its own, in the order of the stack."""
        m = self.models[k]
        layers = [p for layer in m.decision for p in (layer.weight, layer.bias)]
        return [m.log_rate, *([] if self.shared else m.embedding.parameters()), *layers]

    def stack(self) -> Tensor:
        return torch.stack([torch.cat([p.detach().flatten() for p in self.row(k)]) for k in range(len(self.models))])

    def losses(self, batch: TaskBatch, steps: int) -> Tensor:
        """[K, B]."""
        for m in self.models:
            m.options = replace(m.options, steps=steps)
        return torch.stack([oracle.losses(m, batch) for m in self.models])


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("own", ["decision", "all"])
def test_a_meta_update_equals_plain_loops_over_hard_clusters(own, summed):
    """float64, 1e-9: means (sums) by cluster, shared embeddings by all tasks; the cluster nobody takes stays."""
    o = train_options(lr=0.1, weight_decay=0.1, clip=0.0)
    method, plain = hml(own=own, sum_clusters=summed), Apart(own)
    with torch.no_grad():  # the third predicts 1000: nobody's
        method.initial[2, -1] = plain.models[2].decision.output_bias[0] = 1000.0
    torch.testing.assert_close(method.initial.detach(), plain.stack(), rtol=0, atol=0)
    update = MetaUpdate(method, o, Exchange(), steps=9)
    adam = torch.optim.AdamW(
        [{"params": plain.row(k)} for k in range(3)] + ([{"params": plain.first.parameters()}] if plain.shared else []),
        lr=0.1,
        weight_decay=0.1,
    )
    for n in range(2):
        batch = oracle.batch(*RAGGED, seed=n)
        wanted = plain.losses(batch, method.options.htc_steps).argmin(0)
        before = method.initial.detach().clone()
        update.local(batch)
        losses, group = method.grouped_loss(batch)
        theirs = plain.losses(batch, 2)[wanted, torch.arange(len(batch))]
        torch.testing.assert_close(losses, theirs, rtol=1e-9, atol=1e-9)
        assert torch.equal(group, wanted)
        adam.zero_grad()
        theirs.sum().backward()
        for k in range(3):
            count = int((wanted == k).sum())
            for p in plain.row(k):
                p.grad = None if not count or p.grad is None else p.grad / (1 if summed else count)
        for p in plain.first.parameters() if plain.shared else []:
            assert p.grad is not None
            p.grad /= len(batch)
        adam.step()
        update.apply(batch, n)
        assert update.counts == wanted.bincount(minlength=3).tolist()
        assert update.counts[0] > 0 < update.counts[1]
        assert update.counts[2] == 0
        torch.testing.assert_close(method.initial.detach(), plain.stack(), rtol=1e-9, atol=1e-9)
        assert torch.equal(method.initial[2], before[2])
        if plain.shared:
            for ours, p in zip(method.embedding.parameters(), plain.first.parameters(), strict=True):
                torch.testing.assert_close(ours, p, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("learn_rates", [True, False])
@pytest.mark.parametrize("own", ["decision", "all"])
def test_one_initialisation_is_melu(own, learn_rates):
    o = train_options(lr=0.05, clip=0.0)
    ours = hml(clusters=1, own=own, learn_rates=learn_rates)
    melu = oracle.build(MeLU, options.MeLU(**SMALL, learn_rates=learn_rates))
    updates = [MetaUpdate(m, o, Exchange(), steps=9) for m in (ours, melu)]
    for n in range(3):
        batch = oracle.batch(*RAGGED, seed=n)
        for update in updates:
            update.local(batch)
        assert updates[0].apply(batch, n) == updates[1].apply(batch, n)
    batch = oracle.batch(*RAGGED, seed=9)
    for a, b in zip(ours.predict(ours.adapt(batch), batch), melu.predict(melu.adapt(batch), batch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("htc_steps", [0, 1])
def test_a_task_s_cluster_comes_of_its_support_alone(htc_steps):
    """Other query items, labels and masks: the same clusters and states, bit for bit. Other support: other clusters."""
    method = hml(steps=1, local_lr=0.2, htc_steps=htc_steps)
    batch = oracle.batch([[9, 8, 7, 6] * 8], [[3, 2, 4, 1] * 8])
    (block,) = batch.blocks
    g = torch.Generator().manual_seed(7)
    other = replace(
        block.query,
        item=torch.randint(oracle.ITEMS, block.query.item.shape, generator=g),
        label=torch.full_like(block.query.label, 1e6),
        mask=~block.query.mask,
    )
    changed = replace(batch, blocks=(replace(block, query=other),))
    (a,), (b,) = method.adapt(batch), method.adapt(changed)
    assert torch.equal(a.cluster, b.cluster)
    for x, y in zip(method.predict([a], batch), method.predict([b], batch), strict=True):
        assert torch.equal(x, y)
    assert len(a.cluster.unique()) > 1
    assert not torch.equal(a.cluster, method.clusters(batch)), "the query assigns the same: the test shows too little"
    relabelled = replace(block.support, label=6 - block.support.label)
    (c,) = method.adapt(replace(batch, blocks=(replace(block, support=relabelled),)))
    assert not torch.equal(a.cluster, c.cluster)


def test_assignment_is_the_mean_over_the_draws_and_depends_on_the_task_alone():
    method = hml(draws=4)
    batch = oracle.batch([[9, 5, 2, 1, 0]], [[3, 2, 4, 1, 2]])
    (block,) = batch.blocks
    method.sizes.copy_(torch.tensor([3, 8, 5]))
    held = method._held_out(block)
    assert held.sum(2)[0].tolist() == [2, 1, 1, 1, 0]
    assert not (held & ~block.support.mask).any()
    assert len({tuple(h.flatten().tolist()) for h in held}) > 1
    (state,) = method.adapt(batch)
    assert state.cluster[3:].tolist() == [1, 1], "fewer than two rows of support: the largest cluster"
    for b in range(3):
        total = torch.zeros(3, dtype=torch.float64)
        for draw in held:
            rows = block.take(torch.tensor([b]))
            split = [replace(rows.support, mask=rows.support.mask & m) for m in (~draw[b : b + 1], draw[b : b + 1])]
            alone = replace(batch, blocks=(replace(rows, support=split[0], query=split[1]),))
            total += torch.stack([start.loss(alone.blocks[0], 1) for start in method._bound(alone)], 1)[0].detach()
        assert state.cluster[b] == total.argmin()
        (one,) = method.adapt(replace(batch, blocks=(block.take(torch.tensor([b])),)))
        assert one.cluster[0] == state.cluster[b]
    assert method.facts([state], batch)["cluster"][0] is state.cluster


@pytest.mark.parametrize("steps", [0, 1])
def test_training_tasks_may_be_assigned_as_new_ones_are(steps):
    method = hml(htc="support", htc_steps=steps, local_lr=0.2)
    batch = oracle.batch([[9, 8, 7, 6, 1, 0] * 4], [[3, 2, 4, 1, 2, 2] * 4])
    (state,) = method.adapt(batch)
    losses, group = method.grouped_loss(batch)
    assert torch.equal(group, state.cluster)
    assert torch.equal(method.clusters(batch), state.cluster)
    assert len(group.unique()) > 1
    blank = replace(batch.blocks[0].query, label=torch.zeros_like(batch.blocks[0].query.label))
    others, same = method.grouped_loss(replace(batch, blocks=(replace(batch.blocks[0], query=blank),)))
    assert torch.equal(group, same)
    assert not torch.equal(losses, others)
    louder = replace(batch.blocks[0].support, label=batch.blocks[0].support.label + 3)
    (moved,) = method.adapt(replace(batch, blocks=(replace(batch.blocks[0], support=louder),)))
    assert torch.equal(moved.cluster, group) == (steps == 0), "before any step the user's level counts for nothing"


# ---- surveys


class Script:
    """A survey of tasks whose clusters a test writes down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Location, **flags: Any) -> None:
        config, dataset, table = tiny.setting(place, "hml", warm_epochs=0, embedding=4, hidden=(6,), **flags)
        method = build_method(config, dataset, read_items(place, dataset), torch.device("cpu"))
        assert isinstance(method, HML)
        self.method = method
        self.loader = Loader(table, dataset, "train", 16)
        self.update = MetaUpdate(self.method, config.train, Exchange(), self.loader.steps)
        self.survey = Survey(self.method, self.update, self.loader, Exchange(), torch.device("cpu"))
        monkeypatch.setattr(self.method, "clusters", self.clusters)
        self.cluster = np.zeros(0, np.int64)

    def clusters(self, batch: TaskBatch) -> Tensor:
        tasks = torch.cat([block.task for block in batch])
        return torch.from_numpy(self.cluster[np.searchsorted(np.sort(self.tasks()), tasks.numpy())])

    def tasks(self) -> np.ndarray:
        return self.loader.tasks()["task"].to_numpy()


def test_surveys_count_churn_and_settle(monkeypatch, small):
    script = Script(monkeypatch, small, survey_epochs=2, dead_share=0.0, until_settled=True)
    n = len(script.tasks())
    script.cluster = np.arange(n) % 3
    assert script.survey.after(0) is None
    first = script.survey.after(1)
    assert first
    assert first == {"sizes": np.bincount(script.cluster).tolist(), "churn": None, "reseeded": []}
    assert script.method.sizes.tolist() == first["sizes"]
    moved = np.array([0, 5, 6])
    script.cluster[moved] = (script.cluster[moved] + 1) % 3
    second = script.survey.after(3)
    assert second
    assert second["churn"] == pytest.approx(3 / n)
    third = script.survey.after(5)
    assert third
    assert third["churn"] == 0
    assert not script.survey.settled
    kept = script.survey.snapshot()
    script.survey.after(7)
    assert script.survey.settled
    again = Survey(script.method, script.update, script.loader, Exchange(), torch.device("cpu"))
    again.restore(kept)
    assert not again.settled
    again.after(7)
    assert again.settled


def test_a_dead_initialisation_begins_anew_from_the_largest_cluster(monkeypatch, small):
    """Its value is near the largest's and its moments are 0; all others are untouched."""
    script = Script(monkeypatch, small)
    n = len(script.tasks())
    for step, batch in enumerate(script.loader.epoch(0)):
        script.update.local(batch)
        script.update.apply(batch, step)
    before, moments = script.method.initial.detach().clone(), {k: v.clone() for k, v in script.update.moments().items()}
    script.cluster = np.where(np.arange(n) < n // 4, 0, 2)
    line = script.survey.after(0)
    assert line
    assert line["reseeded"] == [1]
    now = script.method.initial.detach()
    assert torch.equal(now[[0, 2]], before[[0, 2]])
    apart, far = (now[1] - before[2]).norm(), (before[0] - before[2]).norm()
    assert 0 < apart < far
    for name, value in script.update.moments().items():
        if name.startswith("initial.1."):
            assert not value.any()
        else:
            assert torch.equal(value, moments[name]), name


def test_k_means_finds_groups_and_answers_points_that_coincide():
    g = np.random.default_rng(0)
    truth = g.integers(4, size=300)
    points = 5 * np.eye(4)[truth] + 0.3 * g.normal(size=(300, 4))
    assert rand(k_means(points, 4, 0), truth) == 1
    assert k_means(np.ones((7, 3)), 3, 0).tolist() == [0] * 7
    assert len(k_means(np.zeros((0, 3)), 3, 0)) == 0


# ---- whole runs


def rand(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index (Hubert & Arabie, 1985)."""

    def pairs(x: np.ndarray) -> float:
        return float((x * (x - 1) / 2).sum())

    a, b = (np.unique(x, return_inverse=True)[1] for x in (a, b))
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    rows, columns, n = pairs(table.sum(1)), pairs(table.sum(0)), len(a)
    expected = rows * columns / (n * (n - 1) / 2)
    return (pairs(table) - expected) / ((rows + columns) / 2 - expected)


def run(
    where: Path, place: Location, world: int = 1, **flags: Any
) -> tuple[trainer.Outcome, dict[str, Tensor], dict[str, Tensor]]:
    """Train; the outcome, and the last checkpoint's parameters and state."""
    config, dataset, table = tiny.setting(place, "hml", **flags)
    folder = Location.of(where).make_dir()

    def work(exchange: Exchange) -> trainer.Outcome:
        return trainer.train(config, folder, dataset, place, table, exchange, lambda _: None)

    outcome = tiny.together(world, work)[0].result()
    found = checkpoint.read(folder, outcome.steps)
    return outcome, checkpoint.load(folder, found, "params"), checkpoint.load(folder, found, "state")


def test_planted_clusters_are_recovered(tmp_path):
    """K = 3 by taste, which no field tells: adjusted Rand >= 0.9 of users never seen, by their support alone."""
    place = Location.of(tmp_path / "planted")
    dataset = synthetic.generate(place, users=600, items=120, preference_clusters=3, noise=0.3, personal=0.05)
    outcome, params, _ = run(
        tmp_path / "run", place, epochs=7, warm_epochs=4, embedding=16, hidden=(32, 32), lr=5e-3, batch_size=32
    )
    config, _, table = tiny.setting(place, "hml", embedding=16, hidden=(32, 32))
    method = build_method(config, dataset, read_items(place, dataset), torch.device("cpu"))
    method.load_state_dict(params)
    tasks, found = [], []
    for batch in Loader(table, dataset, "test", 64).evaluation():
        state = method.adapt(batch)
        found += method.facts(state, batch)["cluster"]
        tasks += [block.task for block in batch]
    users = pl.concat([pl.read_parquet(f) for f in sorted((tmp_path / "planted/users").glob("*.parquet"))]).sort("user")
    truth = users["planted_cluster"].to_numpy()[torch.cat(tasks).numpy() // KINDS]
    assert rand(torch.cat(found).numpy(), truth) >= 0.9
    lines = read_metrics(Location.of(tmp_path / "run"))
    assert ["clusters" in line for line in lines] == [False] * 3 + [True] * (outcome.epochs - 3)
    assert lines[3]["clusters"]["churn"] is None
    assert lines[3]["clusters"]["reseeded"] == [0, 1, 2]
    for line in lines[4:]:
        assert sum(line["clusters"]["sizes"]) == sum(table.sizes("train"))
        assert line["clusters"]["churn"] < 0.3
    assert outcome.best_step > 3 * lines[0]["step"], "the common solution is not the method's"


FAST: dict[str, Any] = {"embedding": 4, "hidden": (8,), "warm_epochs": 1, "steps": 2, "batch_size": 40, "lr": 0.01}


def test_stopped_anywhere_and_gone_on_with_ends_the_same(tmp_path, small):
    """Before the K part, as they do, and after: parameters, moments and the survey's state, bit for bit."""

    def tensors(name: str) -> dict[str, str]:
        found = sorted((tmp_path / name / "checkpoints").glob("step-*"))[-1]
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in found.glob("*.safetensors")}

    whole = run(tmp_path / "whole", small, epochs=4, **FAST)
    for epochs in (1, 2, 4):
        run(tmp_path / "parts", small, epochs=epochs, **FAST)
    assert tensors("parts") == tensors("whole")
    assert whole[2]["clusters.task"].tolist() == sorted(whole[2]["clusters.task"].tolist())
    lines = [read_metrics(Location.of(tmp_path / name)) for name in ("whole", "parts")]
    assert [line["clusters"] for line in lines[0]] == [line["clusters"] for line in lines[1]]


def test_workers_part_and_survey_as_one_does(tmp_path, small, monkeypatch):
    """float64 1e-9; a new start for a dead initialisation included."""
    move, after = TaskBatch.to, Survey.after
    monkeypatch.setattr(TaskBatch, "to", lambda self, device, dtype=None: move(self, device, torch.float64))
    monkeypatch.setattr(trainer, "build_method", lambda *given: build_method(*given).double())

    def killing(self: Survey, epoch: int) -> dict[str, Any] | None:
        if epoch == 2:
            with torch.no_grad():
                self.method.initial[1] = 100.0
        return after(self, epoch)

    monkeypatch.setattr(clusters.Survey, "after", killing)
    ends = [run(tmp_path / str(world), small, world, epochs=4, **FAST) for world in (1, 3)]
    lines = [read_metrics(Location.of(tmp_path / str(world))) for world in (1, 3)]
    assert [line["clusters"] for line in lines[0]] == [line["clusters"] for line in lines[1]]
    assert 1 in lines[0][2]["clusters"]["reseeded"]
    for part in (1, 2):
        torch.testing.assert_close(ends[0][part], ends[1][part], rtol=1e-9, atol=1e-9)


def test_training_ends_when_the_clusters_stand_still(tmp_path, small, monkeypatch):
    monkeypatch.setattr(clusters, "SETTLED", 1.1)
    flags = {**FAST, "dead_share": 0.0}
    outcome, _, _ = run(tmp_path / "settled", small, epochs=8, until_settled=True, **flags)
    assert (outcome.ended, outcome.epochs) == ("converged", 3)
    outcome, _, _ = run(tmp_path / "on", small, epochs=5, **flags)
    assert (outcome.ended, outcome.epochs) == ("epochs", 5)


def test_more_initialisations_than_tasks_are_refused(tmp_path, small):
    with pytest.raises(UserError, match=r"--clusters 1000: there are 1\d\d training tasks; ask for fewer"):
        run(tmp_path, small, clusters=1000, embedding=1, hidden=(1,))
