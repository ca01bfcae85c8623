"""Schemas of the Kubernetes API and of KubeRay's kinds, strict: a field that they do not know is an error."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

VERSION = "1.33.0"
"""Of Kubernetes: old enough that most clusters know everything in it."""
DEFINITIONS = "https://kubernetes.io/api/_definitions.json"
ROOT = Path(__file__).parents[2]
_BESIDE = [folder / "shared" / "kuberay-crds" for folder in (ROOT.parent, ROOT.parent.parent)]
CRDS = Path(os.environ.get("CAPTUNE_KUBERAY_CRDS") or next((path for path in _BESIDE if path.is_dir()), _BESIDE[0]))
"""KubeRay's, of the version that the manifests are written for: named by the environment, or beside the repository."""


def have_crds() -> bool:
    """Whether KubeRay's CRDs are at hand."""
    return CRDS.is_dir()


def errors(found: dict[str, Any]) -> list[str]:
    """What a strict API server would say about an object; nothing about kinds of other projects (Prometheus, Kueue,
    Gateway API).
    """
    group = found["apiVersion"].partition("/")[0]
    if group == "ray.io":
        validator = _kuberay(found["kind"]) if have_crds() else None
    else:
        validator = _core(found["apiVersion"], found["kind"])
    if validator is None:
        return []
    where = f"{found['kind']} {found['metadata']['name']}"
    return [
        f"{where}: {'.'.join(map(str, error.path))}: {error.message[:200]}" for error in validator.iter_errors(found)
    ]


def pod_template_errors(template: dict[str, Any]) -> list[str]:
    """A pod template against the core API's own schema, which is newer and stricter than the copy inside KubeRay's
    CRDs.
    """
    schema = {"$ref": f"{DEFINITIONS}#/$defs/io.k8s.api.core.v1.PodTemplateSpec"}
    validator = Draft202012Validator(schema, registry=_registry())
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in validator.iter_errors(template)]


def _folder() -> Any:
    return resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{VERSION}-local-strict"


@cache
def _registry() -> Registry:
    contents = json.loads((_folder() / "_definitions.json").read_text())
    return Registry().with_resource(DEFINITIONS, Resource.from_contents(contents))


@cache
def _core(api_version: str, kind: str) -> Draft202012Validator | None:
    group, _, version = api_version.rpartition("/")
    prefix = f"{group.split('.')[0]}-" if group else ""
    file = _folder() / f"{kind.lower()}-{prefix}{version}.json"
    if not file.is_file():
        return None
    schema = json.loads(file.read_text().replace('"/api/_definitions.json', f'"{DEFINITIONS}'))
    return Draft202012Validator(schema, registry=_registry())


@cache
def _kuberay(kind: str) -> Draft202012Validator:
    crd = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    schema = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    strict = _strict(schema)
    strict["properties"]["metadata"] = {"$ref": f"{DEFINITIONS}#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    return Draft202012Validator(strict, registry=_registry())


def _strict(schema: Any) -> Any:
    """A structural schema as JSON Schema: unknown fields refused, int-or-string as such."""
    if isinstance(schema, list):
        return [_strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    done = {key: _strict(value) for key, value in schema.items() if key not in ("default", "description", "format")}
    if schema.get("x-kubernetes-int-or-string") is True:
        done.pop("type", None)
        done["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and schema.get("x-kubernetes-preserve-unknown-fields") is not True:
        done.setdefault("additionalProperties", False)
    return done
