"""A Ray cluster of several nodes on one machine, for drills: real raylets, real loss of nodes, token authentication, a
real Redis.

Every node is a `ray start --block` with ports, resources and a session of processes of its own; each of its processes
carries the node's mark in its environment, so a node can be killed whole (as a machine is lost whole) and nobody else's
Ray is ever touched.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
MARK = "CAPTUNE_NODE"
FIRST_PORT, LAST_PORT = 27000, 27999
"""Outside the kernel's range of ephemeral ports, so that only another cluster of this kind can take one in between."""


@dataclass
class Node:
    """One Ray node: what it offers, and the processes that are it."""

    name: str
    mark: str
    cpus: float
    resources: dict[str, float]
    metrics_port: int
    process: subprocess.Popen[bytes] | None = None
    gpus: int = 0
    labels: dict[str, str] = field(default_factory=dict)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on this node: raylet, agents, workers, and what those started."""
        return marked(self.mark)

    def names(self) -> list[str]:
        """Names of those processes, as Ray has titled them."""
        found = []
        for process in self.processes():
            try:
                found.append(" ".join(process.cmdline()))
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self) -> int:
        """What the loss of a machine is: -9 to every process, the raylet first. Returns how many there were."""
        dead = 0
        while found := self.processes():
            for process in sorted(
                found, key=lambda process: process.name() != "raylet" if process.is_running() else True
            ):
                try:
                    process.kill()
                    dead += 1
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(found, timeout=5)
        if self.process is not None:
            self.process.wait()
            self.process = None
        return dead


@dataclass
class Cluster:
    """A head and any number of workers that come and go.

    Args:
        redis: keep the head's tables in a Redis of its own, so that a head may die and come back (GCS fault tolerance).
        token: Ray's token authentication, with the token in a home of its own.
        settings: environment variables of every node; those of the caller that begin with RAY_ stay outside.
    """

    redis: bool = False
    token: bool = True
    settings: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Short, because Ray puts Unix sockets below it and their paths end at 107 bytes.
        self.place = Path(tempfile.mkdtemp(prefix="ct-"))
        self.home = self.place / "home"
        self.mark = uuid.uuid4().hex
        self._ports, self._disks = free_ports(), itertools.count()
        self.gcs_port, self.dashboard_port, self.redis_port = (next(self._ports) for _ in range(3))
        self.secret = uuid.uuid4().hex * 2
        (self.home / ".ray").mkdir(parents=True)
        if self.token:
            path = self.home / ".ray" / "auth_token"
            path.write_text(self.secret)
            path.chmod(0o600)
        self._redis: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        try:
            if self.redis:
                self._start_redis()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def address(self) -> str:
        """What `ray job submit --address` takes."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def environment(self, **more: str) -> dict[str, str]:
        """Of every process of the cluster and of its clients."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST_"))}
        settings = {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_TMPDIR": str(self.place / "ray"),
            "RAY_AUTH_MODE": "token" if self.token else "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray's default is to be nice to everybody, and on a busy machine its workers then starve
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": "300",
            "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
            # How soon a lost node is noticed: 3 s instead of 15 s, so that a drill is short.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "3",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "no_proxy": "127.0.0.1,localhost",
        }
        if self.redis:
            settings |= {
                "RAY_REDIS_ADDRESS": f"127.0.0.1:{self.redis_port}",
                "RAY_external_storage_namespace": self.mark,
                "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
            }
        return kept | settings | self.settings | more

    def start_head(self, cpus: float = 0, labels: dict[str, str] | None = None, **resources: float) -> Node:
        """The head; as on Kubernetes it offers no CPUs, so work lands on workers. The same call brings a lost head
        back.
        """
        # A machine that comes back does not remember the cluster that ran on it; `ray start` would refuse to start
        # beside it.
        (self.place / "ray" / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        words = [
            "--head",
            f"--port={self.gcs_port}",
            f"--dashboard-port={self.dashboard_port}",
            "--include-dashboard=true",
        ]
        words += ["--dashboard-host=127.0.0.1", f"--ray-client-server-port={next(self._ports)}"]
        node = self._start("head", words, cpus, 0, resources, labels)
        self._await(lambda: self._joined(node) and self._http_answers(), "the head", node)
        return node

    def add_node(
        self, name: str, cpus: float, gpus: int = 0, labels: dict[str, str] | None = None, **resources: float
    ) -> Node:
        """A worker node; it is part of the cluster when this returns."""
        node = self._start(name, [f"--address=127.0.0.1:{self.gcs_port}"], cpus, gpus, resources, labels)
        self._await(lambda: self._joined(node), f"node {name}", node)
        return node

    def submit(self, *entrypoint: str, job: str, working_dir: Path | None = None, **settings: str) -> None:
        """`ray job submit --no-wait -- ENTRYPOINT`, as a person on another machine does it."""
        words = ["--submission-id", job, "--no-wait"]
        if working_dir is not None:
            words += ["--working-dir", str(working_dir)]
        if settings:
            words += ["--runtime-env-json", json.dumps({"env_vars": settings})]
        done = self.ray("job", "submit", *words, "--", *entrypoint)
        assert done.returncode == 0, done.stdout + done.stderr

    def status(self, job: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return str(self.get(f"/api/jobs/{job}")["status"])

    def logs(self, job: str) -> str:
        """What the job's driver has printed so far; the last word on a failure."""
        return str(self.get(f"/api/jobs/{job}/logs")["logs"])

    def wait(self, job: str, seconds: float = 600, wanted: str = "SUCCEEDED") -> str:
        """Wait for the end of a job; returns its log."""
        deadline = time.monotonic() + seconds
        while (status := self.status(job)) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, f"{job} is {status} after {seconds:g} s:\n{self.logs(job)[-4000:]}"
            time.sleep(0.3)
        log = self.logs(job)
        assert status == wanted, f"{job} is {status}:\n{log[-6000:]}"
        return log

    def ray(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A `ray` command of a client that has the token."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("ray")), *words],
            env=self.environment(RAY_ADDRESS=self.address, **environment),
            cwd=self.place, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    def get(self, path: str, token: str | None = None) -> Any:
        """JSON of a dashboard page; `token` instead of the right one."""
        import httpx

        headers = {"Authorization": f"Bearer {token or self.secret}"} if self.token else {}
        answer = httpx.get(self.address + path, headers=headers, trust_env=False, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def close(self) -> None:
        """End exactly what this cluster started."""
        for node in reversed(self.nodes.values()):
            node.kill()
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait()
        for process in marked(self.mark):
            process.kill()
        shutil.rmtree(self.place, ignore_errors=True)

    def _start(
        self,
        name: str,
        words: list[str],
        cpus: float,
        gpus: int,
        resources: dict[str, float],
        labels: dict[str, str] | None,
    ) -> Node:
        node = Node(name, f"{self.mark}/{name}", cpus, resources, next(self._ports), gpus=gpus, labels=labels or {})
        ports = (
            "node-manager",
            "object-manager",
            "dashboard-agent-listen",
            "dashboard-agent-grpc",
            "runtime-env-agent",
        )
        words = [
            *words,
            *(f"--{port}-port={next(self._ports)}" for port in ports),
            # A disk of its own: nodes that shared one would unpack and delete each other's working directories.
            f"--temp-dir={self.place / str(next(self._disks))}",
            f"--metrics-export-port={node.metrics_port}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--num-cpus={cpus:g}",
            f"--num-gpus={gpus}",
            f"--resources={json.dumps({name: 1, **resources})}",
            *(["--labels", ",".join(f"{key}={value}" for key, value in labels.items())] if labels else []),
            f"--object-store-memory={200 << 20}",
            "--disable-usage-stats",
            "--block",
        ]
        log = (self.place / f"{name}.log").open("wb")
        node.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), "start", *words],
            env=self.environment(**{MARK: node.mark}),
            cwd=self.place, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.nodes[name] = node
        return node

    def _start_redis(self) -> None:
        words = ["--port", str(self.redis_port), "--bind", "127.0.0.1", "--dir", str(self.place), "--appendonly", "yes"]
        self._redis = subprocess.Popen(
            [redis_server(), *words, "--save", ""],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: f"{self.mark}/redis"},
        )
        self._await(lambda: not port_is_free(self.redis_port), "Redis", None)

    def _joined(self, node: Node) -> bool:
        return "Ray runtime started" in (self.place / f"{node.name}.log").read_text()

    def _http_answers(self) -> bool:
        import httpx

        try:
            self.get("/api/jobs/")
        except httpx.HTTPError:
            return False
        return True

    def _await(self, ready: Callable[[], bool], what: str, node: Node | None, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            ended = node is not None and node.process is not None and node.process.poll() is not None
            if ended or time.monotonic() > deadline:
                log = (self.place / f"{node.name}.log").read_text()[-4000:] if node else ""
                raise RuntimeError(f"{what} did not come up\n{log}")
            time.sleep(0.2)


def marked(mark: str) -> list[psutil.Process]:
    """Running processes that carry this mark, or one that begins with it, in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            carried = process.environ().get(MARK, "")
            if carried.startswith(mark) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def free_ports() -> Iterator[int]:
    """Ports nobody listens on, from a place that differs between processes."""
    start = os.getpid() * 37 % (LAST_PORT - FIRST_PORT)
    for offset in range(LAST_PORT - FIRST_PORT):
        port = FIRST_PORT + (start + offset) % (LAST_PORT - FIRST_PORT)
        if port_is_free(port):
            yield port


def port_is_free(port: int) -> bool:
    """Whether this machine's address has no listener on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def redis_server() -> str:
    """Debian's Redis; drills of a lost head need it."""
    found = shutil.which("redis-server")
    if found is None:
        raise FileNotFoundError("redis-server is not installed (apt-get install redis-server)")
    return found


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """End a child politely, and wait for it."""
    process.send_signal(signal.SIGTERM)
    process.wait(30)
