"""What a cluster lacks for an overlay, found before anything is applied: a line each, with what to do about it.

Names, keys, kinds and sizes are read from the manifests, never spelled here; the cluster is asked through kubectl.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from k8s import nodes, room
from k8s.kubectl import Forbidden, Kubectl, Unreachable
from k8s.kustomize import containers
from pipelines.errors import UserError

Object = dict[str, Any]
OK, MISSING, UNKNOWN = "ok", "missing", "unknown"
KUBERNETES, KUBERAY = (1, 30), (1, 7)
"""The oldest versions that the manifests are written for."""
_HELM = (
    "helm upgrade --install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm "
    "--version 1.7.0 --namespace kuberay-system --create-namespace"
)
_SHARED = re.compile(r"nfs|cephfs|efs\.csi|filestore|fsx|lustre|file\.csi\.azure|longhorn|weka|beegfs|glusterfs")
_OF_ONE_NODE = re.compile(r"ebs|pd\.csi|disk\.csi|local-path|no-provisioner|cinder|rbd|hostpath")
_PROJECTS = {
    "monitoring.coreos.com": "the Prometheus operator, or an overlay without components/monitoring",
    "gateway.networking.k8s.io": "the Gateway API, or an overlay without components/gateway",
    "kueue.x-k8s.io": "Kueue, or the same overlay without it",
    "ray.io": f"KubeRay 1.7: {_HELM}",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: what, in a few words.
        state: ok, missing or unknown; unknown stops nothing.
        says: what was found, and what to do.
    """

    about: str
    state: str
    says: str

    def __str__(self) -> str:
        return f"{self.state:<8} {self.about}: {self.says}"

    def json(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self)


Check = Callable[[Kubectl, list[Object]], Iterator[Finding]]


def examine(kubectl: Kubectl, objects: list[Object]) -> list[Finding]:
    """Everything that `objects` need of the cluster, in the order in which it is mended; only the first line when
    nothing answers.
    """
    try:
        found = list(_server(kubectl))
    except (Unreachable, UserError) as error:
        return [Finding("API server", MISSING, str(error))]
    for check in CHECKS:
        try:
            found += check(kubectl, objects)
        except Forbidden as error:
            found.append(Finding(check.__name__.strip("_"), UNKNOWN, f"you may not look: {error}"))
    if found[1:] and all(finding.state == UNKNOWN for finding in found[1:]):
        found.append(Finding("your rights", MISSING, "you may look at nothing; kubectl auth whoami says who you are"))
    return found


def _server(kubectl: Kubectl) -> Iterator[Finding]:
    version = kubectl.raw("/version", "gitVersion")
    told = f"Kubernetes {version['gitVersion'].removeprefix('v')}"
    new = _version(version["gitVersion"]) >= KUBERNETES
    yield Finding("API server", OK if new else MISSING, told if new else f"{told}; 1.30 is the oldest that will do")


def _kinds(kubectl: Kubectl, objects: list[Object]) -> Iterator[Finding]:
    """Every kind is served, in the version that the manifests are written in."""
    groups = kubectl.raw("/apis", "groups")["groups"]
    served = {version["groupVersion"] for group in groups for version in group["versions"]} | {"v1"}
    for version in sorted({found["apiVersion"] for found in objects} - served):
        kinds = ", ".join(sorted({found["kind"] for found in objects if found["apiVersion"] == version}))
        project = _PROJECTS.get(version.partition("/")[0], "what brings it")
        yield Finding(kinds, MISSING, f"the cluster does not know {version}; install {project}")
    if "ray.io/v1" in served:
        there = {each["kind"] for each in kubectl.raw("/apis/ray.io/v1", "resources")["resources"]}
        wanted = {found["kind"] for found in objects if found["apiVersion"] == "ray.io/v1"}
        for kind in sorted(wanted - there):
            yield Finding(kind, MISSING, f"KubeRay's CRD for it is not there; {_HELM}")
        if wanted <= there:
            yield Finding("KubeRay's CRDs", OK, f"ray.io/v1 with {', '.join(sorted(wanted))}")
    for queue in (found for found in objects if found["kind"] == "LocalQueue" and found["apiVersion"] in served):
        name = queue["spec"]["clusterQueue"]
        made = kubectl.get("clusterqueues.kueue.x-k8s.io", name) is not None
        says = "there" if made else "not there; flavors and quotas are its administrator's to make"
        yield Finding(f"ClusterQueue {name}", OK if made else MISSING, says)


def _operator(kubectl: Kubectl, objects: list[Object]) -> Iterator[Finding]:
    """The operator runs, is new enough, and the network policies let it in."""
    every = kubectl.every("deployments", "--all-namespaces")
    operators = [found for found in every if any(_is_operator(c["image"]) for c in containers(found))]
    if not operators:
        yield Finding("KubeRay's operator", MISSING, f"no deployment runs it; {_HELM}")
    for operator in operators:
        name, place = operator["metadata"]["name"], operator["metadata"].get("namespace", "")
        image = next(c["image"] for c in containers(operator) if _is_operator(c["image"]))
        version = _version(image.rpartition("/")[2].partition(":")[2])
        where = f"deployment {name} in namespace {place}"
        if not operator.get("status", {}).get("availableReplicas"):
            do = f"kubectl -n {place} describe deployment {name}"
            yield Finding("KubeRay's operator", MISSING, f"{where} has no pod that runs; {do}")
        elif version and version < KUBERAY:
            yield Finding("KubeRay's operator", MISSING, f"{where} is {image}, older than 1.7; {_HELM}")
        else:
            yield Finding("KubeRay's operator", OK, f"{where}, {image}")
        yield from _let_in(operator, objects)


def _let_in(operator: Object, objects: list[Object]) -> Iterator[Finding]:
    """Some network policy of Ray's nodes names the labels that this installation of the operator has."""
    labels = operator["spec"]["template"]["metadata"].get("labels", {})
    policies = [found for found in objects if found["kind"] == "NetworkPolicy"]
    asked = [
        (policy["metadata"]["name"], peer)
        for policy in policies
        for rule in policy["spec"].get("ingress", [])
        for peer in rule.get("from", [])
        if "podSelector" in peer and peer.get("namespaceSelector") == {}
    ]
    if not asked or any(nodes.selects(peer["podSelector"], labels) for _, peer in asked):
        return
    has = ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))
    says = f"lets in other labels than the operator's pods have ({has}); add them to it by a patch of your overlay"
    yield Finding(f"network policy {asked[0][0]}", MISSING, says)


def _namespace(kubectl: Kubectl, objects: list[Object]) -> Iterator[Finding]:
    wanted = next(found for found in objects if found["kind"] == "Namespace")
    name, labels = wanted["metadata"]["name"], wanted["metadata"].get("labels", {})
    found = kubectl.get("namespace", name)
    security = {key: value for key, value in labels.items() if key.startswith("pod-security")}
    words = " ".join(f"{key}={value}" for key, value in security.items())
    if found is None:
        do = f"kubectl create namespace {name} && kubectl label namespace {name} {words}"
        yield Finding(f"namespace {name}", MISSING, f"not there, and secrets are made in it first; {do}")
    elif security.items() <= found["metadata"].get("labels", {}).items():
        yield Finding(f"namespace {name}", OK, "holds its pods to the restricted standard")
    else:
        do = f"kubectl label namespace {name} {words}"
        yield Finding(f"namespace {name}", UNKNOWN, f"does not hold pods to the restricted standard; {do}")


def _secrets(kubectl: Kubectl, objects: list[Object]) -> Iterator[Finding]:
    wanted = secrets(objects)
    there = kubectl.named("secrets", wanted)
    for name, keys in wanted.items():
        absent = sorted(keys - set(there.get(name, {}).get("data", {})))
        if name in there and not absent:
            yield Finding(f"secret {name}", OK, f"with {', '.join(sorted(keys)) or 'its keys'}")
        else:
            what = f"lacks the key {', '.join(absent)}" if name in there else "not there"
            yield Finding(f"secret {name}", MISSING, f"{what}; {advice(kubectl, name, *absent, made=name in there)}")


def advice(kubectl: Kubectl, name: str, *keys: str, made: bool = False) -> str:
    """How a secret is made; one that lacks a key is made anew."""
    words = " ".join(f"--from-literal={key}=$(openssl rand -hex 32)" for key in keys or ("KEY",))
    create = kubectl.shown("create", "secret", "generic", name, words)
    return f"{kubectl.shown('delete', 'secret', name)} && {create}" if made else create


def secrets(node: Any) -> dict[str, set[str]]:
    """Secret -> its keys, wherever `node` refers to one."""
    found: dict[str, set[str]] = {}
    if isinstance(node, list):
        children = node
    elif isinstance(node, dict):
        children = list(node.values())
        if isinstance(reference := node.get("secretKeyRef"), dict) and not reference.get("optional"):
            found.setdefault(reference["name"], set()).add(reference["key"])
        if isinstance(reference := node.get("secretRef"), dict) and not reference.get("optional"):
            found.setdefault(reference["name"], set())
        if "secretName" in node and node.get("mode") == "token":  # KubeRay's authOptions; the key is KubeRay's
            found.setdefault(node["secretName"], set()).add("auth_token")
    else:
        return found
    for child in children:
        for name, keys in secrets(child).items():
            found.setdefault(name, set()).update(keys)
    return found


def _volumes(kubectl: Kubectl, objects: list[Object]) -> Iterator[Finding]:
    """Claims are bound, or a storage class can make their volumes; which of many pods can write is not written down
    in a class, so it is told by who makes its volumes.
    """
    claims = {f["metadata"]["name"]: f for f in objects if f["kind"] == "PersistentVolumeClaim"}
    there = kubectl.named("persistentvolumeclaims", claims)
    bound = {name for name, found in there.items() if found.get("status", {}).get("phase") == "Bound"}
    classes = kubectl.every("storageclasses") if claims.keys() - bound else []
    for name, claim in claims.items():
        if name in bound:
            modes = ", ".join(there[name]["spec"].get("accessModes", []))
            yield Finding(f"volume {name}", OK, f"bound, {modes}")
        else:
            yield storage(there.get(name, claim), classes)


def storage(claim: Object, classes: list[Object]) -> Finding:
    """Whether a claim that is not bound will get its volume."""
    name, spec = claim["metadata"]["name"], claim["spec"]
    about = f"volume {name}"
    modes, wanted = spec["accessModes"], spec.get("storageClassName")
    bind = "make a volume and bind the claim to it, or name a class by a patch of your overlay (storageClassName)"
    standard = "storageclass.kubernetes.io/is-default-class"
    chosen = [
        each
        for each in classes
        if each["metadata"]["name"] == wanted
        or (not wanted and each["metadata"].get("annotations", {}).get(standard) == "true")
    ]
    if not chosen:
        which = f"no storage class {wanted}" if wanted else "no default storage class"
        there = ", ".join(each["metadata"]["name"] for each in classes) or "none at all"
        return Finding(about, MISSING, f"{which} (there is {there}); {bind}")
    provisioner, label = chosen[0]["provisioner"], f"storage class {chosen[0]['metadata']['name']}"
    if "ReadWriteMany" not in modes or _SHARED.search(provisioner):
        return Finding(about, OK, f"{label} ({provisioner}) will make it")
    if _OF_ONE_NODE.search(provisioner):
        return Finding(about, MISSING, f"{label} ({provisioner}) makes volumes that one node can write; {bind}")
    told = f"whether many pods can write what {label} ({provisioner}) makes is written nowhere; it must be so"
    return Finding(about, UNKNOWN, told)


def _room(kubectl: Kubectl, objects: list[Object]) -> Iterator[Finding]:
    """A node for the largest pod of each group."""
    there = [node for node in kubectl.every("nodes") if _ready(node)]
    if not there:
        yield Finding("nodes", MISSING, "none is Ready")
        return
    try:
        alive = "status.phase!=Succeeded,status.phase!=Failed"
        pods = kubectl.every("pods", "--all-namespaces", "--field-selector", alive)
    except Forbidden:
        pods = []
    buys = any(group["name"].startswith("karpenter.") for group in kubectl.raw("/apis", "groups")["groups"])
    words = ("get", "configmap", "cluster-autoscaler-status", "--namespace", "kube-system", "--ignore-not-found")
    buys = buys or bool(kubectl.call(*words, "--output", "name"))
    for group in room.groups(objects):
        state, says = room.judge(group, there, pods, buys)
        yield Finding(f"room for {group.name}", {"yes": OK, "no": MISSING, "perhaps": UNKNOWN}[state], says)


def _rights(kubectl: Kubectl, objects: list[Object]) -> Iterator[Finding]:
    """What `captune k8s run` does in the namespace."""
    work = sorted({(_group(f), f"{f['kind'].lower()}s") for f in objects if f["kind"] in ("RayJob", "Job")})
    wanted = [(verb, *kind) for kind in work for verb in ("create", "get", "list", "patch", "delete")]
    wanted += [("get", "", "pods/log"), ("create", "", "pods/exec"), ("list", "", "events")]
    wanted += [(verb, "", "pods") for verb in ("list", "create", "delete")]
    told = kubectl.rules()
    refused = [f"{verb} {kind}" for verb, group, kind in wanted if not _allowed(told, verb, group, kind)]
    if not refused:
        yield Finding("your rights", OK, "enough for jobs, logs and the report")
    else:
        says = f"you may not {', '.join(refused)} in namespace {kubectl.namespace}; ask its administrator for a role"
        state = UNKNOWN if told.get("incomplete") else MISSING  # a webhook may allow what no rule says
        yield Finding("your rights", state, says)


def _group(found: Object) -> str:
    return str(found["apiVersion"].rpartition("/")[0])


def _allowed(told: Object, verb: str, group: str, kind: str) -> bool:
    asked = {"verbs": verb, "apiGroups": group, "resources": kind}
    return any(
        not rule.get("resourceNames") and all({word, "*"} & set(rule.get(part, [])) for part, word in asked.items())
        for rule in told.get("resourceRules", [])
    )


CHECKS: tuple[Check, ...] = (_kinds, _operator, _namespace, _secrets, _volumes, _room, _rights)


def _is_operator(image: str) -> bool:
    return re.search(r"kuberay.*operator", image) is not None


def _ready(node: Object) -> bool:
    conditions = node.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _version(text: str) -> tuple[int, ...]:
    """(1, 34) of v1.34.4; empty where there is none."""
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else ()
