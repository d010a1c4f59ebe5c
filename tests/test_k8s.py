"""k8s/: every overlay renders, every document is valid, and what one document says of another is so."""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import kuberay
import manifests
import pytest
import yaml
from manifests import JOBS, K8S, OVERLAYS, Document, named, quantity, rendered

from distmeta.parallel import cluster

README = (K8S / "README.md").read_text()


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """The overlay that k8s/README.md shows for a GPU cluster with a bucket."""
    folder = tmp_path_factory.mktemp("overlay")
    (text,) = re.findall(r"```yaml\n(apiVersion: kustomize[^`]*)```", README)
    here = os.path.relpath(K8S, folder)
    (folder / "kustomization.yaml").write_text(text.replace("../..", here))
    return list(yaml.safe_load_all(manifests.render(folder)))


@pytest.fixture(scope="module", params=[*OVERLAYS, "gpu and s3"])
def documents(request: pytest.FixtureRequest) -> list[Document]:
    """An overlay's documents."""
    return request.getfixturevalue("composed") if request.param == "gpu and s3" else rendered(request.param)


def test_every_document_is_valid(documents: list[Document]) -> None:
    kinds = {d["kind"] for d in documents}
    assert {"RayCluster", "RayJob", "ConfigMap", "NetworkPolicy", "ServiceAccount"} <= kinds
    names = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(names) == len(set(names))
    assert [f"{d['kind']} {d['metadata']['name']}: {e}" for d in documents for e in kuberay.errors(d)] == []


def _job(change: Callable[[Document], object]) -> Callable[[list[Document]], Document]:
    def changed(documents: list[Document]) -> Document:
        job = named(documents, "RayJob", "distmeta-train")
        change(job)
        return job

    return changed


def _head(document: Document) -> Document:
    return manifests.cluster(document)["headGroupSpec"]["template"]


def _policy(documents: list[Document]) -> Document:
    found = named(documents, "NetworkPolicy", "distmeta")
    found["spec"]["egres"] = found["spec"].pop("egress")
    return found


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (_job(lambda j: j["spec"].update(backofLimit=1)), "backofLimit"),
        (_job(lambda j: j["spec"].update(backoffLimit="two")), "two"),
        (_job(lambda j: j["spec"]["rayClusterSpec"].pop("headGroupSpec")), "headGroupSpec"),
        (_job(lambda j: j["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens")), "tokens"),
        (_job(lambda j: _head(j)["spec"]["containers"][0].update(imagePullPolice="Never")), "imagePullPolice"),
        (_job(lambda j: _head(j)["spec"]["containers"][0]["resources"].update(limit={})), "limit"),
        (_job(lambda j: _head(j)["metadata"]["labels"].update(a=1)), "1 is not of type"),
        (_job(lambda j: j["metadata"].update(label={})), "label"),
        (_policy, "egres"),
    ],
)
def test_a_mistake_is_found(broken: Callable[[list[Document]], Document], said: str) -> None:
    found = kuberay.errors(broken(rendered("cpu")))
    assert any(said in text for text in found), found


def _templates(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for document in documents:
        if document["apiVersion"].startswith("ray.io/"):
            for where, template in kuberay.pod_templates(document):
                yield f"{document['metadata']['name']} {where}", template


def test_pods_are_restricted_and_bounded(documents: list[Document]) -> None:
    """Pod Security `restricted`, and a root file system that is read-only; requests and limits."""
    checked = 0
    for where, template in _templates(documents):
        pod = template["spec"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert pod["securityContext"]["runAsNonRoot"] is True, where
        assert pod["securityContext"]["runAsUser"] >= 1000, where
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys(), where
        assert {k for v in pod["volumes"] for k in v if k != "name"} <= {"emptyDir", "persistentVolumeClaim"}, where
        assert pod["automountServiceAccountToken"] is where.endswith("head"), where
        for container in pod["containers"]:
            _check_container(container, where)
            assert {m["name"] for m in container["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}, where
            checked += 1
    for document in documents:
        if document["kind"] in ("RayCluster", "RayJob"):
            spec = manifests.cluster(document)
            _check_container(spec["autoscalerOptions"], "autoscaler")
            volumes = {v["name"] for v in _head(document)["spec"]["volumes"]}
            assert {m["name"] for m in spec["autoscalerOptions"]["volumeMounts"]} <= volumes
    assert checked >= 2 + 3 * (len(JOBS) - 1)


def _check_container(container: Document, where: str) -> None:
    context = container["securityContext"]
    assert context["allowPrivilegeEscalation"] is False, where
    assert context["readOnlyRootFilesystem"] is True, where
    assert context["capabilities"] == {"drop": ["ALL"]}, where
    assert not {"privileged", "procMount"} & context.keys(), where
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert requests.keys() == limits.keys() >= {"cpu", "memory"}, where
    assert all(quantity(requests[k]) <= quantity(limits[k]) for k in limits), where
    assert requests["memory"] == limits["memory"], f"{where}: it may be evicted for what it was promised"
    assert "/tmp" in {m["mountPath"] for m in container["volumeMounts"]}, where


def test_memory_holds_the_object_store(documents: list[Document]) -> None:
    """The store lies in /dev/shm, which is of the container's memory and must be larger than Ray's share of it."""
    for document in documents:
        if document["kind"] not in ("RayCluster", "RayJob"):
            continue
        for group in manifests.groups(document):
            (shm,) = [v for v in group.template["spec"]["volumes"] if v["name"] == "shm"]
            mounts = {m["name"]: m["mountPath"] for m in group.template["spec"]["containers"][0]["volumeMounts"]}
            assert mounts["shm"] == "/dev/shm"
            assert shm["emptyDir"]["medium"] == "Memory"
            size = quantity(shm["emptyDir"]["sizeLimit"])
            assert int(group.start["object-store-memory"]) < size < group.memory / 2
            assert group.least <= group.replicas <= group.most
    head = manifests.groups(named(documents, "RayCluster", "distmeta"))[0]
    assert (head.name, head.cpus) == ("head", 0)


def test_what_documents_name_exists(documents: list[Document]) -> None:
    there = {(d["kind"], d["metadata"]["name"]) for d in documents}
    for where, template in _templates(documents):
        assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in there, where
        for volume in template["spec"]["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in there, where
        for source in template["spec"]["containers"][0].get("envFrom", []):
            if "configMapRef" in source:
                assert ("ConfigMap", source["configMapRef"]["name"]) in there, where
            else:  # made by the user, or not at all where the service account has a role
                assert source["secretRef"]["optional"] is True, where


def test_jobs_are_chosen_by_a_label_and_have_the_cluster_of_the_interactive_one(documents: list[Document]) -> None:
    cluster = named(documents, "RayCluster", "distmeta")
    components = [d["metadata"]["labels"]["app.kubernetes.io/component"] for d in documents]
    assert set(components) <= {"settings", "cluster", *JOBS}
    for document in documents:
        kind, component = document["kind"], document["metadata"]["labels"]["app.kubernetes.io/component"]
        assert (component == "settings") == (kind not in ("RayCluster", "RayJob"))
        if kind == "RayJob":
            assert components.count(component) == 1
            assert document["metadata"]["name"] == f"distmeta-{component}"
            assert _shape(manifests.cluster(document)) == _shape(cluster["spec"])


def _shape(spec: Document) -> Document:
    counts = ("replicas", "minReplicas", "maxReplicas")
    workers = [{k: v for k, v in g.items() if k not in counts} for g in spec["workerGroupSpecs"]]
    return {k: v for k, v in spec.items() if k != "suspend"} | {"workerGroupSpecs": workers}


def test_a_retried_job_is_a_new_cluster_that_goes_away(documents: list[Document]) -> None:
    for spec in (d["spec"] for d in documents if d["kind"] == "RayJob"):
        assert spec["backoffLimit"] >= 1
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["submissionMode"] == "K8sJobMode"  # of which the security context of the submitter can be said
        assert manifests.cluster({"kind": "RayJob", "spec": spec})["authOptions"] == {"mode": "token"}


def _labels(template: Document, node: str) -> dict[str, str]:
    """The labels of a Pod that the operator makes: the template's, which win but for the last three, and its own.

    KubeRay, ray-operator/controllers/ray/common/pod.go, labelPod.
    """
    own = {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "kuberay", **template["metadata"].get("labels", {})}
    group = "headgroup" if node == "head" else "workers"
    return own | {"ray.io/node-type": node, "ray.io/group": group, "ray.io/cluster": "distmeta-train-x7k2p"}


def _selected(selector: Document, labels: dict[str, str]) -> bool:
    assert selector.keys() == {"matchLabels"}
    return selector["matchLabels"].items() <= labels.items()


def test_network_policies_select_what_the_operator_makes(documents: list[Document]) -> None:
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    job = named(documents, "RayJob", "distmeta-train")
    head, workers = manifests.groups(job)
    submitter = job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    pods = {
        "head": _labels(head.template, "head"),
        "worker": _labels(workers.template, "worker"),
        "submitter": submitter,
    }
    operator = {"app.kubernetes.io/name": "kuberay-operator"}  # the Helm chart's

    def ingress(to: str, labels: dict[str, str], port: int) -> bool:
        rules = [r for p in policies if "Ingress" in p["policyTypes"] and _selected(p["podSelector"], pods[to])
                 for r in p["ingress"]]  # fmt: skip
        return any(
            any(_selected(f["podSelector"], labels) for f in r["from"])
            and ("ports" not in r or port in [p["port"] for p in r["ports"]])
            for r in rules
        )

    def egress(of: str, port: int) -> bool:
        """To an address outside."""
        rules = [r for p in policies if "Egress" in p["policyTypes"] and _selected(p["podSelector"], pods[of])
                 for r in p["egress"]]  # fmt: skip
        return any("to" not in r and port in [p["port"] for p in r["ports"]] for r in rules)

    for to in pods:
        assert any("Ingress" in p["policyTypes"] and _selected(p["podSelector"], pods[to]) for p in policies)
        assert all(ingress(to, pods[of], 6379) for of in pods)
        assert not ingress(to, {"app": "another"}, 6379)
        assert not ingress(to, operator, 6379)
        assert egress(to, 53)
    assert ingress("head", operator, 8265)
    assert egress("head", 443)  # the API server
    bucket = named(documents, "ConfigMap", "distmeta-store")["data"]["DISTMETA_STORE"].startswith("s3://")
    assert egress("worker", 443) is bucket
    assert not egress("submitter", 443)


def test_images_have_a_version_and_nothing_is_secret(documents: list[Document]) -> None:
    text = yaml.safe_dump_all(documents)
    images = set(re.findall(r"\bimage: (\S+)", text))
    assert len(images) == 1
    assert all(re.fullmatch(r"registry\.example/distmeta:\d+\.\d+\.\d+(-cuda)?", image) for image in images)
    assert "Secret" not in {d["kind"] for d in documents}
    for path, value in _leaves(documents):
        if re.search("password|passwd|secret|token|credential|access_?key", path[-1], re.IGNORECASE):
            assert path[-1] == "automountServiceAccountToken", path
            assert isinstance(value, bool), path


def _leaves(value: Any, path: tuple[str, ...] = ("",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for key, v in items:
        yield from _leaves(v, (*path, str(key)))


def test_no_file_has_a_key_or_the_latest_of_anything() -> None:
    files = [p for p in K8S.rglob("*") if p.is_file()]
    assert len(files) > 20
    for path in files:
        text = path.read_text()
        assert not re.search(r":latest\b|AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", text), path


def test_ray_settings_are_those_of_the_program(documents: list[Document]) -> None:
    """What a cluster must have before it is started is what the program sets on a machine of its own."""
    head, workers = manifests.groups(named(documents, "RayJob", "distmeta-train"))
    of_pods = {"MALLOC_ARENA_MAX": "1", "POLARS_MAX_THREADS": "2"}
    for group in (head, workers):
        found = manifests.environment(documents, group)
        assert {k: v for k, v in found.items() if k.startswith(("RAY_", "MALLOC", "POLARS"))} == {
            **cluster._SETTINGS,
            **of_pods,
        }
        assert found["DISTMETA_STORE"] in ("/mnt/store", "s3://distmeta")
        mounted = [m["mountPath"] for m in group.template["spec"]["containers"][0]["volumeMounts"]]
        assert found["DISTMETA_STORE"] in mounted or found["DISTMETA_STORE"].startswith("s3://")


def test_overlays_say_what_they_are_for(composed: list[Document]) -> None:
    for documents in (rendered("gpu"), composed):
        _, workers = manifests.groups(named(documents, "RayJob", "distmeta-train"))
        assert workers.gpus == 1
        assert workers.template["spec"]["tolerations"]
        assert "--gpu" in manifests.entrypoint(named(documents, "RayJob", "distmeta-train"))
        assert "-cuda" in workers.template["spec"]["containers"][0]["image"]
    for documents in (rendered("s3"), composed):
        assert not [d for d in documents if d["kind"] == "PersistentVolumeClaim"]
        assert "persistentVolumeClaim" not in yaml.safe_dump(documents)
        assert manifests.environment(documents, manifests.groups(documents[-1])[0])["AWS_REGION"]
    for document in rendered("kueue"):
        if document["kind"] in ("RayCluster", "RayJob"):  # Kueue's rules: rayjob_webhook.go, raycluster_webhook.go
            assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "distmeta"
            assert document["spec"]["suspend"] is True
            assert manifests.cluster(document)["enableInTreeAutoscaling"] is False
