"""CMML's contexts and routes in the report: the sample of tasks, what it comes to, and its pictures."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import oracle
import polars as pl
import pytest
import scenarioworld as world
import torch
from cmml_oracle import RAGGED, cmml

from distmeta import cli
from distmeta.data import tasktable
from distmeta.data.loader import Loader
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.evaluation import contexts, factfigures, plane
from distmeta.evaluation.contexts import CONTEXT, ROUTE
from distmeta.evaluation.measured import Measured
from distmeta.storage import Location

FLAGS = [x for k, v in world.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Location:
    where = tmp_path_factory.mktemp("contexts") / "data"
    world.make(where, themes=True)
    return Location.of(where)


@pytest.fixture(scope="module")
def table(place: Location) -> TaskTable:
    return tasktable.make(place, "cmml-scenario", 0, world.SMALL)


def silhouette_by_loops(points: np.ndarray, group: list[int]) -> float:
    found = []
    for i, p in enumerate(points):
        to = {g: [np.linalg.norm(p - q) for j, q in enumerate(points) if group[j] == g and j != i] for g in set(group)}
        own = to.pop(group[i])
        a, b = np.mean(own) if own else 0.0, min(np.mean(d) for d in to.values())
        found.append((b - a) / max(a, b) if own and max(a, b) > 0 else 0.0)
    return float(np.mean(found))


def test_silhouette(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 0, 1 | 10, 12. a = 1, 1, 2, 2; b = 11, 10, 9.5, 11.5. And loops, also in chunks."""
    by_hand = np.mean([10 / 11, 9 / 10, 7.5 / 9.5, 9.5 / 11.5])
    assert plane.silhouette(np.array([[0.0], [1.0], [10.0], [12.0]]), ["a", "a", "b", "b"]) == pytest.approx(by_hand)
    draw = np.random.default_rng(0)
    points, group = draw.normal(size=(60, 5)), [*draw.integers(3, size=59).tolist(), 7]  # who is alone counts 0
    for chunk in (500, 7):
        monkeypatch.setattr(plane, "CHUNK", chunk)
        assert plane.silhouette(points, np.array(group)) == pytest.approx(silhouette_by_loops(points, group))
    assert plane.silhouette(points, ["one"] * 60) is None


def test_supports_are_drawn_of_the_users_who_are_asked(place: Location, table: TaskTable) -> None:
    """Pairs of what such a user took and an item of the scenario that they did not; another support each time."""
    dataset = table.seen(Dataset.open(place))
    stored = world.stored(table, "test")
    asked = {t: {(u, i) for u, i, role in zip(r["user"], r["item"], r["role"], strict=True) if role == 1}
             for t, r in stored.items()}  # fmt: skip
    loader = Loader(table, dataset, "test", 3, episodes=4)
    seen: dict[int, set[Any]] = {t: set() for t in stored}
    for batch in loader.epoch(0):
        for task, sides in world.unpacked(batch).items():
            for rows in sides:
                for (u, i, y), (v, j, z) in zip(rows[::2], rows[1::2], strict=True):
                    assert (y, z, u) == (1, 0, v)
                    assert (u, i) in asked[task]
                    assert (v, j) not in asked[task]
                    assert j in stored[task]["item"]
            taken = [row[:2] for side in sides for row in side if row[2]]
            assert len(taken) == len(set(taken)), "a positive is in support or query, once"
            seen[task].add(tuple(sides[0]))
    assert {len(s) for s in seen.values()} == {4}


def traits(table: TaskTable) -> pl.DataFrame:
    """Three supports of each test scenario: contexts stand at (10 k, 0, 0), and ±1 and 0 beside it; two modules, one
    layer between: scenario k takes 10 k % from the second."""
    tasks = sorted(int(t) for t in table.names if int(t) in world.stored(table, "test"))
    rows = [(t, s, 10.0 * k, s - 1.0, 0.1 * k) for k, t in enumerate(tasks) for s in range(3)]
    task, support, x, y, p = map(np.array, zip(*rows, strict=True))
    route = np.stack([1 - p, p, 1 - p, p], 1)
    vectors = {CONTEXT: np.stack([x, y, 0 * x], 1), f"{ROUTE}1": route, f"{ROUTE}2": route[:, :2]}
    return pl.DataFrame({"task": task, "support": support}).with_columns(
        pl.Series("cohort", ["even", "odd"] * 100)[: len(task)],
        *(pl.Series(name, v.astype(np.float32)) for name, v in vectors.items()),
        rows=pl.lit(12),
        mean=pl.lit(0.5),
    )


def test_what_traits_come_to(place: Location, table: TaskTable) -> None:
    dataset = table.seen(Dataset.open(place))
    found = contexts.summary(traits(table), table, dataset, place)
    json.dumps(found, allow_nan=False)
    of, n = found["contexts"], table.counts["test"]["tasks"]
    assert (of["tasks"], of["supports"], of["width"]) == (n, 3, 3)
    points = np.array(of["points"])
    assert np.abs(points).max() == 1
    assert np.allclose(np.abs(np.diff(points[::3, 0])), 2 / (n - 1), atol=1e-3)
    assert sum(of["shares"]) == pytest.approx(1)
    scenario = of["groups"]["scenario"]
    assert scenario["names"] == [table.names[t] for t in sorted(table.names, key=int)]
    assert scenario["index"] == [k for k in range(n) for _ in range(3)]
    assert 0.8 < scenario["silhouette"] == pytest.approx(scenario["silhouette_plane"], abs=1e-5)
    assert of["groups"]["kind of scenario"]["silhouette"] < 0.1
    routes = found["routes"]
    assert [s["name"] for s in routes["shown"]] == [scenario["names"][0], scenario["names"][-1]]
    assert routes["shown"][-1]["layers"] == [
        [[1 - 0.1 * (n - 1), 0.1 * (n - 1)]] * 2,
        [[1 - 0.1 * (n - 1), 0.1 * (n - 1)]],
    ]
    assert routes["distance"]["most"] == pytest.approx(0.1 * (n - 1))
    apart = [0.1 * abs(a - b) for a in range(n) for b in range(a)]
    assert routes["distance"] == pytest.approx({"mean": np.mean(apart), "most": max(apart), "same": 0}, abs=1e-6)
    p = 0.1 * np.arange(1, n)
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum() / n
    assert routes["entropy"] == pytest.approx([entropy, entropy], abs=1e-5)


def test_traits_that_are_not_numbers_are_left_out_and_few_are_no_picture(place: Location, table: TaskTable) -> None:
    dataset, given = table.seen(Dataset.open(place)), traits(table)
    broken = given.with_columns(pl.Series(CONTEXT, np.full((len(given), 3), np.nan, np.float32)))
    assert contexts.summary(broken, table, dataset, place) == {}
    assert contexts.summary(None, table, dataset, place) == {}
    found = contexts.summary(given[:2].drop(f"{ROUTE}1"), replace(table, names={}), dataset, place)
    assert list(found) == ["routes"]
    assert found["routes"]["distance"] == {"mean": None, "most": None, "same": 0}
    (one,) = found["routes"]["shown"]
    assert one["name"] == f"scenario {given['task'][0]}"
    ((svg, _, caption),) = factfigures.figures(found, [])
    assert "differ" not in caption
    assert one["name"] in texts(svg)


def texts(svg: str) -> str:
    """Its words; that it parses is what is tested."""
    return " ".join("".join(t.itertext()) for t in ElementTree.fromstring(svg).iter() if t.tag.endswith("text"))


def test_many_groups_are_grey_but_some(place: Location, table: TaskTable) -> None:
    groups = {"names": [f"<g{k}>" for k in range(20)], "index": list(range(20)), "silhouette": -0.5,
              "silhouette_plane": 0.25, "rank": None}  # fmt: skip
    found = {"tasks": 20, "supports": 2, "width": 9, "shares": [0.5, 0.25], "points": [[k / 20, 0] for k in range(20)],
             "groups": {"scenario": groups}}  # fmt: skip
    ((svg, title, caption),) = factfigures.figures({"contexts": found}, [])
    assert title == "Contexts by scenario"
    said = texts(svg)
    assert [k for k in range(20) if f"<g{k}> (1)" in said] == [0, 3, 5, 8, 11, 14, 16, 19]
    assert "8 of 20 groups" in caption
    assert "75 % of the variance in 9 dimensions" in caption
    assert "Silhouette of the groups −0.50 in all dimensions, 0.25 in the plane" in caption


@pytest.mark.parametrize("hybrid", ["dot", "none"])
def test_a_task_s_routes_are_the_mean_over_its_query(hybrid: str) -> None:
    """Of real rows, of each task of each block; and its context is what adapt gives."""
    m: Any = cmml("cmml-softm", module_layers=3, hybrid=hybrid)
    batch = oracle.batch(*RAGGED)
    state = m.adapt(batch)
    found = m.traits(state, batch)
    assert found.keys() == {"context", "route 1", "route 2", "route 3"}
    assert all(torch.equal(a, b) for a, b in zip(found["context"], state, strict=True))
    for k, (block, routes) in enumerate(zip(batch, m.routes(state, batch), strict=True)):
        for b, real in enumerate(block.query.mask):
            rows = torch.arange(len(real))[real] if hybrid == "dot" else torch.tensor([0])
            for i, route in enumerate(routes, 1):
                if real.any():
                    torch.testing.assert_close(found[f"route {i}"][k][b], route[b, rows].mean(0).flatten())


@pytest.mark.parametrize("protocol", ["cmml-scenario", "cmml-user"])
def test_train_shows_contexts_and_routes(
    place: Location, small: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    data, flags = (small, []) if protocol == "cmml-user" else (place, FLAGS)
    words = ["train", "cmml-softm", "--data", str(data), "--protocol", protocol, "--run", str(tmp_path / "run")]
    words += ["--embedding", "4", "--hidden", "8", "8", "--hyper", "8", "--epochs", "1", "--threads", "1", *flags]
    assert cli.main(words) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["facts"]
    kept = Measured.from_ipc((tmp_path / "run" / "measured.arrow").read_bytes()).traits
    assert kept is not None
    assert len(found["contexts"]["points"]) == len(kept)
    if protocol == "cmml-user":
        assert kept["task"].n_unique() == len(kept)
        assert {"segment", "region", "mean rating of the support"} <= found["contexts"]["groups"].keys()
        assert found["contexts"]["groups"]["mean rating of the support"]["rank"] <= 1
    else:
        assert kept.group_by("task").len()["len"].unique().to_list() == [32]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<h2>Contexts by ") == 2
    assert page.count("<h2>Routes through the modules</h2>") == 1
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
