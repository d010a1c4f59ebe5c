"""k8s/: what the jobs run reaches the program as meant, and the image has the versions that the manifests say."""

import os
import re
import shlex
import subprocess
import tomllib
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import manifests
import pytest
from click.testing import CliRunner
from manifests import JOBS, K8S, OVERLAYS, rendered
from packaging.requirements import Requirement

from distmeta import cli
from distmeta.commands import prepare, search, search_plan, train
from distmeta.errors import UserError
from distmeta.storage import Location

MODULES = {"prepare": "jobs.prepare", "train": "jobs.train", "tune": "tune.search",
           "evaluate": "jobs.evaluate", "reproduce": "jobs.reproduce"}  # fmt: skip


def _submitted(entrypoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What Ray's Jobs API is given: the operator's command, in its bash, with Ray's own command line for `ray`.

    KubeRay, ray-operator/controllers/ray/common/job.go: BuildJobSubmitCommand; the words are joined by spaces.
    """
    from ray.dashboard.modules.job import cli as ray_cli

    says = 'ray() { printf "%s\\0" "$@"; }; '
    command = f"{says}ray job submit --address http://head:8265 --no-wait --submission-id a -- {entrypoint} ;"
    done = subprocess.run(["bash", "-ce", command], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\0")[:-1]
    monkeypatch.setattr(ray_cli, "_get_sdk_client", lambda *_, **__: _Client())
    result = CliRunner().invoke(ray_cli.submit, words[2:])
    assert isinstance(result.exception, _Given), result.output
    return str(result.exception)


class _Given(Exception):
    """The entrypoint as the Jobs API gets it."""


class _Client:
    def submit_job(self, *, entrypoint: str, **_: Any) -> str:
        raise _Given(entrypoint)


def _arguments(command: str, environment: dict[str, str], folder: Path) -> list[str]:
    """What `python` is called with where Ray's job supervisor runs `command`: Popen(command, shell=True)."""
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    python.chmod(0o755)
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment | path)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_entrypoints_arrive(overlay: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through both shells: each word is one, and paths are those of the store that the head is told of."""
    documents = rendered(overlay)
    for job in (d for d in documents if d["kind"] == "RayJob"):
        entrypoint = manifests.entrypoint(job)
        head = manifests.groups(job)[0]
        environment = manifests.environment(documents, head)
        arguments = _arguments(_submitted(entrypoint, monkeypatch), environment, tmp_path)
        (script,) = re.fullmatch(r"sh -c '(.*)'", entrypoint).groups()  # type: ignore[union-attr]
        store = environment["DISTMETA_STORE"]
        assert ["exec", "python", *arguments] == [w.replace("$DISTMETA_STORE", store) for w in shlex.split(script)]
        places = [w for w in arguments if store in w]
        assert places
        assert all(re.fullmatch(rf"(\S+=)?{store}/[\w/-]+", w) for w in places)
        name = job["metadata"]["labels"]["app.kubernetes.io/component"]
        assert arguments[:2] == ["-m", MODULES[name]]


def _parsed(words: list[str], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the real command read `python WORDS`, in an empty store; UserError where it does not understand."""
    module, rest = words[1], words[2:]
    if module == "jobs.train":
        assert train.parse(rest).train.run.startswith(f"{store}/")
    elif module == "tune.search":
        given = vars(search._parser().parse(rest))
        assert search_plan.settle(given, Location.of(given["out"])).data.startswith(f"{store}/")
    elif module == "jobs.prepare":
        monkeypatch.setattr(prepare, "_make", lambda out, make: int(not out.startswith(f"{store}/")))
        assert cli._command(["prepare", *rest]) == 0
    else:  # understood, it is the store's fault
        try:
            cli._command([module.removeprefix("jobs."), *rest])
        except UserError as e:
            if not str(e).startswith(f"{store}/"):
                raise


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_the_program_understands_its_entrypoint(
    overlay: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (script,) = shlex.split(manifests.entrypoint(manifests.job(overlay, name)))[2:]
    words = [w.replace("$DISTMETA_STORE", str(tmp_path)) for w in shlex.split(script)[2:]]
    _parsed(words, tmp_path, monkeypatch)
    flag = [w for w in words if w.startswith("--")][-1]
    with pytest.raises(UserError, match=f"{flag}x"):
        _parsed([f"{w}x" if w == flag else w for w in words], tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_have_the_nodes_that_they_ask_for(overlay: str) -> None:
    """Else they wait for --wait seconds, on an autoscaler that may bring none, and fail."""
    counted = 0
    for job in (d for d in rendered(overlay) if d["kind"] == "RayJob"):
        words = shlex.split(shlex.split(manifests.entrypoint(job))[2])
        flags = dict(pairwise(words))
        _, group = manifests.groups(job)
        if workers := int(flags.get("--workers", 0)):
            counted += 1
            threads = int(flags.get("--threads", 1))
            assert threads <= group.cpus
            assert group.least >= workers  # one to a node: the smallest node has room for one
            assert group.most >= workers
        if "--jobs" in flags:  # processes on the head, of about 0.6 GB each
            head = manifests.groups(job)[0]
            assert int(flags["--jobs"]) * (600 << 20) < head.memory / 2
        assert ("--retried" in words) is (words[3] in ("jobs.train", "tune.search"))
    assert counted == 3


def _argument(name: str) -> str:
    (value,) = re.findall(rf"^ARG {name}=(\S+)$", (K8S / "Dockerfile").read_text(), re.MULTILINE)
    return value


def _pinned() -> dict[str, Requirement]:
    project = tomllib.loads((K8S.parent / "pyproject.toml").read_text())["project"]
    found = {r.name: r for r in map(Requirement, project["dependencies"])}
    assert _argument("PYTHON").count(".") == 2
    assert Requirement(f"python{project['requires-python']}").specifier.contains(_argument("PYTHON"))
    return found


def test_versions_agree() -> None:
    """Of the manifests, the image and the project: a cluster refuses a program with another Ray."""
    pinned = _pinned()
    assert pinned["ray"].specifier.contains(_argument("RAY"))
    assert pinned["torch"].specifier.contains(_argument("TORCH"))
    assert pinned["ray"].extras == {"default", "train", "tune"}  # the Dockerfile repeats them
    assert '"ray[default,train,tune]==${RAY}"' in (K8S / "Dockerfile").read_text()
    project = tomllib.loads((K8S.parent / "pyproject.toml").read_text())["project"]["version"]
    for overlay in OVERLAYS:
        for document in rendered(overlay):
            if document["kind"] in ("RayCluster", "RayJob"):
                assert manifests.cluster(document)["rayVersion"] == _argument("RAY")
                for group in manifests.groups(document):
                    image = group.template["spec"]["containers"][0]["image"]
                    assert image.removesuffix("-cuda").endswith(f":{project}")


@pytest.mark.parametrize("name", ["RAY", "TORCH"])
def test_the_image_has_what_is_tested(name: str) -> None:
    here = version(name.lower()).partition("+")[0]
    if here != _argument(name):
        pytest.skip(f"the image has {name.lower()} {_argument(name)}, and {here} is installed here: nothing tests it")


def test_the_image_takes_the_packages() -> None:
    """What setuptools would install is copied, and the build's context has it and no more."""
    text = (K8S / "Dockerfile").read_text()
    assert re.search(r"^FROM python:\$\{PYTHON\}-slim-\w+$", text, re.MULTILINE)
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["1000:1000"]
    project = tomllib.loads((K8S.parent / "pyproject.toml").read_text())
    packages = [p.rstrip("*") for p in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)).split()
    assert set(copied) == {
        *packages,
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    ignored = (K8S / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert all((K8S.parent / name).exists() for name in copied)
