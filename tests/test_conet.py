"""CoNet: a cross unit by hand, what its source domain is and is not, and what it refuses; ItemPop on scenarios."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scenarioworld as world
import torch

from distmeta import cli
from distmeta.commands.train import main as train
from distmeta.data import tasktable
from distmeta.data.domains import Surroundings, surroundings
from distmeta.data.loader import read_items
from distmeta.data.protocols import QUERY
from distmeta.data.scenarios import unasked_pairs
from distmeta.data.schema import Dataset, Field, Label
from distmeta.errors import UserError
from distmeta.methods.conet import CoNet
from distmeta.methods.plain_options import CoNet as Options
from distmeta.storage import Location
from distmeta.tasks import Bag, Rows

FLAGS = [x for k, v in world.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]
FLAGS += ["--protocol", "cmml-scenario", "--batch-size", "4", "--threads", "1", "--epochs", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Location:
    where = tmp_path_factory.mktemp("conet") / "data"
    world.make(where, themes=False)
    return Location.of(where)


def prepared(data: Location, **options: Any) -> tuple[CoNet, tasktable.TaskTable, Dataset]:
    dataset = Dataset.open(data)
    table = tasktable.make(data, "cmml-scenario", 0, world.SMALL)
    dataset = table.seen(dataset)
    m = CoNet(Options(embedding=4, hidden=(8,), **options), dataset, read_items(data, dataset))
    m.survey(surroundings(table))
    said = list(m.prepare(*unasked_pairs(table, dataset)))
    assert said[-1].startswith("source domain: ")
    return m, table, dataset


def small() -> CoNet:
    """One user field and one item field, both a number wide; two layers of one unit."""
    dataset = Dataset(
        "one", Label("click", 0, 1), (Field("job", "categorical", 2),), (Field("kind", "categorical", 3),),
        users=2, items=3, interactions=6,
    )  # fmt: skip
    items = {"kind": Bag(torch.arange(3)[:, None], None)}
    return CoNet(Options(embedding=1, hidden=(1, 1), source_items=2), dataset, items)


def test_two_cross_units_by_hand() -> None:
    """User 2, item 3, source item 5: the layers come to (7.75, 4.75), then to (10.75, −3), of which 0 is left."""
    m = small()
    values = {
        "target.0.weight": [[1.0], [1.0]], "target.0.bias": [0.5], "other.0.weight": [[-1.0], [1.0]],
        "other.0.bias": [0.0], "cross.0": [[0.5], [0.25]], "target.1.weight": [[2.0]], "target.1.bias": [0.0],
        "other.1.weight": [[1.0]], "other.1.bias": [0.0], "cross.1": [[-1.0]], "out.0.weight": [[0.1]],
        "out.0.bias": [1.0], "out.1.weight": [[9.0]], "out.1.bias": [7.0], "nothing": [5.0],
    }  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            m.get_parameter(name).copy_(torch.tensor(value))
    one = torch.zeros(1, 1, dtype=torch.int64)
    rows = Rows(one, one.float(), one == 0, one)
    found = m.outputs(torch.tensor([[2.0]]), torch.tensor([[3.0]]), rows, one - 1)
    assert [f.item() for f in found] == pytest.approx([0.1 * 10.75 + 1, 7.0])
    with torch.no_grad():  # an item of the source domain is read from the items' own table
        m.get_parameter("embedding.item_tables.0.weight").copy_(torch.tensor([[0.0], [5.0], [0.0]]))
        m.nothing.fill_(-50)
    again = m.outputs(torch.tensor([[2.0]]), torch.tensor([[3.0]]), rows, one + 1)
    torch.testing.assert_close(again, found)


def asked(table: tasktable.TaskTable) -> set[tuple[int, int]]:
    """What the lists of validation and test ask about."""
    return {
        (u, i)
        for split in ("valid", "test")
        for t in world.stored(table, split).values()
        for u, i, role in zip(t["user"], t["item"], t["role"], strict=True)
        if role == QUERY
    }


def kept(m: CoNet) -> dict[int, list[int]]:
    return {u: [i for i in row if i >= 0] for u, row in enumerate(m.source.tolist())}


def test_the_source_is_what_users_like_outside_all_scenarios(data: Location) -> None:
    m, table, _ = prepared(data, source_items=2)
    tasks = [t for split in ("train", "valid", "test") for t in world.stored(table, split).values()]
    candidates = {i for t in tasks for i in t["item"]}
    outside: dict[int, set[int]] = {}
    for u, i in liked(data):
        if i not in candidates:
            outside.setdefault(u, set()).add(i)
    assert outside
    assert any(len(items) > 2 for items in outside.values())
    for u, items in kept(m).items():
        assert set(items) <= outside.get(u, set())
        assert len(set(items)) == min(2, len(outside.get(u, set())))
    assert set(m.pool[m.pool >= 0].tolist()) == set().union(*outside.values())
    assert not {(u, i) for u, items in kept(m).items() for i in items} & asked(table)


def liked(data: Location) -> set[tuple[int, int]]:
    """All ratings of 4 or more: users and items."""
    rows = pl.read_parquet(f"{data}/interactions/*.parquet").filter(pl.col("label") >= 4)
    return set(rows.select("user", "item").iter_rows())


def test_sources_in_other_scenarios_are_neither_of_the_one_at_hand_nor_asked_about(data: Location) -> None:
    m, table, dataset = prepared(data, source="others", source_items=16)
    assert not {(u, i) for u, items in kept(m).items() for i in items} & asked(table)
    members = {t: set(s["item"]) for n in ("train", "valid", "test") for t, s in world.stored(table, n).items()}
    users = torch.arange(dataset.users)
    some, drawn = 0, set()
    for task, items in members.items():
        for epoch in range(5):
            found = m.beside(torch.full_like(users, task), users, 0, epoch).tolist()
            assert not set(found) & items
            some += sum(i >= 0 for i in found)
            drawn |= {(task, tuple(found))}
    assert some > len(members) * len(users)
    assert len(drawn) > len(members)  # anew each epoch


def test_negatives_are_none_of_the_user_s_own(data: Location) -> None:
    m, _, dataset = prepared(data)
    users = torch.arange(dataset.users).repeat(40)
    tasks = torch.arange(len(users))
    own = kept(m)
    found = m.negatives(tasks, users, 0, 0).tolist()
    known = np.array([i in own[u] for u, i in zip(users.tolist(), found, strict=True)])
    assert known.mean() < 0.1  # of four draws the first new one, and else the last
    assert set(found) <= set(m.pool.tolist())


def test_who_likes_nothing_outside_and_a_dataset_without_an_outside() -> None:
    m, none = small(), np.zeros(0, np.int64)
    two = np.array([0, 1])
    m.survey(Surroundings(none, none, two, two))
    with pytest.raises(UserError, match="no source domain; give --source others"):
        list(m.prepare(two, two))
    m.survey(Surroundings(np.array([1]), np.array([2]), two, two))
    list(m.prepare(two, two))
    assert m.beside(torch.tensor([0, 0]), torch.tensor([0, 1])).tolist() == [-1, 2]


def test_users_are_refused_and_scenarios_run(
    data: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "conet", "--data", str(data), "--run", str(tmp_path / "users")]) == 2
    assert "give --protocol cmml-scenario" in capsys.readouterr().err
    sizes = ["--embedding", "4", "--hidden", "8", "4", "--pretrained", "als", "--pretrained-width", "3"]
    for source in ("outside", "others"):
        where = str(tmp_path / source)
        assert train(["conet", "--data", str(data), *FLAGS, *sizes, "--source", source, "--run", where]) == 0
        assert "source domain: " in capsys.readouterr().out


def test_itempop_ranks_scenarios_as_the_floors_do(data: Location, tmp_path: Path) -> None:
    """By the support's counts exactly; by all training scenarios' but for the pairs that are asked about."""
    found = {}
    for counts in ("auto", "support", "global"):
        run = tmp_path / counts
        assert train(["itempop", "--data", str(data), *FLAGS[:-2], "--counts", counts, "--run", str(run)]) == 0
        found[counts] = json.loads((run / "evaluation.json").read_text())
    metrics = ("recall@10", "recall@20", "recall@50")
    floor = found["auto"]["floors"]["support-popularity"]["all"]
    for counts in ("auto", "support"):
        assert [found[counts]["cohorts"]["all"][k] for k in metrics] == [floor[k] for k in metrics]
    assert found["global"]["cohorts"]["all"]["recall@10"] != floor["recall@10"]
