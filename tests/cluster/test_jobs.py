"""`ray job submit` on a cluster of several nodes with token authentication on, as the README of k8s describes it."""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from .cluster import ROOT, Cluster
from .small import captioned_ids, draw_world, write_recipe

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, as on Kubernetes, and one worker of two."""
    with Cluster() as cluster:
        cluster.start_head()
        cluster.add_node("first", cpus=2)
        yield cluster


def wait_for(sign: Callable[[], bool], cluster: Cluster, job: str, seconds: float = 300) -> None:
    """Wait for something that a running job does."""
    deadline = time.monotonic() + seconds
    while not sign():
        status = cluster.status(job)
        assert status in ("PENDING", "RUNNING"), f"{job} is {status}:\n{cluster.logs(job)[-4000:]}"
        assert time.monotonic() < deadline, cluster.logs(job)[-4000:]
        time.sleep(0.1)


def test_a_wrong_token_is_refused(cluster: Cluster) -> None:
    """By the job API, for a client with another token and for one without any."""
    refused = cluster.ray("job", "submit", "--", "python", "-c", "print('in')", RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode != 0
    assert "Invalid authentication token" in refused.stdout + refused.stderr
    for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
        answer = httpx.get(f"{cluster.address}/api/jobs/", headers=headers, trust_env=False, timeout=60)
        assert answer.status_code in (401, 403)
    assert cluster.get("/api/jobs/") == []


def test_a_stopped_recipe_goes_on_where_it_was(cluster: Cluster, tmp_path: Path) -> None:
    """`ray job stop` while it trains; the same command then does what is left, and the log tells how far it is."""
    recipe = write_recipe(tmp_path, train={"align": {"steps": 40, "micro_batch": 8}})
    command = ("python", "ray_jobs/run.py", "--config", str(recipe))
    cluster.submit(*command, job="stopped", working_dir=ROOT)
    adapter = tmp_path / "run" / "enhanced" / "adapter"
    wait_for(lambda: any((adapter / "checkpoints").rglob("trained.safetensors")), cluster, "stopped")
    assert cluster.ray("job", "stop", "stopped").returncode == 0
    log = cluster.wait("stopped", wanted="STOPPED")
    assert re.search(r"caption: (\d+)/\1 images \(100 %\)", log), log
    assert not (adapter / "MANIFEST.json").exists()
    captions = (tmp_path / "run" / "captions" / "MANIFEST.json").read_text()

    cluster.submit(*command, job="resumed", working_dir=ROOT)
    log = cluster.wait("resumed")
    assert "captions is complete already" in log
    assert "train enhanced: continuing" in log
    assert (tmp_path / "run" / "captions" / "MANIFEST.json").read_text() == captions
    steps = [json.loads(line)["step"] for line in (adapter / "log.jsonl").open() if '"align"' in line]
    assert steps == list(range(1, 41)), "the log has each step once, although the run was stopped"
    assert json.loads((tmp_path / "run/enhanced/predictions/textvqa/scores.json").read_text())["count"] == 12
    assert (tmp_path / "run" / "report" / "index.html").stat().st_size > 10_000


def test_a_lost_captioning_node_costs_no_row(cluster: Cluster, tmp_path: Path) -> None:
    """One of two nodes dies with a replica on it and a new one joins; every id comes out exactly once."""
    world = draw_world(tmp_path / "world", pairs=500)
    cluster.add_node("lost", cpus=2)
    output = tmp_path / "captions"
    command = ["python", "ray_jobs/caption.py", "--input", world / "dataset.jsonl", "--output", output]
    command += ["--caption.model", world / "models" / "blip2", "--caption.batch_size", 4, "--caption.actors", 3]
    cluster.submit(*map(str, command), job="captions", working_dir=ROOT)
    committed = output / "_work"
    wait_for(lambda: any(committed.glob("shards/*.parquet")), cluster, "captions")
    wait_for(lambda: any("MapWorker" in name for name in cluster.nodes["lost"].names()), cluster, "captions")
    assert cluster.nodes["lost"].kill() > 3
    cluster.add_node("joined", cpus=2)
    log = cluster.wait("captions")
    ids = captioned_ids(output)
    manifest = json.loads((output / "MANIFEST.json").read_text())
    assert manifest["rows_in"] == manifest["rows_out"] == len(ids) == len(set(ids)) == 500, log[-3000:]
    assert manifest["resumed_rows"] == 0, "one run did it all: the loss was mended inside it"
    cluster.nodes["joined"].kill()


def test_work_for_a_gpu_goes_where_a_gpu_is(cluster: Cluster, tmp_path: Path) -> None:
    """The node says that it has one, which is enough to place the replica there, whatever torch then finds."""
    world = draw_world(tmp_path / "world", pairs=8)
    gpu, places = cluster.add_node("gpu", cpus=1, gpus=1), set()
    command = ["python", "ray_jobs/caption.py", "--input", world / "dataset.jsonl", "--output", tmp_path / "captions"]
    command += ["--caption.model", world / "models" / "blip2", "--caption.gpus_per_actor", 1]
    cluster.submit(*map(str, command), job="placed", working_dir=ROOT)

    def started() -> bool:
        places.update(node.name for node in cluster.nodes.values() if any("Captioner" in name for name in node.names()))
        return bool(places)

    wait_for(started, cluster, "placed")
    assert places == {"gpu"}
    assert cluster.ray("job", "stop", "placed").returncode == 0
    gpu.kill()


def test_what_is_uploaded_is_the_code(tmp_path: Path) -> None:
    """Neither data, runs, tests nor git; below two megabytes of code, and the sample's two models."""
    from ray._private.runtime_env.packaging import create_package

    target = tmp_path / "package.zip"
    create_package(str(ROOT), target, include_gitignore=True)
    with zipfile.ZipFile(target) as package:
        sizes = {entry.filename: entry.compress_size for entry in package.infolist() if not entry.is_dir()}
    folders = {name.split("/")[0] for name in sizes if "/" in name}
    assert folders == {"pipelines", "ray_jobs", "serve"}
    assert "ray_jobs/run.py" in sizes
    code = sum(size for name, size in sizes.items() if not name.endswith(".safetensors"))
    assert code < 2_000_000
    assert target.stat().st_size < 26_000_000
