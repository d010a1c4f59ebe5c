"""Ranked lists of scenarios: Recall@N against loops, the popularity floors, and what is told of them."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import scenarioworld as world
import torch
from torch import Tensor

from distmeta.commands.evaluate import terminal_table
from distmeta.data import tasktable
from distmeta.data.loader import Loader
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import Diverged
from distmeta.evaluation import evaluate as evaluation
from distmeta.evaluation import lists, report
from distmeta.exchange import Exchange
from distmeta.methods.base import Method
from distmeta.parallel.validation import validate
from distmeta.storage import Location
from distmeta.tasks import Rows, TaskBatch, TaskBlock

CUTOFFS = (10, 20, 50, 100)


class Rule(Method):
    """Scores (3 · user + 7 · item) mod 11 − 20: many ties, all below 0, so that clipping to 0 … 1 would show."""

    name = "rule"

    def __init__(self, dataset: Dataset, items: Any = None) -> None:
        super().__init__(None, dataset, items or {})
        self.shift = torch.nn.Parameter(torch.tensor(-20.0))

    def adapt(self, batch: TaskBatch) -> list[None]:
        return [None for _ in batch]

    def predict(self, state: list[None], batch: TaskBatch) -> list[Tensor]:
        assert batch.users is not None
        found = []
        for block in batch:
            assert block.query.user is not None
            raw = 3 * batch.users[block.query.user] + 7 * batch.items[block.query.item]
            found.append(raw % 11 + self.shift)
        return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Location:
    where = tmp_path_factory.mktemp("lists") / "data"
    world.make(where, themes=False)
    return Location.of(where)


@pytest.fixture(scope="module")
def table(data: Location) -> TaskTable:
    return tasktable.make(data, "cmml-scenario", 0, world.SMALL)


@pytest.fixture(scope="module")
def dataset(data: Location, table: TaskTable) -> Dataset:
    seen = table.seen(Dataset.open(data))
    assert (seen.label.kind, seen.label.minimum, seen.label.maximum) == ("click", 0.0, 1.0)
    return seen


def expected(table: TaskTable, score: Any, split: str = "test") -> dict[tuple[int, int], list[float]]:
    """(task, user) -> Recall@N, by loops; a tie across the cut counts by the share of its places that are in."""
    found = {}
    for task, r in world.stored(table, split).items():
        stored = list(zip(r["user"], r["item"], r["role"], strict=True))
        items = {i for _, i, _ in stored}
        for user in {u for u, _, role in stored if role == 1}:
            taken = {i for u, i, role in stored if role == 1 and u == user}
            of = {i: score(task, user, i) for i in items}
            recalls = []
            for n in CUTOFFS:
                hits = 0.0
                for i in taken:
                    above = sum(s > of[i] for s in of.values())
                    tied = sum(s == of[i] for s in of.values())
                    hits += min(max((n - above) / tied, 0), 1)
                recalls.append(hits / len(taken))
            found[task, user] = recalls
    return found


def rows(frame: pl.DataFrame) -> dict[tuple[int, int], list[float]]:
    return {(r["task"], r["user"]): [r[f"recall@{n}"] for n in CUTOFFS] for r in frame.to_dicts()}


def same(found: dict[Any, list[float]], wanted: dict[Any, list[float]]) -> None:
    assert found.keys() == wanted.keys()
    for key, recalls in wanted.items():
        assert found[key] == pytest.approx(recalls, abs=1e-12)


def test_recall_is_what_loops_find(table: TaskTable, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every list once, whatever the batch and block; unclipped, ties shared; then the mean over lists."""
    wanted = expected(table, lambda task, user, item: (3 * user + 7 * item) % 11)
    assert len({v[0] for v in wanted.values()}) > 5
    for size in (1 << 14, 45):
        monkeypatch.setattr("distmeta.data.scenarios.LIST_ROWS", size)
        measured = evaluation.evaluate(Rule(dataset), table, dataset)
        same(rows(measured.tasks), wanted)
    summary = evaluation.cohorts(measured)["all"].summary
    assert summary["n_lists"] == len(wanted)
    assert summary["n_tasks"] == table.counts["test"]["tasks"]
    for k, n in enumerate(CUTOFFS):
        assert summary[f"recall@{n}"] == pytest.approx(sum(v[k] for v in wanted.values()) / len(wanted))
    by_kind = {c for c in evaluation.cohorts(measured) if c != "all"}
    assert by_kind == set(table.cohorts["test"])
    assert by_kind <= {"genres", "genres+decade", "genres+genres"}
    again = type(measured).from_ipc(measured.to_ipc())
    assert again.tasks.equals(measured.tasks)


def test_padded_blocks_of_several_tasks_are_cut_right(table: TaskTable, dataset: Dataset) -> None:
    """Tasks of other lengths beside each other in one block: the same lists as one by one."""
    batch = next(Loader(table, dataset, "test", 4).evaluation())
    score = Rule(dataset)
    apart = lists.frame(lambda b: score.predict([], b), [batch])
    assert batch.blocks[0].query.user is not None
    widest = max(b.query.item.shape[1] for b in batch)

    def wide(side: Any, width: int) -> Any:
        grown = {f.name: getattr(side, f.name) for f in dataclasses.fields(side)}
        pad = {k: v.new_zeros(1, width - v.shape[1]) for k, v in grown.items()}
        return type(side)(**{k: torch.cat((v, pad[k]), 1) for k, v in grown.items()})

    sides = [[wide(b.query, widest) for b in batch], [wide(b.support, 12) for b in batch]]
    query, support = (
        type(s[0])(*(torch.cat([getattr(r, f.name) for r in s]) for f in dataclasses.fields(s[0]))) for s in sides
    )
    one = dataclasses.replace(batch.blocks[0], task=torch.cat([b.task for b in batch]), query=query, support=support)
    together = dataclasses.replace(batch, blocks=(one,))
    assert lists.frame(lambda b: score.predict([], b), [together]).equals(apart)


def test_a_list_ends_with_its_user_and_its_task() -> None:
    """The same user last in one task and first in the next: two lists."""
    t, f = torch.tensor([[0, 0, 1], [1, 2, 0]]), torch.tensor([[0.5, -1.0, 2.0], [3.0, 4.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    block = TaskBlock(torch.tensor([8, 16]), {}, Rows(t, f, mask, t), Rows(t, f, mask, t))
    task, user, score, label, real = lists.cut(block, f)
    assert list(zip(task.tolist(), user.tolist(), strict=True)) == [(8, 0), (8, 1), (16, 1), (16, 2)]
    assert [s[m].tolist() for s, m in zip(score, real, strict=True)] == [[0.5, -1.0], [2.0], [3.0], [4.0]]
    assert torch.equal(score, label.double())


def test_floors_count_what_the_support_and_the_training_scenarios_took(
    table: TaskTable, dataset: Dataset, data: Location
) -> None:
    """By Counters over stored rows; a user in several overlapping scenarios counts once for an item."""
    support = {
        task: Counter(i for i, y, role in zip(r["item"], r["label"], r["role"], strict=True) if role == 0 and y == 1)
        for task, r in world.stored(table, "test").items()
    }
    train = Counter(
        i for _, i in {p for r in world.stored(table, "train").values() for p in zip(r["user"], r["item"], strict=True)}
    )
    found = evaluation.floors(table, dataset, data, ())
    assert tuple(found) == lists.FLOORS
    same(rows(found["support-popularity"].tasks), expected(table, lambda task, user, item: support[task][item]))
    same(rows(found["train-popularity"].tasks), expected(table, lambda task, user, item: train[item]))


def test_intervals_resample_scenarios(table: TaskTable, dataset: Dataset, data: Location) -> None:
    """Paired differences are means over lists; a cohort of one scenario has no interval."""
    measured = evaluation.evaluate(Rule(dataset), table, dataset)
    floors = evaluation.floors(table, dataset, data, ())
    found = evaluation.assemble("rule", table, 0, measured, floors)
    mean = {name: float(f.tasks["recall@10"].to_numpy().mean()) for name, f in {**floors, "rule": measured}.items()}
    for name in floors:
        difference, low, high = found["paired"][name]["all"]["recall@10"]
        assert difference == pytest.approx(mean["rule"] - mean[name])
        assert low < difference < high
        for cohort, count in table.cohorts["test"].items():
            alone = found["paired"][name][cohort]["recall@10"][1] is None
            assert alone == (count["tasks"] == 1)
    text = terminal_table(found)
    assert "Recall@10 minus that of" in text
    assert f"{len(measured.tasks)} lists" in text
    json.dumps(found, allow_nan=False)


def test_report_leads_with_recall(table: TaskTable, dataset: Dataset, data: Location, tmp_path: Path) -> None:
    measured = evaluation.evaluate(Rule(dataset), table, dataset)
    found = evaluation.assemble("rule", table, 0, measured, evaluation.floors(table, dataset, data, ()))
    lines = [{"epoch": e, "train_loss": 1 / e, "valid_mae": None, "valid_recall@10": 0.1 * e} for e in (1, 2, 3)]
    page = report.write(Location.of(tmp_path), found, lines, "", dataset, measured.errors).read_bytes().decode()
    best = report.best_floor(found)
    assert best == max(lists.FLOORS, key=lambda f: found["floors"][f]["all"]["recall@10"])
    assert "(Recall@10)" in page
    assert f"<b>{best}</b>, the best floor" in page
    assert "MAE" not in page
    assert "validation Recall@10" in page or "<svg" in page


def test_validation_misses_what_recall_does_not_hit(table: TaskTable, dataset: Dataset) -> None:
    """1 − Recall@10 and @50 of the validation lists; NaN where a score is not finite."""
    wanted = expected(table, lambda task, user, item: (3 * user + 7 * item) % 11, "valid")
    means = [1 - sum(v[k] for v in wanted.values()) / len(wanted) for k in (0, 2)]
    method, cpu = Rule(dataset), torch.device("cpu")
    loader = Loader(table, dataset, "valid", 64)
    assert validate(method, loader.evaluation(), dataset.label, Exchange(), cpu) == pytest.approx(means)
    method.shift.data.fill_(math.nan)
    assert all(math.isnan(v) for v in validate(method, loader.evaluation(), dataset.label, Exchange(), cpu))
    with pytest.raises(Diverged, match="rule: its prediction for task"):
        evaluation.evaluate(method, table, dataset)
