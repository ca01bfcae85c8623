"""Which group of nodes a piece of work runs in: every task, actor and worker of captune asks here.

A cluster's manifests give each node the label `captune.dev/group`, and its head one label for each group, which says
how large the group may become: Ray 2.60 tells nobody else of a group that has no node yet. Ray's autoscaler starts a
node only for work that its labels fit, so text filters never start a card. On a Ray whose nodes carry no such labels
nothing is asked, and everything may run everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipelines.demand import Node

if TYPE_CHECKING:
    from ray.data import DataContext

LABEL = "captune.dev/group"
"""Of a node: the group that it belongs to."""
MOST = "group.captune.dev/"
"""Of the head, before a group's name: `8x2cpu-1gpu` is eight nodes of two CPUs and a card at most."""
LOCAL = "local"
"""What a node is called that belongs to no group."""
_HEAD = "node:__internal_head__"
_MOST = re.compile(r"(?P<count>\d+)x(?P<cpus>[\d.]+)cpu(-(?P<gpus>[\d.]+)gpu)?")


def most(count: int, node: Node) -> str:
    """The value of the head's label for a group of at most `count` such nodes."""
    return f"{count}x{node.cpus:g}cpu" + (f"-{node.gpus:g}gpu" if node.gpus else "")


def selector(*groups: str) -> dict[str, str]:
    """Ray's label selector for work that any of `groups` may do; empty where one of them is not known."""
    wanted = sorted(set(groups))
    if not set(wanted) <= {node.group for node in at_most()}:
        return {}
    return {LABEL: wanted[0] if len(wanted) == 1 else f"in({','.join(wanted)})"}


def nodes() -> list[Node]:
    """What is there now."""
    return [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0), _labels(node).get(LABEL, ""))
        for node in _alive()
    ]


def at_most() -> list[Node]:
    """The cluster at its largest, where its head says how large its groups may become; else what is there now."""
    told = {
        key.removeprefix(MOST): value
        for node in _alive()
        for key, value in _labels(node).items()
        if key.startswith(MOST)
    }
    found = [node for node in nodes() if node.group not in told]
    for group, value in told.items():
        if size := _MOST.fullmatch(value):
            found += [Node(float(size["cpus"]), float(size["gpus"] or 0), group)] * int(size["count"])
    return found


def room(found: list[Node], *groups: str) -> list[Node]:
    """Those of the nodes on which work of these groups may run: all, where nothing is asked of them."""
    return [node for node in found if node.group in groups] if selector(*groups) else found


def in_use() -> list[tuple[str, float, float, float, float]]:
    """Of every node now: its group (without a label of ours `head` or `local`), CPUs, cards, and how many of both are
    held by tasks and actors.
    """
    import ray

    free = ray._private.state.available_resources_per_node()
    alive = _alive()
    grouped = any(LABEL in _labels(node) for node in alive)
    found = []
    for node in alive:
        group = _labels(node).get(LABEL, "head" if grouped and _HEAD in node["Resources"] else LOCAL)
        has = [node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU")]
        left = free.get(node["NodeID"], node["Resources"])
        held = [count - left.get(kind, 0.0) for kind, count in zip(("CPU", "GPU"), has, strict=True)]
        found.append((group, *has, *held))
    return found


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
        context.use_datasource_v2 = False  # its readers of footers heed no selector: they run anywhere
        limit = sum(node.cpus for node in room(at_most(), groups[0])) + cpus
        context.execution_options.resource_limits = ExecutionResources(cpu=limit)
    with DataContext.current(context):
        yield context


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _labels(node: dict[str, Any]) -> dict[str, str]:
    return node.get("Labels") or {}
