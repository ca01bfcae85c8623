"""Settings of every test: read by Ray and torch when they are imported, so they are made here, first."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# One thread a process: the processes of a small cluster share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's workers are nice to everybody else by default and nearly stop on a busy machine.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with heavy tests first, so that none is left over for the end, when the others have run out."""
    heavy = {item.path for item in items if item.get_closest_marker("heavy")}
    items.sort(key=lambda item: item.path not in heavy)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for all tests that need Ray: of two CPUs, the smallest machine that captune supports."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield
    ray.shutdown()
