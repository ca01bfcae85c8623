"""Before a pod of the endpoint goes: let another take its replica over, and finish the answers under way.

`python -m serve.drain` is what Kubernetes runs in a serving pod that is to be deleted (`preStop`): by the drain of its
node, by the autoscaler, by hand. It tells Ray that this node will go. Ray Serve then starts the replica anew where
there is room and stops the old one when the new one answers, or when the time is over; and the proxy here tells the
readiness probe that it closes, so that the pod leaves the Service before it leaves the cluster.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from typing import Any

from pipelines.errors import UserError
from pipelines.progress import say

WITHIN_S = 20.0
CLOSING_S = 100.0
"""Longer than an answer may take and than Serve's proxy waits for the Service to forget the pod."""
_POLL_S = 1.0
_HEAD_S = 3.0
"""A head that does not take a connection in this time is gone, and nothing is left to hand over to."""


class Cluster:
    """A running Ray as its head's tables have it; no worker is started and nothing is scheduled for it.

    Raises:
        UserError: nothing listens at `address`.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.require_head()
        from ray import _raylet
        from ray._private.state import GlobalState

        raylet: Any = _raylet  # compiled, without types
        self.client = raylet.GcsClient(address=address)
        self.tables = GlobalState()
        options = raylet.GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=True)
        self.tables._initialize_global_state(options)

    def require_head(self) -> None:
        """Ray's own clients wait a minute for a head that is gone, and then end the process.

        Raises:
            UserError: nothing listens there.
        """
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _HEAD_S).close()
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.address}': no head of a Ray cluster there ({error})") from error

    def own_node(self) -> str:
        """Hex id of the living node whose address is this machine's.

        Raises:
            UserError: none has it.
        """
        own = {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None)}
        for node in self.tables.node_table():
            if node["Alive"] and node["NodeManagerAddress"] in own:
                return str(node["NodeID"])
        raise UserError(f"{self.address}: no node of this cluster has the address {' or '.join(sorted(own))}")

    def announce(self, node: str, within_s: float) -> None:
        """Say that `node` will be gone in `within_s` seconds.

        Raises:
            UserError: Ray refuses it.
        """
        from ray.core.generated import autoscaler_pb2

        reasons: Any = autoscaler_pb2  # generated, without types
        reason = reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + within_s) * 1000)
        accepted, refusal = self.client.drain_node(node, reason, "the endpoint's pod goes", deadline_ms)
        if not accepted:
            raise UserError(f"node {node}: {refusal}")

    def serving(self, node: str) -> list[str]:
        """Names of Ray Serve's living replicas and proxies on a node.

        Raises:
            UserError: the head is gone.
        """
        self.require_head()
        actors: dict[str, dict[str, Any]] = self.tables.actor_table(None, None, "ALIVE")
        here = [actor for actor in actors.values() if actor["Address"]["NodeID"] == node]
        return sorted(actor["Name"] for actor in here if actor["Name"].startswith("SERVE_"))


def main(argv: list[str] | None = None) -> int:
    """Announce, then wait until nothing of Ray Serve is left here."""
    parser = argparse.ArgumentParser(prog="python -m serve.drain", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS", ""), help="of the cluster ($RAY_ADDRESS)")
    parser.add_argument("--node", default="", help="hex id of the Ray node; else the one with this machine's address")
    parser.add_argument("--within", type=float, default=WITHIN_S, help="seconds for another node to take over")
    parser.add_argument("--closing", type=float, default=CLOSING_S, help="seconds more for answers under way")
    options = parser.parse_args(argv)
    began = time.monotonic()
    try:
        cluster = Cluster(options.address)
        node = options.node or cluster.own_node()
        cluster.announce(node, options.within)
        while left := cluster.serving(node):
            if time.monotonic() - began > options.within + options.closing:
                raise UserError(f"still here: {', '.join(left)}")
            time.sleep(_POLL_S)
    except UserError as error:
        say(f"drain: {error}")
        return 1
    say(f"drain: nothing of the endpoint is left on this node after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
