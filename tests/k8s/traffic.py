"""Which packets a set of NetworkPolicies lets through: both ends have to agree."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A pod (with its labels and its namespace's), or an address outside."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "captune"
    namespace_labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


def allowed(policies: list[Object], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether `source` may open a connection to `target`."""
    return _passes(policies, source, target, port, protocol, "Egress") and _passes(
        policies, target, source, port, protocol, "Ingress"
    )


def _passes(policies: list[Object], pod: Peer, other: Peer, port: int, protocol: str, direction: str) -> bool:
    """Whether the policies of `pod`'s own side let it through; a pod that no policy selects is open."""
    own = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"]
        and pod.namespace == policy["metadata"]["namespace"]
        and not pod.address
        and _selects(policy["spec"]["podSelector"], pod.labels)
    ]
    key, side = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return not own or any(
        _fits_port(rule, port, protocol) and any(_is(peer, other, pod.namespace) for peer in rule[side])
        for spec in own
        for rule in spec.get(key, [])
    )


def _fits_port(rule: Object, port: int, protocol: str) -> bool:
    return "ports" not in rule or any(
        entry["port"] == port and entry["protocol"] == protocol for entry in rule["ports"]
    )


def _is(peer: Object, other: Peer, here: str) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        return (
            bool(other.address)
            and _in(other.address, block["cidr"])
            and not any(_in(other.address, e) for e in block.get("except", []))
        )
    if other.address:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace, **other.namespace_labels}
        if not _selects(peer["namespaceSelector"], labels):
            return False
    elif other.namespace != here:
        return False
    return _selects(peer.get("podSelector", {}), other.labels)


def _in(address: str, block: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(block)


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
