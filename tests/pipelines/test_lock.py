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
