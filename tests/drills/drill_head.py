"""Kill the head while the endpoint answers: with its tables in Redis it comes back, and so does the service, by itself.

    python tests/drills/drill_head.py        (needs redis-server: apt-get install redis-server)

A head without CPUs, two workers, Ray Serve with two replicas deployed from a Serve config file as RayService does it,
and clients that never stop asking. The head is killed whole and started again on the same address. Two minutes on two
cores.
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tests.cluster.cluster import Cluster, free_ports, redis_server  # noqa: E402
from tests.cluster.small import draw_world  # noqa: E402
from tests.drills.record import Record  # noqa: E402

CLIENTS = 2


@dataclass
class Clients:
    """Ask the same question over and over, from several threads."""

    url: str
    body: dict[str, Any]
    seen: list[tuple[float, str, str]] = field(default_factory=list)
    """Time of the end of each request, what became of it ("ok" or the failure), and the answer."""

    def __post_init__(self) -> None:
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def since(self, moment: float) -> list[tuple[str, str]]:
        """Outcomes of requests that ended after `moment`."""
        return [(outcome, answer) for when, outcome, answer in list(self.seen) if when >= moment]

    def _ask(self) -> None:
        while not self.stop.wait(0.1):
            outcome, answer = "ok", ""
            try:
                # A connection for each request, as if each were another client: which of the proxies gets it is up to
                # the kernel.
                response = httpx.post(self.url, json=self.body, timeout=30, trust_env=False)
                if response.status_code != 200:
                    outcome = f"status {response.status_code}"
                else:
                    answer = response.json()["choices"][0]["message"]["content"]
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            self.seen.append((time.monotonic(), outcome, answer))


def deploy(cluster: Cluster, model: Path, port: int) -> None:
    """What KubeRay's operator does with `serveConfigV2`."""
    config = {
        "http_options": {"host": "0.0.0.0", "port": port},
        "applications": [
            {
                "name": "captune",
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": {"model": str(model), "config": {"replicas": 2, "cpus_per_replica": 1.0}},
            }
        ],
    }
    headers = {"Authorization": f"Bearer {cluster.secret}"}
    url = f"{cluster.address}/api/serve/applications/"
    httpx.put(url, json=config, headers=headers, trust_env=False, timeout=60).raise_for_status()


def application(cluster: Cluster) -> str:
    """Status of the application in the dashboard, or that there is no answer."""
    try:
        found = cluster.get("/api/serve/applications/")["applications"]
    except httpx.HTTPError:
        return "no answer"
    return found["captune"]["status"] if "captune" in found else "unknown"


def controllers(cluster: Cluster) -> list[str]:
    """Nodes on which a controller of Ray Serve runs."""
    return [node.name for node in cluster.nodes.values() if any("ServeController" in name for name in node.names())]


def wait(what: str, seconds: float, holds: Any) -> None:
    """Until `holds()`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {seconds:g} s")
        time.sleep(0.3)


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
        port = next(port for port in free_ports() if port not in (cluster.gcs_port, cluster.dashboard_port))
        deploy(cluster, world / "models" / "mgm", port)
        wait("the application runs", 240, lambda: application(cluster) == "RUNNING")
        record.say("deployed: two replicas, RUNNING")
        image = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": "What does the sign say?"},
        ]
        body = {
            "model": "captune",
            "max_tokens": 4,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        with Clients(f"http://127.0.0.1:{port}/v1/chat/completions", body) as clients:
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
            wait("the application runs again", 240, lambda: application(cluster) == "RUNNING")
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
