"""Whether a pod finds a node: the part of Kubernetes' scheduler that can be foretold from its objects."""

from __future__ import annotations

from typing import Any

from k8s.needs import quantity

Object = dict[str, Any]


def requests(spec: Object) -> dict[str, float]:
    """What a pod asks for, by resource: all containers together, or the hungriest that runs before them."""
    wanted: dict[str, float] = {}
    for container in spec.get("containers", []):
        for resource, value in _asked(container).items():
            wanted[resource] = wanted.get(resource, 0) + value
    for container in spec.get("initContainers", []):
        for resource, value in _asked(container).items():
            wanted[resource] = max(wanted.get(resource, 0), value)
    return wanted


def _asked(container: Object) -> dict[str, float]:
    """Requests; a limit without one is a request, too."""
    sizes = container.get("resources", {})
    return {name: quantity(value) for name, value in {**sizes.get("limits", {}), **sizes.get("requests", {})}.items()}


def allocatable(node: Object) -> dict[str, float]:
    """What a node has for pods, by resource."""
    return {resource: quantity(value) for resource, value in node["status"].get("allocatable", {}).items()}


def free(node: Object, pods: list[Object]) -> dict[str, float]:
    """What the node's pods leave of it."""
    left = allocatable(node)
    for pod in pods:
        if pod["spec"].get("nodeName") == node["metadata"]["name"]:
            for resource, value in requests(pod["spec"]).items():
                left[resource] = left.get(resource, 0) - value
            left["pods"] = left.get("pods", 0) - 1
    return left


def lacking(wanted: dict[str, float], room: dict[str, float]) -> list[str]:
    """Resources of which there is too little."""
    return sorted(resource for resource, value in wanted.items() if value > room.get(resource, 0) + 1e-9)


def unlabelled(spec: Object, node: Object) -> list[str]:
    """Labels that the pod insists on and the node does not have so; of the terms that it names, the nearest."""
    labels = node["metadata"].get("labels", {})
    wrong = [key for key, value in spec.get("nodeSelector", {}).items() if labels.get(key) != value]
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    missed = [[e["key"] for e in term.get("matchExpressions", []) if not matches(e, labels)] for term in terms]
    return wrong + min(missed, key=len, default=[])


def matches(expression: Object, labels: dict[str, str]) -> bool:
    """A node selector's or a label selector's requirement."""
    value, wanted = labels.get(expression["key"]), expression.get("values", [])
    match expression["operator"]:
        case "In":
            return value in wanted
        case "NotIn":
            return value not in wanted
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return _number(value) is not None and int(str(value)) > int(wanted[0])
        case "Lt":
            return _number(value) is not None and int(str(value)) < int(wanted[0])
    raise AssertionError(expression["operator"])


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """A label selector meets these labels."""
    pairs = selector.get("matchLabels", {}).items()
    return all(labels.get(key) == value for key, value in pairs) and all(
        matches(expression, labels) for expression in selector.get("matchExpressions", [])
    )


def repelled(spec: Object, node: Object) -> list[str]:
    """Taints of the node that the pod does not tolerate; a cordoned node is one."""
    taints = [t for t in node["spec"].get("taints", []) if t["effect"] in ("NoSchedule", "NoExecute")]
    if node["spec"].get("unschedulable") and not any(t["key"] == "node.kubernetes.io/unschedulable" for t in taints):
        taints.append({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"})
    return [t["key"] for t in taints if not any(_tolerates(each, t) for each in spec.get("tolerations", []))]


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect", taint["effect"]) != taint["effect"]:
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key", taint["key"]) == taint["key"]
    return toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", "")


def _number(value: str | None) -> int | None:
    return int(value) if value is not None and value.lstrip("-").isdecimal() else None
