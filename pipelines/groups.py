"""Which group of nodes a piece of work runs in: every task, actor and worker of captune asks here.

A cluster's manifests give each node the label `captune.dev/group`, and its head the names of all groups in
`captune.dev/groups`, because a group that has no node yet is known by nothing else. Ray's autoscaler starts a node only
for work that its labels fit, so text filters never start a card. On a Ray whose nodes carry no such labels nothing is
asked, and everything may run everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipelines.demand import Node

if TYPE_CHECKING:
    from ray.data import DataContext

LABEL, ALL = "captune.dev/group", "captune.dev/groups"
"""Of a node: its own group; of the head: every group, with dots between them."""
_MANY = 1000
"""Nodes of a group without a limit."""


def selector(*groups: str) -> dict[str, str]:
    """Ray's label selector for work that any of `groups` may do; empty where one of them is not known."""
    wanted = sorted(set(groups))
    if not set(wanted) <= known():
        return {}
    return {LABEL: wanted[0] if len(wanted) == 1 else f"in({','.join(wanted)})"}


def known() -> set[str]:
    """The cluster's groups, with or without nodes; empty on a Ray that has none."""
    labels = [node.get("Labels") or {} for node in _alive()]
    listed = {group for found in labels for group in found.get(ALL, "").split(".")}
    return (listed | {found.get(LABEL, "") for found in labels}) - {""}


def nodes() -> list[Node]:
    """What is there now."""
    return [_node(node["Resources"], (node.get("Labels") or {}).get(LABEL, "")) for node in _alive()]


def at_most() -> list[Node]:
    """The cluster at its largest: the nodes that its autoscaler may add, or where there is none those of now."""
    import ray

    # not public, but what Ray Data and Ray Train themselves ask
    config: Any = ray._private.state.state.get_cluster_config()
    found = []
    for group in config.node_group_configs if config else ():
        count = _MANY if group.max_count < 0 else min(group.max_count, _MANY)
        found += [_node(group.resources, group.name)] * count
    return found or nodes()


def room(found: list[Node], *groups: str) -> list[Node]:
    """Those of the nodes on which work of these groups may run: all, where a group is not known."""
    return [node for node in found if node.group in groups] if set(groups) <= known() else found


@contextmanager
def data_context(*groups: str, cpus: float = 0.0) -> Iterator[DataContext]:
    """Ray Data's settings for the datasets that are made inside the block: they run in `groups` and start no more tasks
    at once than the first group at its largest has CPUs, and `cpus` for actors elsewhere. More would wait for nodes
    that never come.
    """
    from ray.data import DataContext, ExecutionResources

    context = DataContext.get_current().copy()
    if asked := selector(*groups):
        context.execution_options.label_selector = asked
        most = sum(node.cpus for node in room(at_most(), groups[0])) + cpus
        context.execution_options.resource_limits = ExecutionResources(cpu=most)
    with DataContext.current(context):
        yield context


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _node(resources: Any, group: str) -> Node:
    return Node(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)), group)
