"""Manifests checked as an API server would, KubeRay's kinds by the schemas in the folder DISTMETA_KUBERAY_CRDS."""

import gzip
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import Document

KUBERNETES = "1.37"
_PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}


def errors(document: Document) -> list[str]:
    """What an API server would refuse in a document, and what it would silently drop: unknown keys among others."""
    if not document["apiVersion"].startswith("ray.io/"):
        return _core(document)
    schema = _schema(document["kind"])
    value = _defaulted(schema, document)
    found = [f"{e.json_path}: {e.message}" for e in jsonschema.Draft202012Validator(schema).iter_errors(value)]
    # the schemas leave open what is in metadata, and check less of Pods than Kubernetes does
    found += _core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
    if not found:
        for where, template in pod_templates(document):
            found += [f"{where}: {text}" for text in _core({"apiVersion": "v1", "kind": "Pod", **template})]
    return found


def pod_templates(document: Document) -> Iterator[tuple[str, Document]]:
    """Each Pod template of a RayCluster or RayJob, with the name of what its Pods are."""
    spec = document["spec"]
    cluster = spec if document["kind"] == "RayCluster" else spec["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]


def _core(document: Document) -> list[str]:
    return _validated(json.dumps(document))


@cache
def _validated(text: str) -> list[str]:
    """Once for each text: jobs and overlays have most of their Pods in common."""
    document = json.loads(text)
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as e:
        return [f"{document['kind']} {e.json_path}: {e.message}"]
    return []


@cache
def _schema(kind: str) -> Document:
    folder = os.environ.get("DISTMETA_KUBERAY_CRDS")
    if not folder:
        pytest.skip("DISTMETA_KUBERAY_CRDS is not set (the folder that holds ray.io_rayjobs.yaml.gz of KubeRay)")
    with gzip.open(Path(folder) / f"ray.io_{_PLURALS[kind]}.yaml.gz") as f:
        crd = yaml.load(f, yaml.CSafeLoader)
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    return _closed(version["schema"]["openAPIV3Schema"])


def _closed(schema: Any) -> Any:
    """A structural schema as JSON Schema has it: keys that it does not name are errors, as with `--validate=strict`."""
    if isinstance(schema, list):
        return [_closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {k: _closed(v) for k, v in schema.items() if k not in ("format", "x-kubernetes-int-or-string")}
    if schema.get("x-kubernetes-int-or-string") is True:
        closed["type"] = ["integer", "string"]
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return closed


def _defaulted(schema: Document, value: Any) -> Any:
    """`value` with the schema's defaults, which an API server sets before it looks for what is required."""
    if isinstance(value, list):
        return [_defaulted(schema.get("items", {}), v) for v in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties", {})
    defaults = {k: s["default"] for k, s in known.items() if "default" in s}
    return {k: _defaulted(known.get(k, {}), v) for k, v in (defaults | value).items()}
