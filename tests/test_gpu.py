"""On a GPU, where there is one: the same numbers as on the CPU, whole commands, NCCL, bf16 and the benchmark.

What needs none is tested in test_devices.py (places), test_precision.py (rounding) and below (shares of a GPU on a
cluster that says it has one).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_contract import World
from torch import Tensor

from distmeta import cli
from distmeta.config import TrainOptions
from distmeta.data.loader import Loader
from distmeta.exchange import Exchange
from distmeta.methods import METHODS
from distmeta.methods.base import Method, fit_closed_form
from distmeta.parallel.update import MetaUpdate
from distmeta.storage import Location
from distmeta.tasks import TaskBatch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs here")


def step(m: Method, batch: TaskBatch, loader: Loader, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a method predicts, its meta-gradient, and what a meta-update, or a closed form's sweeps, make of it.

    In float32 not the update: Adam's first one is the sign of each number, noise included.
    """
    m, found = m.to(device) if m.sweeps else m.to(device, dtype), dict[str, Tensor]()
    test = next(iter(loader.evaluation())).to(device, None if m.sweeps else dtype)
    if m.sweeps:
        fit_closed_form(m, lambda sweep: loader.evaluation())
    else:
        batch = batch.to(device, dtype)
        update = MetaUpdate(m, TrainOptions(lr=1e-3), Exchange(), 1)
        update.local(batch)
        found["gradient"] = update.flat.clone()
        if dtype == torch.float64:
            update.apply(batch, 0)
    with torch.no_grad():
        found["scores"] = torch.cat([s.flatten() for s in m.eval().predict(m.adapt(test), test)])
    return {k: v.detach().cpu().double() for k, v in {**m.state_dict(), **found}.items()}


@needs_gpu
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_cpus(name: str, suits: Callable[[str], Location]) -> None:
    world = World(suits(name))
    loader = world.loader("train")
    batch = next(iter(loader.epoch(0)))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        here, there = (step(world.method(name), batch, loader, where, dtype) for where in ("cpu", "cuda"))
        for key, value in here.items():
            assert (there[key] - value).norm() <= tolerance * value.norm(), f"{name}, {dtype}: {key}"


def command(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


def errors(run: Path) -> float:
    return json.loads((run / "evaluation.json").read_text())["cohorts"]["all"]["mae"]


@needs_gpu
@pytest.mark.parametrize("name", ["melu", "hml", "mamo", "at-paml", "cmml-film", "als"])
def test_trained_resumed_and_evaluated(name: str, small: Location, tmp_path: Path) -> None:
    """As on the CPU, up to what float32 sums in another order come to; on with it on a CPU as well."""
    small_ = ("--data", small, "--batch-size", 32, "--threads", 1, "--no-floors")
    command("train", name, *small_, "--epochs", 2, "--run", tmp_path / "cpu")
    command("train", name, *small_, "--epochs", 1, "--run", tmp_path / "gpu", "--gpu")
    command("train", "--run", tmp_path / "gpu", "--resume", "--epochs", 2)
    assert errors(tmp_path / "gpu") == pytest.approx(errors(tmp_path / "cpu"), abs=0.02)
    command("evaluate", "--run", tmp_path / "gpu", "--no-gpu")
    command("train", "--run", tmp_path / "gpu", "--resume", "--epochs", 3, "--no-gpu")


@needs_gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision_learns_as_well(precision: str, small: Location, tmp_path: Path) -> None:
    flags = ("--data", small, "--batch-size", 32, "--epochs", 3, "--threads", 1, "--no-floors", "--gpu")
    command("train", "melu", *flags, "--run", tmp_path / "float32")
    command("train", "melu", *flags, "--run", tmp_path / precision, "--precision", precision)
    assert errors(tmp_path / precision) == pytest.approx(errors(tmp_path / "float32"), abs=0.03)


@needs_gpu
def test_rounded_products_are_those_of_the_cpu() -> None:
    from distmeta.adaptation import precision

    a, b = torch.randn(70, 50), torch.randn(50, 30)
    with precision.taken("bf16", torch.device("cpu")):
        here = precision.matmul(a, b)
    with precision.taken("bf16", torch.device("cuda")):
        there = precision.matmul(a.cuda(), b.cuda())
    assert there.dtype == torch.float32
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-5)


@needs_gpu
def test_nccl_alone(small: Location, tmp_path: Path) -> None:
    """One Ray Train worker on a GPU comes to what this process comes to on it."""
    _with_workers(small, tmp_path, 1)


@needs_two
def test_nccl_between_two(small: Location, tmp_path: Path) -> None:
    """Two workers on two GPUs come to what one process comes to."""
    _with_workers(small, tmp_path, 2)


def _with_workers(small: Location, tmp_path: Path, workers: int) -> None:
    flags = ("--data", small, "--batch-size", 32, "--epochs", 2, "--threads", 1, "--no-floors", "--gpu")
    command("train", "mamo", *flags, "--run", tmp_path / "one")
    words = [*flags, "--run", tmp_path / "several", "--workers", workers]
    done = subprocess.run([sys.executable, "-m", "jobs.train", "mamo", *map(str, words)], check=False)
    assert done.returncode == 0
    assert errors(tmp_path / "several") == pytest.approx(errors(tmp_path / "one"), abs=0.02)


@needs_gpu
def test_the_benchmark_records_the_share_of_the_peak(tmp_path: Path) -> None:
    command("benchmark", "adaptation", "--gpu", "--quick", "--steps", 1, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["device"] for row in rows} == {torch.cuda.get_device_name()}
    assert all(0 < row["percent_of_peak"] < 100 for row in rows)


@needs_gpu
def test_packed_batches_arrive_whole(small: Location) -> None:
    _, dataset, table = tiny.setting(small, "melu")
    given: dict[str, Any] = {"seed": 0}
    here = Loader(table, dataset, "train", 16, **given).epoch(0)
    there = Loader(table, dataset, "train", 16, device=torch.device("cuda", 0), **given).epoch(0)
    for a, b in zip(here, there, strict=True):
        assert b.items.is_cuda
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.support.label, y.support.label.cpu())
            assert torch.equal(x.query.item, y.query.item.cpu())
            assert torch.equal(x.query.mask, y.query.mask.cpu())


SHARES = """
import os, sys
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
import ray
from distmeta.errors import UserError
from distmeta.parallel import cluster, hosting

ray.init("local", num_cpus=6, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
assert [hosting.trials_now(0, 1, share) for share in (0.0, 0.25, 0.5, 1.0)] == [6, 4, 2, 1]
with cluster.connected(1, 1, 0.25, 0), cluster.connected(1, 1, 1.0, 0):
    pass
for needed, share in ((2, 1.0), (5, 0.25)):
    try:
        with cluster.connected(needed, 1, share, 0, lambda _: None):
            sys.exit("connected")
    except UserError as e:
        print(e)


@ray.remote
class Trial:
    def gpus(self):
        return ray.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"]


wanted = hosting.resources(0, 1, 0.5)
trials = [Trial.options(num_cpus=wanted["CPU"], num_gpus=wanted["GPU"]).remote() for _ in range(3)]
print(ray.get([t.gpus.remote() for t in trials[:2]]))  # both at once, on one
print(ray.wait([trials[2].gpus.remote()], timeout=1)[0])  # and no third
"""


def test_trials_share_a_gpu() -> None:
    """On a cluster that says it has a GPU: as many trials side by side as shares, and a sentence where it has fewer."""
    done = subprocess.run([sys.executable, "-c", SHARES], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fewer, less, *seen = done.stdout.splitlines()
    assert fewer.startswith("2 workers need 2 GPUs, the cluster has 1 after 0 s; use fewer --workers")
    assert less.startswith("5 workers need 1.25 GPUs, the cluster has 1 after 0 s")
    assert seen == ["[([0], '0'), ([0], '0')]", "[]"]
