"""What a command prints, kept in a file as well: the log of a job outlives the pod that it ran in."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
from pathlib import Path

_DRAINED_S = 10.0
"""How long the last lines may take to the disk."""


def keep(file: Path) -> None:
    """Append everything that this process prints from now on to `file`, until it ends; another attempt goes on there.

    `tee` does it as a process of its own, so that nothing printed is lost when this one is killed; it outlives the
    SIGTERM with which Ray stops a job and ends with its input.

    Raises:
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.open("a").close()
    tee = subprocess.Popen(["tee", "-a", str(file)], stdin=subprocess.PIPE, preexec_fn=_deaf)
    assert tee.stdin is not None
    before = [os.dup(stream) for stream in (1, 2)]
    for stream in (1, 2):
        os.dup2(tee.stdin.fileno(), stream)
    tee.stdin.close()

    def drain() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, old in zip((1, 2), before, strict=True):
            os.dup2(old, stream)
        try:
            tee.wait(_DRAINED_S)
        except subprocess.TimeoutExpired:
            tee.kill()  # a process that was left behind holds its input

    atexit.register(drain)


def _deaf() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
