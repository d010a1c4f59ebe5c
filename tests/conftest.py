"""What tests share: real raw files and prepared datasets, each made once a session; and which process runs them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import scenarioworld
import torch
from filelock import FileLock
from nodes import SETTINGS
from xdist.scheduler import LoadScopeScheduling

from distmeta.data.sources import movielens, synthetic
from distmeta.methods import METHODS
from distmeta.storage import Location

if TYPE_CHECKING:
    from nodes import Nodes

CLUSTERS = ("test_ray", "test_emulated", "test_jobs", "test_scaling", "test_search_ray")
"""Files that start Ray clusters all the time: one after the other, in one process. Two at once take longer, as it is
processes that start, and each of their time-outs would have to know of the other."""

os.environ.update(SETTINGS)  # Ray reads them when it is imported, in whatever test comes first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first: pytest-xdist hands tests out in this order."""
    first = (*CLUSTERS, "test_readme")
    items.sort(key=lambda item: first.index(item.path.stem) if item.path.stem in first else len(first))


class ByFile(LoadScopeScheduling):
    """The tests of a file are one process's, whose module fixtures are made once; those of CLUSTERS are too."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "clusters" if Path(file).stem in CLUSTERS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """pytest-xdist's own groups (`--dist loadgroup`) do nothing with pytest 9.2."""
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums in one order: what tests compare bit for bit depends neither on the cores nor on the test before.

    A command sets the threads of its process, which here is that of the tests.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with the official layouts ml-1m, ml-100k and BX, written by DISTMETA_DATA/raw_layout.py."""
    source = os.environ.get("DISTMETA_DATA")
    if not source:
        pytest.skip("DISTMETA_DATA is not set (the folder that holds raw_layout.py and its tables)")
    mine = tmp_path_factory.getbasetemp()
    out = (mine if worker_id == "master" else mine.parent) / "raw"
    with FileLock(f"{out}.lock"):  # made by the process that comes first
        if not out.exists():
            subprocess.run([sys.executable, str(Path(source) / "raw_layout.py"), f"{out}.part"], check=True)
            Path(f"{out}.part").rename(out)
    return out


@pytest.fixture(scope="session")
def ml1m(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Location:
    """MovieLens 1M as a canonical dataset. Shared: add task tables to it, change nothing."""
    where = Location.of(tmp_path_factory.mktemp("data") / "ml-1m")
    movielens.movielens_1m(Location.of(raw / "ml-1m"), where)
    return where


@pytest.fixture(scope="session")
def ml100k(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Location:
    """MovieLens 100K as a canonical dataset. Shared: add task tables to it, change nothing."""
    where = Location.of(tmp_path_factory.mktemp("data") / "ml-100k")
    movielens.movielens_100k(Location.of(raw / "ml-100k"), where)
    return where


@pytest.fixture(scope="session")
def taobao() -> Path:
    """The folder of Taobao's buys and carts."""
    source = os.environ.get("DISTMETA_DATA")
    if not source:
        pytest.skip("DISTMETA_DATA is not set (the folder that holds taobao/interactions.parquet)")
    return Path(source) / "taobao"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """A synthetic dataset of 200 users and 120 items. Shared: add task tables to it, change nothing."""
    where = Location.of(tmp_path_factory.mktemp("data") / "small")
    synthetic.generate(where, users=200, items=120, per_user=(15, 40))
    return where


@pytest.fixture(scope="session")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """As `small`, but what the users do is click. Shared: add task tables to it, change nothing."""
    where = Location.of(tmp_path_factory.mktemp("data") / "clicks")
    synthetic.generate(where, users=200, items=120, per_user=(15, 40), clicks=True)
    return where


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """scenarioworld's ratings of movies with genres. Shared: add task tables to it, change nothing."""
    where = tmp_path_factory.mktemp("data") / "scenes"
    scenarioworld.make(where, themes=False)
    return Location.of(where)


@pytest.fixture(scope="session")
def suits(small: Location, clicks: Location, scenes: Location) -> Callable[[str], Location]:
    """METHOD -> the small dataset that it can learn from."""

    def chosen(method: str) -> Location:
        if not METHODS[method].users:
            return scenes
        return clicks if METHODS[method].clicks_only else small

    return chosen


@pytest.fixture(scope="module")
def _cluster() -> "Iterator[Nodes]":
    from nodes import Nodes

    made = Nodes()
    yield made
    made.close()


@pytest.fixture
def nodes(_cluster: "Nodes") -> "Nodes":
    """A Ray cluster of two nodes of one CPU, every pair of workers on two of them; this process is its driver."""
    _cluster.fill(2)
    return _cluster
