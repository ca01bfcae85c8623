"""Kill the head while the endpoint answers: with its tables in Redis it comes back, and so does the service, by itself.

    python tests/drills/drill_head.py        (needs redis-server: apt-get install redis-server)

A head without CPUs, two workers, Ray Serve with two replicas deployed from a Serve config file as RayService does it,
and clients that never stop asking. The head is killed whole and started again on the same address. Two minutes on two
cores.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tests.cluster.cluster import Cluster, redis_server  # noqa: E402
from tests.cluster.small import draw_world  # noqa: E402
from tests.drills.endpoint import Clients, deploy, port_for, question, status, wait  # noqa: E402
from tests.drills.record import Record  # noqa: E402


def controllers(cluster: Cluster) -> list[str]:
    """Nodes on which a controller of Ray Serve runs."""
    return [node.name for node in cluster.nodes.values() if any("ServeController" in name for name in node.names())]


def main() -> int:
    """Run the drill."""
    redis_server()
    os.environ["PYTHONPATH"] = str(ROOT)  # on Kubernetes the code is in the image
    record = Record("drill: the head is lost while the endpoint answers")
    with tempfile.TemporaryDirectory() as scratch, Cluster(redis=True) as cluster:
        world = draw_world(Path(scratch) / "world", pairs=2)
        picture = next((world / "images").iterdir())
        cluster.start_head()
        for name in ("one", "two"):
            cluster.add_node(name, cpus=1)
        record.say("up: Redis, a head without CPUs, nodes one and two")
        port = port_for(cluster)
        application = {
            "name": "captune",
            "route_prefix": "/",
            "import_path": "serve.app:build",
            "args": {"model": str(world / "models" / "mgm"), "config": {"replicas": 2, "cpus_per_replica": 1.0}},
        }
        deploy(cluster, {"http_options": {"host": "0.0.0.0", "port": port}, "applications": [application]})
        wait("the application runs", 240, lambda: status(cluster) == "RUNNING")
        record.say("deployed: two replicas, RUNNING")
        with Clients(f"http://127.0.0.1:{port}/v1/chat/completions", question(picture)) as clients:
            wait("twenty answers", 120, lambda: len(clients.seen) >= 20)
            record.check({outcome for outcome, _ in clients.since(0)} == {"ok"}, "every request is answered")
            record.check(controllers(cluster) == ["head"], "Serve's controller runs on the head, and will go with it")
            killed = time.monotonic()
            record.say(f"killed: the head, {cluster.nodes['head'].kill()} processes")
            time.sleep(10)
            during = clients.since(killed)
            answered = sum(outcome == "ok" for outcome, _ in during)
            record.say(f"without a head: {answered} of {len(during)} requests answered in 10 s")
            cluster.start_head()
            record.say("started: the head, on the same address, with nothing but Redis to remember by")
            wait("a controller", 240, lambda: len(controllers(cluster)) == 1)
            wait("the application runs again", 240, lambda: status(cluster) == "RUNNING")
            record.say(
                f"came back: the controller on {controllers(cluster)[0]}, the application RUNNING, deployed by nobody"
            )
            lost = [outcome for outcome, _ in clients.since(killed) if outcome != "ok"]
            record.say(f"failed until here: {len(lost)} request(s) {sorted(set(lost))}")
            recovered = time.monotonic()
            wait("a hundred answers", 240, lambda: len(clients.since(recovered)) >= 100)
            after = clients.since(recovered)
        bad = [outcome for outcome, _ in after if outcome != "ok"]
        record.check(not bad, f"{len(after)} requests after the recovery, {len(bad)} failed {sorted(set(bad))}")
        record.check(
            len({answer for _, outcome, answer in clients.seen if outcome == "ok"}) == 1, "every answer is the same one"
        )
        job = ("python", "-c", "import ray; ray.init(); print(len([n for n in ray.nodes() if n['Alive']]), 'nodes')")
        cluster.submit(*job, job="after")
        record.check("3 nodes" in cluster.wait("after"), "the cluster takes jobs again and has its three nodes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
