"""The RayJobs of k8s/, their entrypoints unchanged, on nodes with the resources and environment that they state.

Each job has a cluster of its own, as KubeRay gives it one: `ray start` with what the operator makes of its groups, and
the entrypoint handed to `ray job submit` in a shell, as the submitter's Pod does it.
"""

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import manifests
import pytest
import s3server
import tiny
from emulation import RAY, REPO, SOON_DEAD, TOKEN, Head, environment, head, kill, until

from distmeta.data.protocols import protocol_options
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import make
from distmeta.parallel import rundir, trainer
from distmeta.storage import Location

EPOCHS = 8
"""What the train job's entrypoint asks for."""


@dataclasses.dataclass(frozen=True)
class Store:
    """An overlay of k8s/, and the storage that is to stand for the one it names."""

    overlay: str
    root: str
    env: dict[str, str]
    home: Path
    """A folder for logs."""

    def __truediv__(self, name: str) -> Location:
        return Location.of(f"{self.root}/{name}")

    def checkpoints(self) -> list[Location]:
        """Complete ones of the run."""
        return [c for c in (self / "runs/first/checkpoints").children() if (c / "checkpoint.json").exists()]

    def final(self) -> dict[str, str]:
        """sha256 of the last checkpoint's tensors."""
        last = self.checkpoints()[-1]
        tensors = [f for f in last.children() if f.name.endswith(".safetensors")]
        return {f"{last.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in tensors}

    def evaluation(self) -> Any:
        return (self / "runs/first/evaluation.json").read_json()


class Job:
    """A RayJob's cluster, and its entrypoint under way on it."""

    def __init__(self, store: Store, name: str, cluster: Head, groups: list[manifests.Group]) -> None:
        self.cluster, self.groups = cluster, groups
        for group in groups[1:]:
            for _ in range(group.replicas):
                self.join(group)
        self.output = cluster.cwd / "output"
        entrypoint = manifests.entrypoint(manifests.job(store.overlay, name))
        # the submitter's Pod has the token, and nothing of the ConfigMaps
        env = environment(cluster.cwd, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        with open(self.output, "w") as out:
            line = f"{RAY} job submit --address {cluster.api} --submission-id {name} -- {entrypoint}"
            self.process = subprocess.Popen(["bash", "-ce", line], env=env, cwd=cluster.cwd, stdout=out, stderr=out)

    def join(self, group: manifests.Group) -> None:
        """Start a Pod of a worker group."""
        self.cluster.join(options(group))

    def text(self) -> str:
        return self.output.read_text()

    def wait(self, true: Callable[[], Any], what: str) -> None:
        """Until it is true; fails where the job ends before."""

        def look() -> Any:
            assert self.process.poll() is None, f"{what}: not before it ended\n{self.text()}"
            return true()

        until(look, what, 150)

    def end(self) -> str:
        """What a job says that succeeds."""
        assert self.process.wait(150) == 0, self.text()
        assert "Traceback" not in self.text(), self.text()
        return self.text()


def options(group: manifests.Group) -> list[str]:
    """The flags of `ray start` that the operator makes of a group's limits and rayStartParams."""
    limits = {"num-cpus": group.cpus, "num-gpus": group.gpus, "memory": group.memory}
    return [f"--{k}={v}" for k, v in (limits | dict(group.start)).items()]


@contextlib.contextmanager
def running(store: Store, name: str, turn: str = "") -> Iterator[Job]:
    """A RayJob on a cluster of its own; at the end everything of it is deleted at once."""
    documents = manifests.rendered(store.overlay)
    job = manifests.named(documents, "RayJob", f"distmeta-{name}")
    groups = manifests.groups(job)
    stated = {json.dumps(manifests.environment(documents, g)) for g in groups}
    assert len(stated) == 1, "head and workers with different settings: `ray start` below passes on the head's"
    assert manifests.cluster(job)["authOptions"] == {"mode": "token"}
    env = {
        **json.loads(stated.pop()),
        **SOON_DEAD,  # else half a minute goes by before a lost node is missed
        **store.env,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",  # as in the image: its `python`, its packages
        "PYTHONPATH": str(REPO),
    }
    place = store.home / f"{name}{turn}"
    place.mkdir()
    with head(place, options(groups[0]), **env) as cluster:
        made = Job(store, name, cluster, groups)
        try:
            yield made
        finally:
            kill(cluster.env)
            made.process.kill()


def a_lost_node(store: Store) -> None:
    """Mid-training a node vanishes and the operator starts another: the job goes on by itself."""
    with running(store, "train") as job:
        job.wait(lambda: len(store.checkpoints()) > 1, "two epochs")
        lost, _ = nodes = job.cluster.nodes
        assert [len(n.workers()) for n in nodes] == [1, 1], "a worker on each node"
        lost.vanish()
        job.join(job.groups[1])
        text = job.end()
    assert " died" in text or " lost the others" in text
    assert "going on from step" in text


def a_lost_cluster(store: Store) -> None:
    """Mid-training all is gone, the command too; the retry, which is the same command on a new cluster, goes on."""
    with running(store, "train") as job:
        job.wait(lambda: len(store.checkpoints()) > 1, "two epochs")
        assert [len(n.workers()) for n in job.cluster.nodes] == [1, 1], "a worker on each node"
        kill(job.cluster.env)
        assert job.process.wait(60) != 0
    assert not (store / "runs/first/run.json").exists()
    with running(store, "train", "-again") as job:
        text = job.end()
    assert "going on from step" in text
    assert "epoch 1/" not in text
    assert f"epoch {EPOCHS}/{EPOCHS}" in text


def through(store: Store, fault: Callable[[Store], None]) -> None:
    """prepare, train with a fault, evaluate: as k8s/README.md has a user apply them."""
    with running(store, "prepare") as job:
        job.end()
    fault(store)
    before = store.evaluation()
    with running(store, "evaluate") as job:
        job.end()
    found = store.evaluation()
    assert found["cohorts"]["all"] == pytest.approx(before["cohorts"]["all"], rel=1e-4)


def undisturbed(store: Store, where: Location) -> dict[str, str]:
    """What two workers that are threads of this process come to, with the run's config and data."""
    config = rundir.stored(store / "runs/first")
    place = Location.of(config.data.data)
    table = make(place, config.data.protocol, config.data.split_seed, protocol_options(config.data))
    dataset = table.seen(Dataset.open(place))
    for done in tiny.together(
        2, lambda exchange: trainer.train(config, where, dataset, place, table, exchange, lambda _: None)
    ):
        done.result()
    return Store("", str(where.parent.parent), {}, Path()).final()


def test_the_jobs_on_both_storages(tmp_path, monkeypatch):
    with s3server.serve() as server:
        server.call("PUT", "/distmeta")
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        stores = []
        for overlay, root, env in (
            ("cpu", str(tmp_path / "store"), {"DISTMETA_STORE": str(tmp_path / "store")}),
            ("s3", "s3://distmeta", {k: v for k, v in server.env.items() if k != "AWS_REGION"}),
        ):
            home = tmp_path / overlay
            home.mkdir()
            stores.append(Store(overlay, root, env, home))
        with ThreadPoolExecutor(2) as pool:  # mostly they wait
            for done in [
                pool.submit(through, s, f) for s, f in zip(stores, (a_lost_node, a_lost_cluster), strict=True)
            ]:
                done.result()
        path, s3 = stores
        whole = undisturbed(path, Location.of(tmp_path / "plain/runs/first").make_dir())
        assert path.final() == whole != {}
        assert s3.final() == whole
        assert s3.evaluation()["cohorts"] == path.evaluation()["cohorts"]
