"""A memory's slots, from each test task's attention to evaluation.json and the report's pictures."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from tiny import register
from torch import Tensor

from distmeta import cli
from distmeta.data.schema import Dataset, Field, Label
from distmeta.evaluation import factfigures, slotcharts
from distmeta.evaluation.facts import summary
from distmeta.evaluation.measured import ErrorHistogram, Measured
from distmeta.storage import Location
from distmeta.tasks import TaskBatch

LABEL = Label("rating", 1.0, 5.0)
AGES = ["young", "middle", "old"]


class World:
    """Test tasks 0 … n−1 with hand-made profiles and attention; facts of a method with K slots."""

    def __init__(self, where: Path, age: list[int], weights: np.ndarray, **others: list[int]) -> None:
        """`age`: indices (0: unknown) into AGES; `weights` [n, K]; `others`: a field "zip" has 30 values."""
        self.place, self.n = Location.of(where), len(age)
        self.columns = {"task": np.arange(self.n), "age": age, **others}
        sizes = {"age": 4, "zip": 31, "planted_cluster": 41}
        fields = {name: sizes[name] for name in ("age", *others)}
        (where / "vocabularies").mkdir(exist_ok=True)
        for name, size in fields.items():
            values = AGES if name == "age" else [f"{name}{v}" for v in range(1, size)]
            pl.DataFrame({"value": [None, *values]}).write_parquet(where / f"vocabularies/user-{name}.parquet")
        several = Field("tags", "multi_categorical", 3), Field("height", "numeric")
        user_fields = (*several, *(Field(name, "categorical", size) for name, size in fields.items()))
        self.dataset = Dataset("hand", LABEL, user_fields, (), self.n, 1, 1)
        self.facts = pl.DataFrame({f"fact:slot_{k}": weights[:, k] for k in range(weights.shape[1])})

    def read(self, split: str, columns: list[str]) -> list[pa.Table]:
        """As TaskTable.read: two parts, not in order."""
        assert split == "test"
        whole = pa.table({c: self.columns[c] for c in columns})
        return [whole.slice(self.n // 2), whole.slice(0, self.n // 2)]

    def summary(self, *drop: str, **facts: Any) -> dict[str, Any]:
        tasks = pl.DataFrame({"task": np.arange(self.n), "split": "test", "cohort": "C-W"})
        tasks = tasks.hstack(self.facts.with_columns(**facts)).drop(*drop)
        found = summary(Measured(tasks, None, ErrorHistogram.of(LABEL)), self, self.dataset, self.place)  # type: ignore[arg-type]
        json.dumps(found, allow_nan=False)
        return found


def by_age(ages: list[int]) -> np.ndarray:
    """Attention of two slots: the first for the young, the second for the old, neither for the middle-aged."""
    return np.array([{1: (0.9, 0.1), 2: (0.5, 0.5), 3: (0.2, 0.8)}[a] for a in ages])


def test_a_slot_is_told_by_the_tasks_that_answer_to_it_most(tmp_path: Path) -> None:
    """400 tasks, a quarter young, half middle-aged, a quarter old: each slot's top 100 are one age group."""
    ages = [1, 2, 2, 3] * 100
    found = World(tmp_path, ages, by_age(ages)).summary()
    assert list(found) == ["slots"]
    slots = found["slots"]
    assert slots["usage"] == pytest.approx([0.525, 0.475])  # (.9 + 2·.5 + .2)/4
    assert slots["top"] == [100, 100]
    assert slots["answer"] == pytest.approx([0.9, 0.8])
    assert slots["fields"] == {
        "age": {"values": AGES, "shares": [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], "overall": [0.25, 0.5, 0.25]}
    }
    assert slots["names"] == ["age young ×4.0", "age old ×4.0"]


def test_few_tasks_are_shared_evenly_and_ties_with_the_last_count(tmp_path: Path) -> None:
    """Of 9 tasks 5 (9/2 rounded up) tell a slot: the 3 young and all 4 middle-aged, who tie. Too few for a name."""
    ages = [1, 1, 1, 2, 2, 2, 2, 3, 3]
    slots = World(tmp_path, ages, by_age(ages)).summary()["slots"]
    assert slots["top"] == [7, 6]
    assert slots["fields"]["age"]["shares"] == pytest.approx(np.array([[3 / 7, 4 / 7, 0], [0, 4 / 6, 2 / 6]]))
    assert slots["answer"] == pytest.approx([(3 * 0.9 + 4 * 0.5) / 7, (4 * 0.5 + 2 * 0.8) / 6])
    assert slots["names"] == ["", ""]


def test_names_begin_with_what_chance_would_have_least(tmp_path: Path) -> None:
    """Also an unknown value; at most three; never a value as frequent as among all, however frequent."""
    ages = [0] * 50 + [1] * 50 + [2] * 300
    truth = [1 + i // 5 if i < 200 else 0 for i in range(400)]
    first = np.where(np.arange(400) < 100, 0.7, 0.3)
    world = World(tmp_path, ages, np.stack([first, 1 - first], 1), planted_cluster=truth)
    slots = world.summary()["slots"]
    assert list(slots["fields"]) == ["planted_cluster", "age"]
    assert slots["fields"]["age"]["values"] == ["unknown", "young", "middle"]
    assert slots["names"][0] == "age unknown ×4.0, age young ×4.0, planted_cluster planted_cluster1 ×4.0"
    assert slots["top"] == [100, 300]
    assert slots["names"][1].startswith("age middle ×1.3, planted_cluster unknown ×1.3")


def test_attention_by_chance_names_no_slot(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    named = 0
    for _ in range(20):
        weights = draw.dirichlet(np.ones(8), size=1000)
        ages, truth = draw.integers(4, size=1000).tolist(), draw.integers(41, size=1000).tolist()
        names = World(tmp_path, ages, weights, planted_cluster=truth).summary()["slots"]["names"]
        named += sum(map(bool, names))
    assert named <= 15  # of 160, with 45 values that each name one by a chance of at most .001


def test_fields_of_many_values_are_left_out(tmp_path: Path) -> None:
    ages = [1, 3] * 60
    world = World(tmp_path, ages, by_age(ages), zip=[1 + i % 30 for i in range(120)])
    assert list(world.summary()["slots"]["fields"]) == ["age"]
    world.dataset = Dataset("hand", LABEL, world.dataset.user_fields[:2], (), 120, 1, 1)
    slots = world.summary()["slots"]
    assert (slots["fields"], slots["names"], slots["top"]) == ({}, ["", ""], [60, 60])
    pictures = {title: (texts(svg), caption) for svg, title, caption in factfigures.figures({"slots": slots}, [])}
    assert list(pictures) == ["What each memory slot stands for"]
    assert "no field of few values" in pictures["What each memory slot stands for"][1]
    assert "like all" not in pictures["What each memory slot stands for"][0]


def test_tasks_whose_attention_is_not_known_are_left_out(tmp_path: Path) -> None:
    ages = [1, 3] * 60
    world = World(tmp_path, ages, by_age(ages))
    nobody = pl.when(pl.int_range(pl.len()) < 20).then(float("nan")).otherwise(pl.col("fact:slot_1"))
    slots = world.summary(**{"fact:slot_1": nobody})["slots"]
    assert slots["top"] == [50, 50]
    assert slots["usage"] == pytest.approx([0.55, 0.45])
    assert world.summary(**{"fact:slot_1": pl.lit(None, pl.Float64)}) == {}


def test_one_slot_stands_for_everybody(tmp_path: Path) -> None:
    ages = [1, 2, 2, 3] * 100
    found = World(tmp_path, ages, np.ones((400, 1))).summary()
    slots = found["slots"]
    assert (slots["usage"], slots["top"], slots["answer"], slots["names"]) == ([1.0], [400], [1.0], [""])
    assert slots["fields"]["age"]["shares"] == [slots["fields"]["age"]["overall"]] == [[0.25, 0.5, 0.25]]
    lines = [{"epoch": 1, "memory": {"entropy": None, "usage": [1.0], "alike": None}}]
    pictures = list(factfigures.figures(found, lines))
    assert [title for _, title, _ in pictures] == ["What each memory slot stands for", "Memory slots and age"]
    for svg, _, caption in pictures:
        assert not re.search("collapse|alike|stands for nothing|slots", texts(svg) + caption), caption


def test_more_than_ten_slots_keep_their_order(tmp_path: Path) -> None:
    weights = np.linspace(1, 2, 11)[None, :].repeat(22, 0)
    world = World(tmp_path, [1, 2] * 11, weights / weights.sum(1, keepdims=True))
    world.facts = world.facts.select(sorted(world.facts.columns))  # slot_10 before slot_2
    usage = world.summary()["slots"]["usage"]
    assert len(usage) == 11
    assert all(a < b for a, b in pairwise(usage))


@pytest.mark.parametrize("entropy", [[1.0] * 8, [1 - 1e-16 * i for i in range(8)], [0.0, 1.0] * 4, [1.0 + 1e-7] * 8])
def test_entropy_is_counted_between_0_and_1(tmp_path: Path, entropy: list[float]) -> None:
    """Also of slots that have collapsed, whose entropies differ by their last digits."""
    world = World(tmp_path, [1] * 8, np.full((8, 2), 0.5))
    found = world.summary(**{"fact:entropy": pl.Series(entropy)})
    assert found["entropy"]["edges"] == pytest.approx(np.linspace(0, 1, 41))
    counts = found["entropy"]["cohorts"]["C-W"]["counts"]
    assert (counts[0], counts[-1]) == (entropy.count(0.0), 8 - entropy.count(0.0))
    (_, title, caption), *_ = (f for f in factfigures.figures(found, []) if "entropy" in texts(f[0]))
    assert title == "Attention of the test tasks"
    assert "1: a task answers to all slots alike" in caption
    assert "below 0" not in caption


@pytest.mark.parametrize("sizes", [[1e-3] * 4, [1e9 + 1e-7 * i for i in range(4)], [0.0] * 4, [-2.0] * 4])
def test_a_quantity_that_is_everywhere_the_same_is_a_spike(tmp_path: Path, sizes: list[float]) -> None:
    world = World(tmp_path, [1] * 4, np.ones((4, 1)))
    step = world.summary("fact:slot_0", **{"fact:step_size": pl.Series(sizes)})["step_size"]
    used = np.flatnonzero(step["cohorts"]["C-W"]["counts"])
    assert np.ptp(used) <= 1  # of 40 bins
    assert sum(step["cohorts"]["C-W"]["counts"]) == 4
    assert step["edges"][0] < sizes[0] < step["edges"][-1]
    assert all(a < b for a, b in pairwise(step["edges"]))


# ---- pictures


def texts(svg: str) -> str:
    """Its words; that it parses is what is tested."""
    return " ".join("".join(t.itertext()) for t in ElementTree.fromstring(svg).iter() if t.tag.endswith("text"))


def line(epoch: int, entropy: float | None, usage: list[float] | None, alike: float | None) -> dict[str, Any]:
    return {"epoch": epoch, "memory": {"entropy": entropy, "usage": usage, "alike": alike}}


def test_pictures_say_what_they_were_given(tmp_path: Path) -> None:
    ages = [1, 2, 2, 3] * 100
    found = World(tmp_path, ages, by_age(ages)).summary()
    lines = [line(1, 0.5, [0.25, 0.75], -0.2), line(2, 0.875, [0.5, 0.5], 0.75)]
    pictures = {title: (texts(svg), caption) for svg, title, caption in factfigures.figures(found, lines)}
    assert list(pictures) == ["What each memory slot stands for", "Memory slots and age", "Attention over training"]
    said, caption = pictures["What each memory slot stands for"]
    for words in ("slot 0", "slot 1", "age young ×4.0", "age old ×4.0", "52.5 → 90.0", "47.5 → 80.0"):
        assert words in said
    assert "the 100 test tasks that answer to it most, as in MAMO’s Figure 5b" in caption
    said, caption = pictures["Memory slots and age"]
    assert said.split().count("100") == 2
    assert all(age in said for age in AGES)
    said, caption = pictures["Attention over training"]
    assert "entropy of the attention: 0.8750 at the end" in said
    assert "slots’ mean cosine: 0.7500 at the end" in said
    assert "collapsed" in caption


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"epoch": 1}],
        [{"epoch": 1, "memory": None}],
        [line(1, None, [1.0], None)],
        [line(1, None, None, None)],
        [line(1, 0.5, [float("nan"), 0.5], 0.5)],
    ],
)
def test_no_picture_of_nothing(metrics: list[dict[str, Any]]) -> None:
    assert slotcharts.training(metrics) is None
    assert list(factfigures.figures({}, metrics)) == []


def test_pictures_of_extremes() -> None:
    """One epoch, epochs without numbers, a value too long, 24 values, 8 slots, nothing but markup: still pictures."""
    one = slotcharts.training([line(7, None, [0.5, 0.5], None)])
    gaps = slotcharts.training([line(1, None, [0.5, 0.5], 0.1), line(2, float("nan"), [1.0, 0.0], None)])
    assert one
    assert "entropy" not in texts(one)
    assert re.search(r"\b7\b", texts(one))
    assert not re.search(r"\d\.\d", texts(one))
    assert gaps
    assert "mean cosine: 0.1000" in texts(gaps)
    long = {"values": ["<b>&" * 20, *map(str, range(23))], "shares": [[1 / 24] * 24] * 8, "overall": [1 / 24] * 24}
    svg = slotcharts.field("a & <b>", long, "long")
    assert "slot 7" in texts(svg)
    assert "…" in texts(svg)
    names = ["x" * 300, "", *["$a_b$"] * 6]
    drawn = texts(slotcharts.overview({"usage": [1 / 8] * 8, "answer": [1] * 8, "names": names, "fields": {"x": long}}))
    assert "like all test tasks" in drawn
    assert "$a_b$" in drawn


def facts(self: Any, state: list[Tensor], batch: TaskBatch) -> dict[str, list[Tensor]]:
    """Two slots, for the users of segments 0 and 1 and for the others."""
    first = [torch.where(b.user["segment"].index[:, 0] <= 2, 0.75, 0.25).double() for b in batch]
    return {"entropy": [w * 0 + 0.8113 for w in first], "slot_0": first, "slot_1": [1 - w for w in first]}


def test_train_shows_the_slots(small: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register(monkeypatch), "facts", facts)
    run = tmp_path / "run"
    argv = ["train", "tiny", "--data", str(small), "--run", str(run), "--epochs", "1", "--threads", "1"]
    assert cli.main(argv) == 0
    found = json.loads((run / "evaluation.json").read_text())["facts"]
    assert list(found) == ["entropy", "slots"]
    shares = np.array(found["slots"]["fields"]["segment"]["shares"])
    first, second = found["slots"]["top"]
    assert first == 80 > second >= 40  # fewer than half answer to the first most, and all others tie with its last
    assert shares[1] == pytest.approx([0, 0, *(shares[0, 2:] / shares[0, 2:].sum())])
    page = (run / "report.html").read_text()
    for title in ("What each memory slot stands for", "Memory slots and segment", "Attention of the test tasks"):
        assert f"<h2>{title}</h2>" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
