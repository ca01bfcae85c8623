"""Which groups of pods manifests ask for, and whether a cluster's nodes have a place for the largest pod of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from k8s import nodes
from k8s.kustomize import containers
from k8s.render import cluster_spec

Object = dict[str, Any]


@dataclass
class Group:
    """Pods of one kind.

    Attributes:
        wanted: requests of one pod, by resource.
        least: how many there are from the start.
    """

    name: str
    spec: Object
    wanted: dict[str, float]
    least: int


def groups(objects: list[Object]) -> list[Group]:
    """Heads (with the autoscaler that KubeRay puts beside them), worker groups that may have a pod, and pods of other
    workloads; of those with one name, the largest.
    """
    found: dict[str, Group] = {}
    for each in objects:
        for group in _groups(each):
            known = found.setdefault(group.name, group)
            known.least = max(known.least, group.least)
            if sorted(group.wanted.values()) > sorted(known.wanted.values()):
                known.spec, known.wanted = group.spec, group.wanted
    return list(found.values())


def _groups(found: Object) -> list[Group]:
    if "template" in found.get("spec", {}) and any(containers(found)):
        spec = found["spec"]["template"]["spec"]
        return [Group(f"{found['kind']} {found['metadata']['name']}", spec, nodes.requests(spec), 1)]
    if not found["kind"].startswith("Ray"):
        return []
    cluster = cluster_spec(found)
    head = cluster["headGroupSpec"]["template"]["spec"]
    beside = [{"resources": cluster.get("autoscalerOptions", {}).get("resources", {})}]
    wanted = nodes.requests({"containers": [*head["containers"], *beside]})
    every = [Group("the head", head, wanted, 1)]
    for group in cluster["workerGroupSpecs"]:
        if group.get("maxReplicas"):
            spec = group["template"]["spec"]
            every.append(Group(f"group {group['groupName']}", spec, nodes.requests(spec), group.get("replicas", 0)))
    return every


def judge(group: Group, there: list[Object], pods: list[Object], buys: bool) -> tuple[str, str]:
    """`yes`, `no` or `perhaps`, and why.

    Args:
        there: nodes that are ready.
        pods: those of the whole cluster that are not over.
        buys: an autoscaler of nodes is seen in the cluster.
    """
    asks = f"a pod asks for {shown(group.wanted)}"
    fitting = [node for node in there if not nodes.unlabelled(group.spec, node)]
    willing = [node for node in fitting if not nodes.repelled(group.spec, node)]
    large = [node for node in willing if not nodes.lacking(group.wanted, nodes.allocatable(node))]
    for node in large:
        if not nodes.lacking(group.wanted, nodes.free(node, pods)):
            return "yes", f"{asks}; node {node['metadata']['name']} has it"
    if large:
        return "perhaps", f"{asks}; node {large[0]['metadata']['name']} is large enough, but others use it now"
    if not fitting:
        labels = sorted({key for node in there for key in nodes.unlabelled(group.spec, node)})
        why = f"no node has the label that it insists on ({', '.join(labels)})"
    elif not willing:
        taints = sorted({key for node in fitting for key in nodes.repelled(group.spec, node)})
        why = f"every node that would do is tainted ({', '.join(taints)})"
    else:
        short = min((nodes.lacking(group.wanted, nodes.allocatable(node)) for node in willing), key=len)
        why = f"no node has as much {', '.join(short)}"
    if buys:
        return "perhaps", f"{asks}; {why} now; the cluster's node autoscaler may bring one"
    if not group.least:
        return "perhaps", f"{asks}; {why} now; a node autoscaler may bring one, if you have one"
    return "no", f"{asks}, and {why}; add a node or choose an overlay of smaller pods"


def shown(wanted: dict[str, float]) -> str:
    """Requests as people read them: 2 CPUs, 5 GiB, 1 nvidia.com/gpu."""
    words = []
    for resource, value in sorted(wanted.items()):
        if resource in ("memory", "ephemeral-storage"):
            words.append(f"{value / 2**30:g} GiB{'' if resource == 'memory' else ' of disk'}")
        else:
            words.append(f"{value:g} CPUs" if resource == "cpu" else f"{value:g} {resource}")
    return ", ".join(words)
