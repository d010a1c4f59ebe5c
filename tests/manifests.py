"""k8s/ as kubectl renders it, and what its jobs' Pods are, for the tests of manifests and of an emulated cluster."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

Document = dict[str, Any]

K8S = Path(__file__).parent.parent / "k8s"
OVERLAYS = ("cpu", "gpu", "s3", "kueue")
JOBS = ("prepare", "train", "tune", "evaluate", "reproduce")

_UNITS = {"": 1, "m": Decimal("0.001"), **{u + "i": 1024**i for i, u in enumerate("KMGT", 1)}}
_UNITS |= {u: 1000**i for i, u in enumerate("kMGT", 1)}


@dataclass(frozen=True)
class Group:
    """Pods of one kind, each a node of the Ray cluster."""

    name: str
    """`head`, or the worker group's."""
    replicas: int
    """That it starts with; the head is one."""
    least: int
    most: int
    cpus: int
    """Ray's, each: `num-cpus` where it is said, else the limit, as the operator takes it."""
    gpus: int
    memory: int
    """Bytes, each: the limit, which the operator hands to `ray start --memory`."""
    start: Mapping[str, str]
    """rayStartParams as written: what the operator makes flags of `ray start` of."""
    template: Document
    """The Pods' template."""


@cache
def _text(overlay: str) -> str:
    return render(K8S / "overlays" / overlay)


def render(folder: Path) -> str:
    """What `kubectl kustomize FOLDER` prints; skips the test where there is no kubectl."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: it renders the manifests (no cluster is asked)")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(overlay: str) -> list[Document]:
    """The documents of k8s/overlays/OVERLAY, each time new ones, so that a test may change them."""
    return list(yaml.safe_load_all(_text(overlay)))


def named(documents: Sequence[Document], kind: str, name: str) -> Document:
    """The one document of that kind and name."""
    (found,) = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def job(overlay: str, name: str) -> Document:
    """The RayJob of one of JOBS."""
    return named(rendered(overlay), "RayJob", f"distmeta-{name}")


def entrypoint(job: Document) -> str:
    """What the operator hands to `ray job submit -- ENTRYPOINT` in a bash, and Ray to a shell on the head.

    The second expands what the first leaves; whoever takes this past the first, to a JobSubmissionClient say, gives
    it as it is: it is a command for a shell.
    """
    return job["spec"]["entrypoint"].strip()


def cluster(document: Document) -> Document:
    """The cluster's spec, of a RayJob or a RayCluster."""
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


def groups(document: Document) -> list[Group]:
    """The head, then the worker groups, of a RayJob or a RayCluster."""
    spec = cluster(document)
    return [
        _group("head", {**spec["headGroupSpec"], "replicas": 1}),
        *(_group("", g) for g in spec["workerGroupSpecs"]),
    ]


def _group(name: str, spec: Document) -> Group:
    limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
    start = spec["rayStartParams"]
    count = spec["replicas"]
    return Group(
        name=name or spec["groupName"],
        replicas=count,
        least=spec.get("minReplicas", count),
        most=spec.get("maxReplicas", count),
        cpus=int(start.get("num-cpus", quantity(limits["cpu"]))),
        gpus=sum(int(quantity(v)) for k, v in limits.items() if k.endswith("gpu")),
        memory=int(quantity(limits["memory"])),
        start=start,
        template=spec["template"],
    )


def quantity(text: str) -> Decimal:
    """Kubernetes' `500m`, `4`, `16Gi` as a number."""
    number = text.rstrip("".join({c for unit in _UNITS for c in unit}))
    return Decimal(number) * _UNITS[text.removeprefix(number)]


def environment(documents: Sequence[Document], pod: Group | Document) -> dict[str, str]:
    """What the first container of a group's Pods, or of a Pod template, finds in its environment from these documents.

    That is its `env` and its ConfigMaps; what comes from Secrets, or is added by the operator, is not in it.
    """
    container = (pod.template if isinstance(pod, Group) else pod)["spec"]["containers"][0]
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= named(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    return found | {e["name"]: e["value"] for e in container.get("env", []) if "value" in e}
