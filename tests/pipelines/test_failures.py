"""Volumes and memory that refuse, for real: a person gets one sentence, with the place and what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ray_jobs import cli

ROOT = Path(__file__).parents[2]


@contextmanager
def volume(place: Path, *options: str) -> Iterator[Path]:
    """A small file system of its own, in memory."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "captune", place], capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def recipe(folder: Path, run_dir: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(
        f"base: sample\nrun_dir: {run_dir}\narms: {{original: {{text: caption}}}}\n"
        "sample: {pairs: 60, instructions: 4, questions: 4}\n"
    )
    return str(path)


@pytest.mark.parametrize("words", [["--preflight"], ["--stage", "sample"], []])
def test_a_read_only_volume_is_named(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with volume(tmp_path / "v", "size=1m", "ro") as place:
        assert cli.main(["run", recipe(tmp_path, place / "run"), *words]) == 2
    said = capsys.readouterr().err
    assert f"{place}" in said and "Traceback" not in said
    assert "Read-only file system: so is the volume" in said or "cannot be written" in said


def test_a_full_volume_is_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It fills while the sample world is drawn; the preflight sees one that is full already."""
    with volume(tmp_path / "v", "size=200k") as place:
        words = ["run", recipe(tmp_path, place / "run")]
        assert cli.main([*words, "--preflight"]) == 0
        assert cli.main([*words, "--stage", "sample"]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"captune: failed: {place}") and "No space left on device: the volume" in said
        assert "holds 0.2 MB; make room or enlarge it, and the same command continues" in said
        with (place / "rest").open("wb") as file, pytest.raises(OSError, match="No space"):
            file.write(b"0" * 2**20)
        assert cli.main([*words, "--preflight"]) == 2
        assert "run_dir: " in capsys.readouterr().err
        assert cli.main([*words, "--stage", "sample"]) == 1
        assert f"failed: {place}" in capsys.readouterr().err, "not even a lock can be written"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can give up a right")
def test_a_forbidden_volume_names_who_may_and_who_asks(tmp_path: Path) -> None:
    """Somebody else's, for a root without its right to write everywhere."""
    plain = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", sys.executable, "-m", "ray_jobs.cli"]
    with volume(tmp_path / "v", "size=1m", "mode=755", "uid=1000", "gid=1000") as place:
        file = recipe(tmp_path, place / "run")
        render = ["k8s", "render", file, "--overlay", "kind", "--run_dir", "x", "--output", f"{place}/out.yaml"]
        for words, why in (
            (["run", file, "--preflight"], f"{place} cannot be written"),
            (render, f"Permission denied: this is user 0, group 0, and {place} belongs to user 1000"),
        ):
            done = subprocess.run([*plain, *words], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 2 and why in done.stderr, done.stderr


WORK = """
import itertools, os, sys, time
import ray
from pipelines.failures import explained
from pipelines.groups import LABEL
os.environ.update(RAY_AUTH_MODE="disabled", RAY_memory_monitor_refresh_ms="50")
if sys.argv[1] == "memory":  # a limit that any process is above
    os.environ.update(RAY_memory_usage_threshold="0.001", RAY_task_oom_retries="0")
quiet = dict(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
ray.init("local", num_cpus=2, labels={LABEL: "caption"}, **quiet)  # and not beside other tests' cluster
@ray.remote(max_retries=0)
def task(how):
    if how == "memory": time.sleep(60)
    if how == "kill": os.kill(os.getpid(), 9)
    with open(how + "/file", "wb") as file:
        file.write(b"0" * 2**20)
@ray.remote
class Actor:
    def work(self, how): ray.get(task.remote(how)) if os.path.isdir(how) else os.kill(os.getpid(), 9)
said = open(sys.argv.pop(), "w")  # standard output is Ray's, too
actors = []  # one that nobody holds is never started
def act(how):
    actors.append(Actor.remote())
    return actors[-1].work.remote(how)
for how, work in itertools.product(sys.argv[1:], (task.remote, act)):
    try:
        ray.get(work(how))
    except Exception as error:
        found = explained(error, sys.argv[-1], "caption.batch_size")
        print(type(found).__name__, found, file=said, flush=True)
"""


@pytest.mark.heavy
def test_what_befell_a_worker_of_ray_is_one_sentence(tmp_path: Path) -> None:
    """Ended by Ray for its memory, killed as Linux kills, and a full volume that a worker of a worker met."""

    def told(*how: str) -> list[str]:
        command = [sys.executable, "-c", WORK, *how]
        plain = {
            key: value for key, value in os.environ.items() if not key.startswith("RAY_")
        }  # of other tests' cluster
        said = tmp_path / f"said-{how[0]}"
        subprocess.run([*command, str(said)], cwd=ROOT, env=plain, capture_output=True, check=True, timeout=400)
        return [line for line in said.read_text().splitlines() if line.startswith("WorkFailed")]

    out_of_memory = told("memory")
    with volume(tmp_path / "v", "size=64k") as place:
        *killed, task, actor = told("kill", str(place))
    assert (len(out_of_memory), len(killed)) == (2, 2), (out_of_memory, task, actor)
    for line in out_of_memory:
        assert line.startswith(f"WorkFailed pod {os.uname().nodename} (group caption) ran out of memory: ")
        assert "of its limit of" in line and "Lower caption.batch_size, or give the group larger pods" in line
    assert all("killed from outside" in line and "OOMKilled" in line for line in killed)
    assert all(f"{place}: No space left on device: the volume {place} holds 0.1 MB" in line for line in (task, actor))
