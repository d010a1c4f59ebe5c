"""The RayJobs of k8s/, their entrypoints unchanged, on nodes with the resources and environment that they state.

Nodes are started as KubeRay's operator does it, `ray start` with what it makes of a group, and an entrypoint is handed
to `ray job submit` in a shell, as the submitter's Pod does it. KubeRay gives each job a cluster of its own; here one
job follows another on a cluster, whose start takes longer than the jobs.
"""

import contextlib
import dataclasses
import hashlib
import re
import shutil
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
from emulation import RAY, REPO, SOON_DEAD, TOKEN, Head, environment, head, hides, kill, until

from distmeta.data.protocols import protocol_options
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import make
from distmeta.parallel import rundir, trainer
from distmeta.storage import Location

EPOCHS = 8
"""What the train job's entrypoint asks for."""
_PATIENCE = 240
"""Seconds to wait for what should take a few, on a machine that has much else to do."""


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


class Cluster:
    """What the operator makes of a store's RayJobs: a head, and the Pods of each job's worker groups."""

    def __init__(self, store: Store, ray: Head) -> None:
        self.store, self.ray = store, ray

    def fill(self, job: manifests.Document) -> None:
        """Have the Pods that a job starts with."""
        for group in manifests.groups(job)[1:]:
            while len(self.ray.nodes) < group.replicas:
                self.ray.join(options(group))

    def submit(self, name: str) -> "Job":
        """Start a job: its Pods, and its entrypoint at once, which waits for them."""
        job = manifests.job(self.store.overlay, name)
        assert manifests.groups(job)[0] == manifests.groups(manifests.job(self.store.overlay, "prepare"))[0]
        self.fill(job)
        output = self.ray.cwd / name
        # the submitter's Pod has the token, and nothing of the ConfigMaps
        env = environment(self.ray.cwd, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        line = f"{RAY} job submit --address {self.ray.api} --submission-id {name} -- {manifests.entrypoint(job)}"
        with open(output, "w") as out:
            return Job(
                output, subprocess.Popen(["bash", "-ce", line], env=env, cwd=self.ray.cwd, stdout=out, stderr=out)
            )


@dataclasses.dataclass(frozen=True)
class Job:
    """An entrypoint under way."""

    output: Path
    process: "subprocess.Popen[bytes]"

    def text(self) -> str:
        return self.output.read_text()

    def wait(self, true: Callable[[], Any], what: str) -> None:
        """Until it is true; fails where the job ends before."""

        def look() -> Any:
            assert self.process.poll() is None, f"{what}: not before it ended\n{self.text()}"
            return true()

        until(look, f"waited too long for {what}", _PATIENCE)

    def end(self) -> str:
        """What a job says that succeeds."""
        assert self.process.wait(_PATIENCE) == 0, self.text()
        assert "Traceback" not in self.text(), self.text()
        return self.text()


def options(group: manifests.Group) -> list[str]:
    """The flags of `ray start` that the operator makes of a group's limits and rayStartParams."""
    limits = {"num-cpus": group.cpus, "num-gpus": group.gpus, "memory": group.memory}
    return [f"--{k}={v}" for k, v in (limits | dict(group.start)).items()]


@contextlib.contextmanager
def cluster(store: Store, name: str) -> Iterator[Cluster]:
    """A head as the RayJobs state it; at the end everything of it is deleted at once."""
    documents = manifests.rendered(store.overlay)
    job = manifests.job(store.overlay, "train")
    stated = [manifests.environment(documents, group) for group in manifests.groups(job)]
    assert [*map(stated[0].__eq__, stated)] == [True] * len(stated), "nodes inherit the head's settings here"
    assert manifests.cluster(job)["authOptions"] == {"mode": "token"}
    env = {
        **stated[0],
        **SOON_DEAD,  # else half a minute goes by before a lost node is missed
        **store.env,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",  # as in the image: its `python`, its packages
        "PYTHONPATH": str(REPO),
    }
    place = store.home / name
    place.mkdir()
    with head(place, options(manifests.groups(job)[0]), **env) as ray:
        try:
            yield Cluster(store, ray)
        finally:
            kill(ray.env)


def begun(made: Cluster) -> Job:
    """The train job in the middle, its two workers on two nodes."""
    job = made.submit("train")
    job.wait(lambda: len(made.store.checkpoints()) > 1, "two epochs")
    assert [len(node.workers()) for node in made.ray.nodes] == [1, 1]
    return job


def a_lost_node(store: Store) -> None:
    """Mid-training a node vanishes and the operator starts another: the job goes on by itself."""
    with cluster(store, "first") as made:
        made.submit("prepare").end()
        job = begun(made)
        made.ray.nodes.pop().vanish()
        made.fill(manifests.job(store.overlay, "train"))
        text = job.end()
        assert " died" in text or " lost the others" in text
        assert "going on from step" in text


def a_lost_cluster(store: Store) -> None:
    """Mid-training all is gone, the command too; the retry, which is the same command on a new cluster, goes on."""
    with cluster(store, "first") as made:
        made.submit("prepare").end()
        job = begun(made)
        kill(made.ray.env)
        assert job.process.wait(60) != 0
    assert not (store / "runs/first/run.json").exists()
    with cluster(store, "second") as made:
        text = made.submit("train").end()
        assert "going on from step" in text
        assert "epoch 1/" not in text
        assert f"epoch {EPOCHS}/{EPOCHS}" in text
        evaluate(made)


def evaluate(made: Cluster) -> None:
    """The evaluate job comes to what training ended with."""
    before = made.store.evaluation()["cohorts"]["all"]
    (made.store / "runs/first/evaluation.json").remove()
    made.submit("evaluate").end()
    assert made.store.evaluation()["cohorts"]["all"] == pytest.approx(before, rel=1e-4)


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
            path, s3 = stores
            for done in (pool.submit(a_lost_node, path), pool.submit(a_lost_cluster, s3)):
                done.result()
        whole = undisturbed(path, Location.of(tmp_path / "plain/runs/first").make_dir())
        assert path.final() == whole != {}
        assert s3.final() == whole
        assert s3.evaluation()["cohorts"].keys() == path.evaluation()["cohorts"].keys()
        for cohort, found in s3.evaluation()["cohorts"].items():  # one evaluated by two workers, one by a job of one
            assert found == pytest.approx(path.evaluation()["cohorts"][cohort], rel=1e-6), cohort


@pytest.mark.skipif(not hides(), reason="unshare(1) may not give a process mounts of its own here")
def test_a_path_that_one_node_does_not_see(small, tmp_path):
    hidden = tmp_path / "hidden"
    shutil.copytree(small.path, hidden / "data")
    with head(tmp_path, ("--num-cpus=1",), RAY_AUTH_MODE="disabled") as made:
        made.join(hidden=hidden)
        for data, run, what in ((small, hidden / "run", "run"), (hidden / "data", tmp_path / "run", "dataset")):
            words = ["-m", "jobs.train", "melu", "--data", str(data), "--run", str(run), "--workers", "2"]
            env = {**made.env, "RAY_ADDRESS": made.gcs}
            done = subprocess.run([sys.executable, *words], cwd=REPO, env=env, capture_output=True, text=True)
            assert done.returncode == 2, done.stdout + done.stderr
            lost = run if what == "run" else data
            assert re.fullmatch(rf"error: {lost}: a worker on \S+ does not see this {what}; .*\n", done.stderr)
            assert not (run / "run.json").exists()
