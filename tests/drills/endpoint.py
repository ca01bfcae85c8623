"""What drills of the endpoint share: clients that never stop asking, and Serve deployed as KubeRay does it."""

from __future__ import annotations

import base64
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from tests.cluster.cluster import Cluster, free_ports


@dataclass
class Clients:
    """Ask the same question over and over, from several threads."""

    url: str
    body: dict[str, Any]
    number: int = 2
    pause_s: float = 0.1
    seen: list[tuple[float, str, str]] = field(default_factory=list)
    """Time of the end of each request, what became of it ("ok" or the failure), and the answer."""

    def __post_init__(self) -> None:
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(self.number)]

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

    def lost(self, moment: float) -> list[str]:
        """Failures after `moment`, but for 404: a proxy on a new node answers so before it knows a route. Its health
        check says so, and a Service sends it nothing; here all proxies share one port.
        """
        return [outcome for outcome, _ in self.since(moment) if outcome not in ("ok", "status 404")]

    def told(self, moment: float) -> str:
        """The requests after `moment` in words: how many, what failed, the longest time without an answer."""
        failed = Counter(outcome for outcome, _ in self.since(moment) if outcome != "ok")
        answered = sorted(when for when, outcome, _ in list(self.seen) if outcome == "ok" and when > moment)
        moments = [moment, *answered, time.monotonic()]
        longest = max(b - a for a, b in pairwise(moments))
        lost = f"{failed.total()} failed {dict(failed)}" if failed else "none failed"
        return f"{len(self.since(moment))} requests, {lost}; the longest time without an answer was {longest:.1f} s"

    def _ask(self) -> None:
        while not self.stop.wait(self.pause_s):
            outcome, answer = "ok", ""
            try:
                # A connection for each request, as if each were another client: which of the proxies gets it is up to
                # the kernel.
                response = httpx.post(self.url, json=self.body, timeout=60, trust_env=False)
                if response.status_code != 200:
                    outcome = f"status {response.status_code}"
                else:
                    answer = response.json()["choices"][0]["message"]["content"]
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            self.seen.append((time.monotonic(), outcome, answer))


def question(picture: Path, tokens: int = 4) -> dict[str, Any]:
    """The body of a request about a PNG."""
    image = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What does the sign say?"}]
    messages = [{"role": "user", "content": content}]
    return {"model": "captune", "max_tokens": tokens, "temperature": 0, "messages": messages}


def deploy(cluster: Cluster, config: dict[str, Any]) -> None:
    """What KubeRay's operator does with `serveConfigV2`."""
    headers = {"Authorization": f"Bearer {cluster.secret}"}
    url = f"{cluster.address}/api/serve/applications/"
    httpx.put(url, json=config, headers=headers, trust_env=False, timeout=60).raise_for_status()


def application(cluster: Cluster) -> dict[str, Any]:
    """The application in the dashboard: `status`, `message`, `deployments`; status `no answer` or `unknown` else."""
    try:
        found = cluster.get("/api/serve/applications/")["applications"]
    except httpx.HTTPError:
        return {"status": "no answer", "message": "", "deployments": {}}
    return dict(found.get("captune", {"status": "unknown", "message": "", "deployments": {}}))


def status(cluster: Cluster) -> str:
    """Of the application."""
    return str(application(cluster)["status"])


def replicas(cluster: Cluster, state: str = "RUNNING") -> list[dict[str, Any]]:
    """Replicas in a state, as the dashboard has them."""
    deployments = application(cluster)["deployments"].values()
    return [replica for found in deployments for replica in found["replicas"] if replica["state"] == state]


def port_for(cluster: Cluster) -> int:
    """A free one, for Serve."""
    return next(port for port in free_ports() if port not in (cluster.gcs_port, cluster.dashboard_port))


def wait(what: str, seconds: float, holds: Callable[[], Any]) -> None:
    """Until `holds()`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {seconds:g} s")
        time.sleep(0.3)
