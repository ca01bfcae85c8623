"""Record which metrics a cluster really exports: `python tests/k8s/record_metrics.py` (a few minutes, no GPU).

Runs a short version of the sample recipe on a Ray of its own, reads the node's metrics endpoint all the while as
Prometheus would, and writes every name with its labels to exported_metrics.txt. tests/k8s/test_monitoring.py holds
dashboards and alerts against that file.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families

FILE = Path(__file__).with_name("exported_metrics.txt")
SHORT = [
    "--train.align.steps",
    "4",
    "--train.instruct.steps",
    "4",
    "--train.max_failures",
    "0",
    "--evaluate.limit",
    "40",
]


def main() -> None:
    """Run, read, write."""
    from ray_jobs import run

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(
        num_cpus=2,
        include_dashboard=True,
        _metrics_export_port=port,
        object_store_memory=200 << 20,
        log_to_driver=False,
    )
    labels: dict[str, set[str]] = {}
    done = threading.Event()
    reader = threading.Thread(target=_read, args=(port, labels, done))
    reader.start()
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            "--run_dir",
            f"{folder}/run",
            "--sample.out",
            f"{folder}/world",
            "--dataset",
            f"{folder}/world/dataset.jsonl",
        ]
        paths += ["--caption.model", f"{folder}/world/models/blip2", "--train.model", f"{folder}/world/models/mgm"]
        paths += ["--train.instruct_data", f"{folder}/world/instruct.json"]
        paths += ["--evaluate.annotations", f"{folder}/world/textvqa/TextVQA_0.5.1_val.json"]
        paths += ["--evaluate.images", f"{folder}/world/textvqa/train_images"]
        try:
            run.main(["--config", "sample", *paths, *SHORT])
        finally:
            done.set()
            reader.join()
            ray.shutdown()
    head = (
        f"# Metrics that Ray {ray.__version__} and captune export, with their labels; written by "
        f"{Path(__file__).name}.\n"
    )
    FILE.write_text(head + "".join(f"{name} {','.join(sorted(labels[name]))}\n" for name in sorted(labels)))
    print(f"{len(labels)} names in {FILE}")


def _read(port: int, labels: dict[str, set[str]], done: threading.Event) -> None:
    while not done.wait(2.0):
        try:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=10).text
        except httpx.TransportError:
            continue  # the node's agent is still starting, or busy
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels.setdefault(sample.name, set()).update(sample.labels)


if __name__ == "__main__":
    main()
