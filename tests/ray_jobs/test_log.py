"""The log of a job in its run directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import os, pathlib, signal, subprocess, sys
from ray_jobs import _log
_log.keep(pathlib.Path(sys.argv[1]))
print("printed")
subprocess.run(["sh", "-c", "echo from a child >&2"])
{}
print("after", flush=True)
raise SystemExit(3)
"""


def _printed(log: Path, code: str) -> tuple[int, str]:
    words = [sys.executable, "-u", "-c", CODE.format(code), str(log)]
    out, err = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(words, cwd=ROOT, stdout=out, stderr=err, text=True, check=False, start_new_session=True)
    return done.returncode, done.stdout


def test_what_a_job_prints_is_kept_over_attempts_and_kills(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "job.log"
    first = "printed\nfrom a child\nafter\n"
    assert _printed(log, "") == (3, first)
    assert log.read_text() == first
    assert _printed(log, "os.kill(os.getpid(), signal.SIGKILL)")[0] == -9
    assert log.read_text() == first + "printed\nfrom a child\n"
    log.unlink()
    all_of_it = "signal.signal(signal.SIGTERM, lambda *_: print('stopping')); os.killpg(0, signal.SIGTERM)"
    assert _printed(log, all_of_it) == (3, "printed\nfrom a child\nstopping\nafter\n")
    assert log.read_text().endswith("stopping\nafter\n"), "an orderly end is in it"


def test_a_run_keeps_its_last_sentence(tmp_path: Path) -> None:
    """What the user has to mend is the last line of the log, after everything else."""
    log = tmp_path / "runs" / "mine" / "logs" / "job.log"
    words = ["run", "sample", "--stage", "serve", "--log", str(log)]
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.cli", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert log.read_text().startswith("captune: error: ") and log.read_text() in done.stdout
