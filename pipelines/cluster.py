"""What the Ray cluster that this process is connected to has, now and at its largest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines import preflight
from pipelines.caption.config import CaptionConfig
from pipelines.demand import Demand, Node
from pipelines.progress import say

_MANY = 1000
"""Nodes of a group without a limit."""


def require_room(caption: CaptionConfig | None = None, demands: Sequence[Demand] = ()) -> None:
    """Refuse what the cluster can never hold; say what is not there yet, on a cluster that scales by itself.

    Raises:
        NotReady: too much for the cluster at its largest.
    """
    import ray

    now = [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    preflight.require(preflight.resources(_at_most() or now, "the Ray cluster", caption, demands))
    for problem in preflight.resources(now, "the Ray cluster now", caption, demands):
        say(f"ray: {problem}; waiting for the cluster to grow when that stage comes")


def _at_most() -> list[Node]:
    """Nodes that an autoscaler may add; none where there is no autoscaler."""
    import ray

    # not public, but what Ray Data and Ray Train themselves ask
    config: Any = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    return [
        node
        for group in groups
        for node in [_node(group.resources)] * (_MANY if group.max_count < 0 else min(group.max_count, _MANY))
    ]


def _node(resources: Any) -> Node:
    return Node(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))
