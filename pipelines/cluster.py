"""Whether the Ray cluster that this process is connected to has room for a command, now and at its largest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipelines import groups, preflight
from pipelines.caption.config import CaptionConfig
from pipelines.demand import CPU, Demand, Node
from pipelines.errors import Problem
from pipelines.progress import say


def require_room(caption: CaptionConfig | None = None, demands: Sequence[Demand] = ()) -> None:
    """Refuse what the cluster can never hold; say what is not there yet, on a cluster that scales by itself.

    Raises:
        NotReady: too much for the cluster at its largest.
    """
    preflight.require(_lacking(groups.at_most(), "the Ray cluster", caption, demands))
    for problem in _lacking(groups.nodes(), "the Ray cluster now", caption, demands):
        say(f"ray: {problem}; waiting for the cluster to grow when that stage comes")


def _lacking(
    nodes: list[Node], where: str, caption: CaptionConfig | None, demands: Sequence[Demand]
) -> Iterator[Problem]:
    """What `nodes` do not have for each demand in the groups that it may use."""
    if caption is not None:
        mine = groups.room(nodes, CPU, caption.demand().group)
        yield from preflight.resources(mine, where, caption)
    for demand in demands:
        yield from preflight.resources(groups.room(nodes, demand.group), where, demands=[demand])
