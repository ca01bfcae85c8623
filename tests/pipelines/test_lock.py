"""One writer per output directory: a second process is told who writes; a dead one's place is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import lock
from pipelines.errors import UserError
from pipelines.manifest import open_stage

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys, time; from pathlib import Path; from pipelines.manifest import open_stage\n"
    "open_stage(Path(sys.argv[1]), 'caption', {}); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture(autouse=True)
def let_go() -> None:
    yield
    lock.release_all()


def holder(directory: Path) -> subprocess.Popen[str]:
    """Another process that has claimed `directory`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_writes_and_a_dead_ones_place_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = holder(out)
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(UserError, match=f"process {first.pid} on .* writes there since"):
        open_stage(out, "caption", {})
    with pytest.raises(UserError, match="writes there"):
        open_stage(out, "caption", {}, restart=True)
    assert sorted(path.name for path in out.iterdir()) == before
    first.kill()
    first.wait()
    stage = open_stage(out, "caption", {})
    assert stage.resumed
    stage.finish()
    assert not (out / lock.LOCK).exists()
    assert open_stage(out, "caption", {}).complete


def test_a_process_number_that_was_given_again_is_somebody_else(tmp_path: Path) -> None:
    """The holder died, and an unrelated process now has its number."""
    lock.hold(tmp_path)
    text = json.loads((tmp_path / lock.LOCK).read_text())
    lock.release(tmp_path)
    (tmp_path / lock.LOCK).write_text(json.dumps(text | {"started": "1"}))
    lock.hold(tmp_path)
    assert json.loads((tmp_path / lock.LOCK).read_text()) == text


def test_a_process_elsewhere_lives_as_long_as_it_touches_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the clock here agrees with its own does not matter: only the file system's times are compared."""
    path = tmp_path / lock.LOCK
    path.write_text(json.dumps({"host": "node-7", "pid": 12, "place": "node-7 x y", "command": "captune run r"}))
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        os.utime(path)

    monkeypatch.setattr(lock.time, "sleep", nap)
    with pytest.raises(UserError, match="process 12 on node-7 .*captune run r.*remove .*.lock"):
        lock.hold(tmp_path)
    assert len(naps) == 1
    silent = time.time() - lock.SILENT_S - 5
    os.utime(path, (silent, silent))
    lock.hold(tmp_path)
    assert json.loads(path.read_text())["pid"] == os.getpid()


RACE = (
    "import sys; from pathlib import Path; from pipelines import lock\n"
    "print('ready', flush=True); sys.stdin.readline()\n"
    "try: lock.hold(Path(sys.argv[1])); print('mine', flush=True)\n"
    "except lock.Busy: print('busy', flush=True)\n"
    "sys.stdin.readline()"
)


@pytest.mark.parametrize("dead", [False, True])
def test_of_several_processes_that_come_at_once_one_gets_the_directory(tmp_path: Path, dead: bool) -> None:
    """A free one, and one whose holder has died; nobody is told anything but who has it."""
    if dead:
        first = holder(tmp_path)
        first.kill()
        first.wait()
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(5)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 5  # type: ignore[union-attr]
    for racer in racers:
        racer.stdin.write("\n")  # type: ignore[union-attr]
        racer.stdin.flush()  # type: ignore[union-attr]
    said = [racer.stdout.readline() for racer in racers]  # type: ignore[union-attr]
    for racer in racers:
        racer.communicate("\n")
    assert sorted(said) == ["busy\n"] * 4 + ["mine\n"]
    assert not list(tmp_path.glob(f"{lock.LOCK}*"))


def test_a_process_whose_place_was_taken_ends(tmp_path: Path) -> None:
    """Its node was cut off for a while, and another has gone on: of the two one writes."""
    work = (
        "import sys, time; from pathlib import Path; from pipelines import lock; from ray_jobs import cli\n"
        "lock.BEAT_S = 0.1\n"
        "def work(argv): lock.hold(Path(argv[0])); print('held', flush=True); time.sleep(60)\n"
        "sys.exit(cli.guarded(work, sys.argv[1:]))"
    )
    pipe = subprocess.PIPE
    cut_off = subprocess.Popen(
        [sys.executable, "-c", work, str(tmp_path)], cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    )
    assert cut_off.stdout is not None and cut_off.stdout.readline() == "held\n"
    other = json.dumps({"host": "node-7", "pid": 12, "place": "node-7 x y", "command": "captune run r"})
    (tmp_path / lock.LOCK).write_text(other)
    _, said = cut_off.communicate(timeout=30)
    assert cut_off.returncode == 1
    assert f"{tmp_path}: this process was silent" in said and "process 12 on node-7 (captune run r)" in said
    assert (tmp_path / lock.LOCK).read_text() == other


def test_what_a_finished_stage_clears_is_gone_before_somebody_who_waits_begins(tmp_path: Path) -> None:
    """Or the next job's first files would be cleared with it."""
    stage = open_stage(tmp_path / "out", "caption", {})
    work = tmp_path / "out" / "_work"
    work.mkdir()
    for name in range(3000):
        (work / str(name)).touch()
    wait = (
        "import sys; from pathlib import Path; from pipelines import lock\n"
        "out = Path(sys.argv[1]); print('waits', flush=True); lock.hold(out, patience_s=30)\n"
        "print((out / '_work').exists(), (out / 'MANIFEST.json').exists())"
    )
    command = [sys.executable, "-c", wait, str(tmp_path / "out")]
    waiting = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert waiting.stdout is not None and waiting.stdout.readline() == "waits\n"
    time.sleep(0.5)
    stage.finish(clear=work)
    assert waiting.communicate(timeout=30)[0] == "False True\n"
