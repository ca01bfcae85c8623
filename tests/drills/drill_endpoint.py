"""Take pods from the endpoint, change its model, let it scale, all while clients never stop asking.

    python tests/drills/drill_endpoint.py

A head without CPUs and nodes with room for one replica each, Ray Serve deployed from a Serve config file as RayService
does it. Five acts: a model that comes after the endpoint; a pod that is deleted, as Kubernetes does it with captune's
`preStop`; the same without it; another model in place; load that comes and goes. Some six minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tests.cluster.cluster import Cluster  # noqa: E402
from tests.cluster.small import draw_world  # noqa: E402
from tests.drills.endpoint import (  # noqa: E402
    Clients,
    application,
    deploy,
    port_for,
    question,
    replicas,
    status,
    wait,
)
from tests.drills.record import Record  # noqa: E402

SETTINGS = {"RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "5", "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1000"}
"""Of the head in k8s/components/handover, but for the half minute that Kubernetes is given to forget a pod."""


def config(model: Path, port: int, least: int, most: int, surge: int = 0) -> dict[str, Any]:
    """`serveConfigV2` as render writes it, with an autoscaler in a hurry."""
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": 1}
    scaling |= {"upscale_delay_s": 1, "downscale_delay_s": 5, "metrics_interval_s": 1, "look_back_period_s": 2}
    deployment = {"name": "Captune", "num_replicas": "auto", "autoscaling_config": scaling}
    arguments = {"model": str(model), "config": {"cpus_per_replica": 1.0}, "start_tries": 1000}
    named = {"name": "captune", "route_prefix": "/", "import_path": "serve.app:build", "args": arguments}
    applications = [named | {"deployments": [deployment | {"max_surge_percent": surge}]}]
    return {"http_options": {"host": "0.0.0.0", "port": port}, "applications": applications}


def at_rest(cluster: Cluster, number: int) -> bool:
    """The application runs, with so many replicas and no other one on its way in or out."""
    deployments = application(cluster)["deployments"].values()
    states = [replica["state"] for found in deployments for replica in found["replicas"]]
    return status(cluster) == "RUNNING" and states == ["RUNNING"] * number


def node_of_a_replica(cluster: Cluster) -> tuple[str, str]:
    """The name and the id of a node that has a replica."""
    node_id = replicas(cluster)[0]["node_id"]
    by_id = {node["nodeId"]: node["resourcesTotal"] for node in ids(cluster)}
    return next(name for name in cluster.nodes if name in by_id[node_id]), node_id


def ids(cluster: Cluster) -> list[dict[str, Any]]:
    """Every living node with its id and resources, of which one is its name."""
    code = (
        "import ray, json; ray.init(logging_level='ERROR'); print(json.dumps([{'nodeId': n['NodeID'], "
        "'resourcesTotal': n['Resources']} for n in ray.nodes() if n['Alive']]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=cluster.environment(RAY_ADDRESS=f"127.0.0.1:{cluster.gcs_port}"),
        capture_output=True, text=True, check=True, cwd=cluster.place,
    )  # fmt: skip
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def drain(cluster: Cluster, node_id: str, within: float) -> str:
    """What `preStop` runs in the pod."""
    words = [sys.executable, "-m", "serve.drain", "--node", node_id, "--within", str(within)]
    environment = cluster.environment(RAY_ADDRESS=f"127.0.0.1:{cluster.gcs_port}", PYTHONPATH=str(ROOT))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, cwd=cluster.place)
    return done.stderr.strip().splitlines()[-1] + f" (status {done.returncode})"


def main() -> int:
    """Run the drill."""
    os.environ["PYTHONPATH"] = str(ROOT)  # on Kubernetes the code is in the image
    record = Record("drill: the endpoint loses pods, changes its model and scales while it answers")
    with tempfile.TemporaryDirectory() as scratch, Cluster(settings=SETTINGS) as cluster:
        world = draw_world(Path(scratch) / "world", pairs=2)
        model, later = world / "models" / "mgm", Path(scratch) / "later"
        body = question(next((world / "images").iterdir()))
        cluster.start_head()
        cluster.add_node("one", cpus=1)
        port = port_for(cluster)
        url = f"http://127.0.0.1:{port}/v1/chat/completions"

        deploy(cluster, config(later, port, 1, 1))
        wait("a word about the missing model", 240, lambda: str(later) in str(application(cluster)["deployments"]))
        record.say(f"deployed before its model is there: {status(cluster)}, and says that {later.name} is missing")
        shutil.copytree(model, later)
        came = time.monotonic()
        wait("the endpoint after its model came", 240, lambda: status(cluster) == "RUNNING")
        record.check(True, f"served {time.monotonic() - came:.0f} s after the model came, by itself")

        cluster.add_node("two", cpus=1)
        with Clients(url, body) as clients:
            wait("twenty answers", 120, lambda: len(clients.seen) >= 20)
            name, node_id = node_of_a_replica(cluster)
            began = time.monotonic()
            record.say(f"the pod of the only replica is deleted, another node has room: {drain(cluster, node_id, 120)}")
            record.say(f"killed: node {name}, {cluster.nodes[name].kill()} processes")
            wait("a replica", 240, lambda: at_rest(cluster, 1))
            time.sleep(3)
            record.check(not clients.lost(began), f"with preStop: {clients.told(began)}")

            cluster.add_node(f"{name}-again", cpus=1)
            name, _ = node_of_a_replica(cluster)
            began = time.monotonic()
            cluster.nodes[name].kill()
            wait("a replica again", 240, lambda: at_rest(cluster, 1))
            time.sleep(3)
            record.say(f"without it, for comparison: {clients.told(began)}")

            cluster.add_node("room", cpus=1)
            other = Path(shutil.copytree(model, Path(scratch) / "other"))
            for surge, words in ((0, "the old replica first"), (100, "the new replica first")):
                began = time.monotonic()
                deploy(cluster, config(other if surge else model, port, 1, 1, surge))
                time.sleep(3)
                wait("the other model", 240, lambda: at_rest(cluster, 1))
                record.say(f"another model in place, {words}: {clients.told(began)}")
            record.check(not clients.lost(began), "the new replica first: no request is lost")

            deploy(cluster, config(other, port, 1, 2, 100))
            began = time.monotonic()
            with Clients(url, question(next((world / "images").iterdir()), tokens=16), number=8, pause_s=0) as load:
                wait("a second replica under load", 240, lambda: len(replicas(cluster)) == 2)
                record.say(f"eight more clients: two replicas after {time.monotonic() - began:.0f} s")
                wait("fifty answers by two", 240, lambda: len(load.seen) >= 50)
                under_load = load.told(began)
            ended = time.monotonic()
            wait("one replica again", 240, lambda: at_rest(cluster, 1))
            record.say(f"they leave: one replica after {time.monotonic() - ended:.0f} s")
            lost = clients.lost(began) + load.lost(began)
            record.check(not lost, f"up and down: {clients.told(began)}; of the load {under_load}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
