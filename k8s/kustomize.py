"""As much of Kustomize as this folder uses, so that `captune k8s render` needs no other program.

`kubectl kustomize k8s/overlays/NAME` gives the same objects; a test holds the two against each other. What is not known
here is an error, never ignored: resources, components, namespace, labels (pairs), images, configMapGenerator (files,
fixed names), patches (JSON 6902, or merge patches of objects whose lists are replaced as a whole), replacements (by
kind, name and path).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import UserError

Object = dict[str, Any]
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

CLUSTER_WIDE = ("Namespace", "PriorityClass")


def build(root: Path) -> list[Object]:
    """The objects that a Kustomization directory describes.

    Raises:
        UserError: a file is missing or says something that is not known here; the message names it.
    """
    return _apply(root, [])


def _apply(root: Path, objects: list[Object]) -> list[Object]:
    """A Kustomization's own objects, or a Component's changes to `objects`, in Kustomize's order."""
    file = root / "kustomization.yaml"
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    said = _load(file)[0]
    objects = [*objects, *(found for name in said.pop("resources", []) for found in _resource(root / name))]
    for name in said.pop("components", []):
        objects = _apply((root / name).resolve(), objects)
    objects += [_config_map(root, entry) for entry in said.pop("configMapGenerator", [])]
    for entry in said.pop("patches", []):
        _patch(root, objects, entry)
    if "namespace" in said:
        _set_namespace(objects, said.pop("namespace"))
    for entry in said.pop("labels", []):
        _label(objects, entry)
    for entry in said.pop("images", []):
        set_image(objects, **entry)
    for entry in said.pop("replacements", []):
        _replace(objects, entry)
    unknown = set(said) - {"apiVersion", "kind"}
    if unknown:
        raise UserError(f"{file}: {', '.join(sorted(unknown))}: not known to captune's renderer; see k8s/kustomize.py")
    return objects


def _resource(path: Path) -> list[Object]:
    return build(path.resolve()) if path.is_dir() else _load(path)


def _load(path: Path) -> list[Any]:
    """Every document of a YAML file, each free of shared parts (anchors), so that a change stays where it is made."""
    try:
        documents = [document for document in yaml.load_all(path.read_text(), _LOADER) if document is not None]
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from error
    return [json.loads(json.dumps(document)) for document in documents]


def _config_map(root: Path, entry: Object) -> Object:
    options = entry.get("options", {})
    if not options.get("disableNameSuffixHash"):
        raise UserError(f"{root}: configMapGenerator {entry['name']}: only with disableNameSuffixHash")
    files = [root / name for name in entry["files"]]
    metadata = {"name": entry["name"], "namespace": entry["namespace"]}
    if "labels" in options:
        metadata["labels"] = dict(options["labels"])
    data = {file.name: file.read_text() for file in files}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _set_namespace(objects: list[Object], name: str) -> None:
    for found in objects:
        if found["kind"] not in CLUSTER_WIDE:
            found["metadata"]["namespace"] = name


def _label(objects: list[Object], entry: Object) -> None:
    for found in objects:
        found["metadata"].setdefault("labels", {}).update(entry["pairs"])


def set_image(objects: list[Object], name: str, newName: str = "", newTag: str = "", digest: str = "") -> None:
    """Change the image `name` of every container, however deep, as Kustomize's `images` does."""
    for container in containers(objects):
        image = str(container.get("image", ""))
        if image.split("@")[0].rpartition(":")[0] != name and image != name:
            continue
        tag = image.removeprefix(name).removeprefix(":").split("@")[0]
        tag = newTag or tag
        container["image"] = (newName or name) + (f"@{digest}" if digest else f":{tag}" if tag else "")


def containers(node: Any) -> Iterator[Object]:
    """Every entry of a `containers` or `initContainers` list below `node`."""
    if isinstance(node, list):
        for entry in node:
            yield from containers(entry)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                yield from value
            else:
                yield from containers(value)


def _patch(root: Path, objects: list[Object], entry: Object) -> None:
    text = entry["patch"] if "patch" in entry else (root / entry["path"]).read_text()
    patch = json.loads(json.dumps(yaml.load(text, _LOADER)))
    target = entry.get("target") or {"kind": patch["kind"], "name": patch["metadata"]["name"]}
    chosen = [found for found in objects if _is(found, target)]
    if not chosen:
        raise UserError(f"{root}: a patch for {target} meets no object")
    for found in chosen:
        try:
            if isinstance(patch, list):
                for operation in patch:
                    _operate(found, operation)
            else:
                _merge(
                    found, {key: value for key, value in patch.items() if key not in ("metadata", "kind", "apiVersion")}
                )
                _merge(found["metadata"], {k: v for k, v in patch["metadata"].items() if k != "name"})
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"{root}: a patch for {found['kind']} {found['metadata']['name']}: {error!r}") from error


def _is(found: Object, target: Object) -> bool:
    if set(target) - {"kind", "name"}:
        raise UserError(f"target {target}: only kind and name are known to captune's renderer")
    return found["kind"] == target["kind"] and target.get("name") in (None, found["metadata"]["name"])


def _merge(into: Object, patch: Object) -> None:
    """RFC 7386, which is what Kustomize does to kinds without a schema of merge keys."""
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = json.loads(json.dumps(value))


def _operate(document: Object, operation: Object) -> None:
    """One operation of RFC 6902."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = document
    for part in way:
        place = place[int(part)] if isinstance(place, list) else place[part]
    key = (len(place) if last == "-" else int(last)) if isinstance(place, list) else last
    value = json.loads(json.dumps(operation.get("value")))
    match operation["op"]:
        case "add" if isinstance(place, list):
            place.insert(key, value)
        case "add":
            place[key] = value
        case "replace":
            place[key]  # a KeyError: there is nothing to replace
            place[key] = value
        case "remove":
            del place[key]
        case "test":
            if place[key] != value:
                raise ValueError(f"{operation['path']} is {place[key]!r}, not {value!r}")
        case other:
            raise ValueError(f"operation '{other}' is not known")


def _replace(objects: list[Object], entry: Object) -> None:
    """Copy the value at one path to others. A path is dotted; `[key=value]` chooses from a list, and so does a
    number.
    """
    source = entry["source"]
    found = [candidate for candidate in objects if _is(candidate, {k: source[k] for k in ("kind", "name")})]
    if len(found) != 1:
        raise UserError(f"replacement: {len(found)} objects are {source}, not one")
    place, key = _find(found[0], source["fieldPath"], create=False)
    for target in entry["targets"]:
        for candidate in objects:
            if _is(candidate, target["select"]):
                for path in target["fieldPaths"]:
                    spot, name = _find(candidate, path, create=target.get("options", {}).get("create", False))
                    spot[name] = json.loads(json.dumps(place[key]))


def _find(document: Object, path: str, create: bool) -> tuple[Any, Any]:
    """The list or mapping that holds the value at `path`, and its index or key there."""
    here: Any = {"": document}
    key: Any = ""
    for part in path.split("."):
        value = here[key]
        if part.startswith("["):
            name, _, wanted = part[1:-1].partition("=")
            matches = [index for index, item in enumerate(value) if str(item.get(name)) == wanted]
            if not matches:
                raise UserError(f"{document['kind']} {document['metadata']['name']}: {path}: nothing there")
            part = str(matches[0])
        here, key = value, int(part) if isinstance(value, list) else part
        if isinstance(here, dict) and key not in here:
            if not create:
                raise UserError(f"{document['kind']} {document['metadata']['name']}: {path}: nothing there")
            here[key] = {}
    return here, key
