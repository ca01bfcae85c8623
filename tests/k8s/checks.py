"""Everything that can be said about a set of manifests without a cluster, as a list of complaints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from k8s.kustomize import containers
from k8s.needs import quantity
from k8s.render import FOLDER, cluster_spec
from tests.k8s import rules, schemas

RAY = ("RayCluster", "RayJob", "RayService")
README, OPERATING = ((FOLDER / name).read_text() for name in ("README.md", "OPERATING.md"))
SECRETS = set(re.findall(r"create\s+secret\s+generic\s+(\S+)\s+--from-literal=(\w+)=", README + OPERATING))
"""Name and key of what the documents tell to make; manifests refer to them and never hold them."""

Object = dict[str, Any]


def complaints(objects: list[Object]) -> list[str]:
    """All of them; empty when the manifests are well."""
    said = [f"{k} {n} twice" for k, n in {key for key in map(_key, objects) if list(map(_key, objects)).count(key) > 1}]
    for found in objects:
        said += schemas.errors(found)
        if found["kind"] in RAY:
            said += rules.violations(found)
            said += _sizes(found)
        for where, template in pod_templates(found):
            said += [f"{where}: {error}" for error in schemas.pod_template_errors(template)]
            said += [f"{where}: {error}" for error in _restricted(template["spec"])]
            said += [f"{where}: {error}" for error in _references(template["spec"], objects)]
        said += _secrets(found)
        said += _images(found)
        if (
            found["kind"] not in ("Namespace", "PriorityClass", "PersistentVolume")
            and found["metadata"].get("namespace") != "captune"
        ):
            said.append(f"{found['kind']} {found['metadata']['name']}: not in namespace captune")
    return said


def pod_templates(found: Object) -> Iterator[tuple[str, Object]]:
    """Where, and the pod template there."""
    where = f"{found['kind']} {found['metadata']['name']}"
    if found["kind"] in ("StatefulSet", "Job"):
        yield where, found["spec"]["template"]
    if found["kind"] in RAY:
        cluster = cluster_spec(found)
        yield f"{where} head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{where} group {group['groupName']}", group["template"]
    if found["kind"] == "RayJob":
        yield f"{where} submitter", found["spec"]["submitterPodTemplate"]


def _key(found: Object) -> tuple[str, str]:
    return found["kind"], found["metadata"]["name"]


def _restricted(spec: Object) -> list[str]:
    """Pod Security Standards, profile `restricted`, and a read-only root file system."""
    said = []
    pod = spec.get("securityContext", {})
    if pod.get("runAsNonRoot") is not True or pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        said.append("the pod may be root, or has no seccomp profile")
    if not pod.get("runAsUser") or pod.get("fsGroup") != pod.get("runAsGroup"):
        said.append("no numeric user, or its volumes are not its group's")
    for container in containers({"containers": spec["containers"], "initContainers": spec.get("initContainers", [])}):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
            said.append(f"{container['name']} keeps capabilities or may gain privileges")
        if own.get("readOnlyRootFilesystem") is not True:
            said.append(f"{container['name']} may write to its root file system")
        if (
            not {"cpu", "memory"} <= set(container["resources"]["requests"])
            or "memory" not in container["resources"]["limits"]
        ):
            said.append(f"{container['name']} does not say what it needs")
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    said += [
        f"volume {v['name']} is of a kind that is refused" for v in spec.get("volumes", []) if not set(v) & allowed
    ]
    if spec.get("automountServiceAccountToken") is not False:
        said.append("the service account's token is mounted into every container")
    return said


def _references(spec: Object, objects: list[Object]) -> list[str]:
    """Accounts, classes, claims, maps and secrets exist, and every mount has its volume."""
    there = set(map(_key, objects))
    wanted = [("ServiceAccount", spec["serviceAccountName"])]
    if "priorityClassName" in spec:
        wanted.append(("PriorityClass", spec["priorityClassName"]))
    claims = {
        c["metadata"]["name"]
        for found in objects
        if found["kind"] == "StatefulSet"
        for c in found["spec"]["volumeClaimTemplates"]
    }
    volumes = {volume["name"] for volume in spec.get("volumes", [])} | claims
    for volume in spec.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        if "configMap" in volume:
            wanted.append(("ConfigMap", volume["configMap"]["name"]))
    said = [f"{kind} {name} does not exist" for kind, name in wanted if (kind, name) not in there]
    for container in spec["containers"]:
        mounts = container.get("volumeMounts", [])
        said += [
            f"{container['name']} mounts {mount['name']}, which is no volume"
            for mount in mounts
            if mount["name"] not in volumes
        ]
        if len({mount["mountPath"] for mount in mounts}) != len(mounts):
            said.append(f"{container['name']} mounts two volumes at one place")
    return said


def _sizes(found: Object) -> list[str]:
    """The object store fits into /dev/shm, and both into the container's memory with room for the work."""
    said = []
    cluster = cluster_spec(found)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        memory = quantity(spec["containers"][0]["resources"]["limits"]["memory"])
        store = int(group["rayStartParams"]["object-store-memory"])
        shm = next(quantity(v["emptyDir"]["sizeLimit"]) for v in spec["volumes"] if v["name"] == "shm")
        if not store + 2**30 <= shm <= memory / 1.5:
            name = f"{found['metadata']['name']} {group.get('groupName', 'head')}"
            said.append(
                f"{name}: object store {store / 2**30:g} GiB, /dev/shm {shm / 2**30:g} GiB, memory "
                f"{memory / 2**30:g} GiB"
            )
    volumes = {volume["name"] for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
    mounts = cluster.get("autoscalerOptions", {}).get("volumeMounts", [])
    said += [
        f"{found['metadata']['name']}: the autoscaler mounts {m['name']}, which is no volume"
        for m in mounts
        if m["name"] not in volumes
    ]
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        said.append(f"{found['metadata']['name']}: work may land on the head")
    if cluster.get("authOptions", {}).get("mode") != "token" or "secretName" not in cluster["authOptions"]:
        said.append(f"{found['metadata']['name']}: no token authentication")
    return said


def _secrets(node: Any, where: str = "") -> list[str]:
    """Secrets are referred to, by a name that the documents tell to make; nothing like one stands in clear."""
    said = []
    if isinstance(node, dict):
        where = f"{node['kind']} {node['metadata']['name']}" if "kind" in node and "metadata" in node else where
        if node.get("kind") == "Secret":
            said.append(f"{where}: a secret in clear")
        reference = node.get("secretKeyRef")
        if reference and (reference["name"], reference["key"]) not in SECRETS:
            said.append(f"{where}: secret {reference['name']}, key {reference['key']}: nobody is told to make it")
        whole = node.get("secretRef")
        if whole and whole["name"] not in {name for name, _ in SECRETS}:
            said.append(f"{where}: secret {whole['name']}: nobody is told to make it")
        name, value = str(node.get("name", "")).lower(), node.get("value")
        if (
            value
            and any(word in name for word in ("password", "token", "secret", "_key"))
            and name != "tokenizers_parallelism"
        ):
            said.append(f"{where}: {node['name']} in clear")
        children = list(node.values())
    else:
        children = node if isinstance(node, list) else []
    return said + [text for child in children for text in _secrets(child, where)]


def _images(found: Object) -> list[str]:
    said = []
    for container in containers(found):
        image = container["image"]
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            said.append(f"{found['kind']} {found['metadata']['name']}: image {image} is another one tomorrow")
    return said
