"""What a stage used, by group: from Ray's own table, over all its attempts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import cost
from pipelines.manifest import open_stage

_DIES = """
import time
from pathlib import Path
from pipelines.manifest import open_stage
stage = open_stage(Path({directory!r}), "refine", {{"rows": 3}})
print("open", flush=True)
time.sleep(60)
"""


def test_an_attempt_that_was_killed_counts(tmp_path: Path) -> None:
    """Nearly to its last second, and beside what the attempt after it used; only this machine was there."""
    words = [sys.executable, "-c", _DIES.format(directory=str(tmp_path / "out"))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ) as died:
        assert died.stdout is not None
        died.stdout.readline()
        time.sleep(3)
        died.send_signal(signal.SIGKILL)
    (before,) = cost.Meter(tmp_path / "out").stop().values()
    assert 1 < before["node_hours"] * 3600 < 10
    stage = open_stage(tmp_path / "out", "refine", {"rows": 3})
    assert stage.resumed
    time.sleep(1)
    (after,) = stage.finish()["cost"].values()
    assert 1 <= (after["node_hours"] - before["node_hours"]) * 3600 < 10
    assert after["cpu_hours"] == pytest.approx(after["node_hours"] * (before["cpu_hours"] / before["node_hours"]), 0.01)
    assert 0 <= after["cpu_hours_worked"] < after["cpu_hours"]
    assert not (tmp_path / "out" / cost.USED).exists()


def test_stages_side_by_side_share_what_there_is(tmp_path: Path) -> None:
    """A machine's hour is counted once, however many stages of a run were at work in it."""
    started = time.monotonic()
    meters = [cost.Meter(tmp_path / arm) for arm in ("original", "enhanced")]
    time.sleep(1)
    seconds = [hours["local"]["node_hours"] * 3600 for hours in [meter.stop() for meter in meters]]
    assert 1 <= sum(seconds) <= time.monotonic() - started + 0.01
    assert seconds[0] == pytest.approx(seconds[1], abs=0.1)


def test_what_tasks_hold_is_what_worked(ray_cluster: None, tmp_path: Path) -> None:
    """One of two CPUs for nearly all of the time, as Ray counts."""
    import ray

    @ray.remote(num_cpus=1)
    def work(seconds: float) -> None:
        time.sleep(seconds)

    ray.get(work.remote(0))
    stage = open_stage(tmp_path / "out", "refine", {})
    ray.get(work.remote(5))
    hours = stage.finish()["cost"]
    assert list(hours) == ["local"]
    assert hours["local"]["gpu_hours"] == 0
    assert hours["local"]["cpu_hours"] == pytest.approx(2 * hours["local"]["node_hours"], 0.01)
    share = cost.worked(hours["local"])
    assert share is not None and 0.1 < share < 0.51


def test_sums_and_shares() -> None:
    train = {"node_hours": 1.0, "cpu_hours": 4.0, "gpu_hours": 2.0, "cpu_hours_worked": 4.0, "gpu_hours_worked": 0.5}
    head = {"node_hours": 1.0, "cpu_hours": 0.0, "gpu_hours": 0.0, "cpu_hours_worked": 0.0, "gpu_hours_worked": 0.0}
    total = cost.added([{"train": train, "head": head}, {"train": train}])
    assert (total["train"]["gpu_hours"], total["head"]["node_hours"]) == (4.0, 1.0)
    assert cost.worked(total["train"]) == 0.25 and cost.worked(head) is None, "a head has no CPUs for work"
    assert cost.scaled(total, 0.5) == {"train": train, "head": {key: value / 2 for key, value in head.items()}}
