"""Work on a cluster whose nodes are in groups, as KubeRay makes them of the manifests: what waits, and where it ran."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.demand import Node as Size
from pipelines.groups import LABEL, MOST, most
from pipelines.records import new_record, write_shard

from .cluster import ROOT, Cluster
from .small import draw_world

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]

SIZES = {"cpu": Size(2, 0), "caption": Size(1, 1), "train": Size(2, 1), "serve": Size(1, 1)}
_WAITING = """
import json, ray
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from google.protobuf.json_format import MessageToDict
print(json.dumps(MessageToDict(get_cluster_resource_state(GcsClient(address="127.0.0.1:{port}")))))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that knows of four groups, and nodes of two: the one that is always there, and training's, idle."""
    with Cluster() as cluster:
        cluster.start_head(labels={f"{MOST}{group}": most(1, size) for group, size in SIZES.items()})
        for group in ("cpu", "train"):
            cluster.add_node(group, SIZES[group].cpus, int(SIZES[group].gpus), labels={LABEL: group})
        yield cluster


def waiting(cluster: Cluster) -> list[dict[str, Any]]:
    """What Ray's autoscaler would be told now: requests that wait, and those of a size that is wished for."""
    done = subprocess.run(
        [sys.executable, "-c", _WAITING.format(port=cluster.gcs_port)],
        env=cluster.environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    state = json.loads(done.stdout.splitlines()[-1])
    sizes = [entry for each in state.get("clusterResourceConstraints", []) for entry in each["resourceRequests"]]
    return [entry["request"] for entry in [*state.get("pendingResourceRequests", []), *sizes]]


def groups_of(request: dict[str, Any]) -> list[str]:
    """Groups that may satisfy a request; empty when any node may."""
    (selector,) = request.get("labelSelectors", [{"labelConstraints": [{"labelValues": []}]}])
    (constraint,) = selector["labelConstraints"]
    return sorted(constraint["labelValues"])


def wait_for(sign: Callable[[], bool], cluster: Cluster, job: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not sign():
        assert cluster.status(job) in ("PENDING", "RUNNING"), cluster.logs(job)[-4000:]
        assert time.monotonic() < deadline, cluster.logs(job)[-4000:]
        time.sleep(0.5)


def where(cluster: Cluster, job: str) -> dict[str, set[str]]:
    """Group -> names of the tasks and actors with a CPU or a card of a job that ran on its nodes."""
    names = {node["node_id"]: node["labels"].get(LABEL, "head") for node in rows(cluster, "nodes")}
    (driver,) = {found["driver_info"]["id"] for found in cluster.get("/api/jobs/") if found["submission_id"] == job}
    found: dict[str, set[str]] = {}
    for task in rows(cluster, "tasks"):
        if task["job_id"] == driver and task["node_id"] and set(task["required_resources"] or {}) & {"CPU", "GPU"}:
            found.setdefault(names[task["node_id"]], set()).add(task["name"])
    return found


def rows(cluster: Cluster, what: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.get(f"/api/v0/{what}?detail=true&limit=9000")["data"]["result"]["result"]
    return found


def test_a_replica_waits_for_its_own_group_though_another_has_a_card_to_spare(cluster: Cluster, tmp_path: Path) -> None:
    world = draw_world(tmp_path / "world", pairs=8)
    command = ["python", "ray_jobs/caption.py", "--input", world / "dataset.jsonl", "--output", tmp_path / "captions"]
    command += ["--caption.model", world / "models" / "blip2", "--caption.gpus_per_actor", 1]
    cluster.submit(*map(str, command), job="captions", working_dir=ROOT)
    told: list[dict[str, Any]] = []

    def asked() -> bool:
        told.extend(waiting(cluster))
        return any("GPU" in request["resourcesBundle"] for request in told)

    wait_for(asked, cluster, "captions")
    wanted = {tuple(groups_of(request)) for request in told if "GPU" in request["resourcesBundle"]}
    assert ("caption",) in wanted <= {("caption",), ("caption", "cpu")}
    assert not any("Captioner" in name for node in cluster.nodes.values() for name in node.names())
    cluster.ray("job", "stop", "captions")


def test_filters_run_on_cpus_though_a_card_stands_idle_beside_them(cluster: Cluster, tmp_path: Path) -> None:
    """Twelve shards, and so more tasks than group cpu has room for."""
    for shard in range(12):
        records = [new_record(f"a red sign number {shard} {row} says stop", image=b"no picture") for row in range(10)]
        write_shard(tmp_path / "records" / f"part-{shard:05d}.parquet", records)
    command = ["python", "ray_jobs/refine.py", "--input", tmp_path / "records", "--output", tmp_path / "refined"]
    recipe = tmp_path / "words.yaml"
    recipe.write_text("process:\n  - words_num_filter: {min_num: 3}\n")
    command += ["--refine.recipe", recipe, "--refine.text", "caption"]
    cluster.submit(*map(str, command), job="refined", working_dir=ROOT)
    log = cluster.wait("refined", 240)
    assert "No available node types" not in log
    ran = where(cluster, "refined")
    assert set(ran) == {"cpu"}, ran
    manifest = json.loads((tmp_path / "refined" / "MANIFEST.json").read_text())
    assert manifest["rows_in"] == 120
    assert (
        set(manifest["cost"]) == {"head", *(cluster.nodes.keys() & SIZES)}
        and manifest["cost"]["cpu"]["cpu_hours_worked"] > 0
    )
    assert manifest["cost"]["train"]["gpu_hours"] > 0 == manifest["cost"]["train"]["gpu_hours_worked"]
