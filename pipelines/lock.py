"""One writer per directory: a small file names the process that writes there, and says for how long it has been silent.

`flock` alone does not do: several shared file systems keep it to one machine, or ignore it. So the file's content
decides. Of a process on this machine the kernel knows whether it lives; one elsewhere shows that it does by touching
its file every ten seconds, and a minute of silence is its end: a job that starts anew on another node goes on by
itself. Times are those of the file system, so clocks need not agree. `flock` only keeps two processes from taking over
the same dead one's place at once.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.files import write_text
from pipelines.progress import say

LOCK = ".lock"
BEAT_S, SILENT_S = 10.0, 60.0
_held: dict[Path, str] = {}
"""Directory -> content of its lock file, of this process."""
_beating = threading.Event()


def hold(directory: Path) -> None:
    """Keep other processes from writing to `directory` until `release` or the end of this one. Twice is once.

    Raises:
        UserError: another process writes there (host, process and command are named).
        OSError: the directory cannot be written to.
    """
    directory = directory.resolve()
    if directory in _held:
        return
    first_beat: float | None = None
    while holder := _try(directory):
        beat = (directory / LOCK).stat().st_mtime if (directory / LOCK).exists() else None
        if holder["place"] == _place() or (first_beat is not None and beat not in (None, first_beat)):
            raise UserError(_refusal(directory, holder))
        if first_beat is None:
            first_beat = beat
            say(f"{directory}: process {holder['pid']} on {holder['host']} wrote here; waiting to see whether it lives")
        time.sleep(1.0)


def release(directory: Path) -> None:
    """Let others write there; does nothing when this process does not hold it."""
    directory = directory.resolve()
    mine = _held.pop(directory, None)
    if mine is not None and _text(directory) == mine:
        (directory / LOCK).unlink(missing_ok=True)


def release_all() -> None:
    """Let go of everything, at the end of a command."""
    for directory in list(_held):
        with contextlib.suppress(OSError):  # a full or vanished disk keeps the file; its silence will tell
            release(directory)


def held() -> list[Path]:
    """Directories that this process writes to."""
    return list(_held)


def _try(directory: Path) -> dict[str, Any] | None:
    """Take the place if it is free or its holder is dead; else say who has it."""
    with _one_at_a_time(directory):
        text = _text(directory)
        if text is not None:
            holder = _parsed(text)
            if not _dead(holder, directory):
                return holder
            say(f"{directory}: process {holder['pid']} on {holder['host']} wrote here and is gone; taking over")
        mine = json.dumps(_me())
        write_text(directory / LOCK, mine)
        _held[directory] = mine
    if not _beating.is_set():
        _beating.set()
        threading.Thread(target=_beat, daemon=True, name="captune-lock").start()
        atexit.register(_release_own, os.getpid())
    return None


def _dead(holder: dict[str, Any], directory: Path) -> bool:
    if holder["place"] == _place():
        return _started(holder["pid"]) != holder["started"]
    now = directory / f"{LOCK}.{platform.node()}.{os.getpid()}"
    now.touch()
    try:
        return now.stat().st_mtime - (directory / LOCK).stat().st_mtime > SILENT_S
    finally:
        now.unlink()


def _refusal(directory: Path, holder: dict[str, Any]) -> str:
    return (
        f"{directory}: process {holder['pid']} on {holder['host']} writes there since {holder['since']} "
        f"({holder['command']}). Wait for it or stop it; if it is surely gone, remove {directory / LOCK}"
    )


def _me() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "place": _place(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command_line()[:200],
    }


def command_line() -> str:
    """What this process was started with, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _place() -> str:
    """Where a process number means something: a host since its last start, and there a container."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return " ".join(
        [
            platform.node(),
            boot.read_text().strip() if boot.exists() else "",
            os.readlink(space) if space.exists() else "",
        ]
    )


def _started(pid: int) -> str | None:
    """When the process began, as the kernel counts; None when there is none. Numbers are given again, moments not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it lives and is somebody else's
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else "alive"


def _text(directory: Path) -> str | None:
    path = directory / LOCK
    return path.read_text() if path.exists() else None


def _parsed(text: str) -> dict[str, Any]:
    """The holder; one that cannot be read is somebody elsewhere."""
    unknown = {"host": "another host", "pid": "?", "place": "", "started": "", "since": "?", "command": "?"}
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return unknown
    return unknown | found if isinstance(found, dict) else unknown


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """`flock` on the directory, where the file system has it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _beat() -> None:
    """Show that this process lives, as long as it does."""
    while True:
        time.sleep(BEAT_S)
        for directory in list(_held):
            with contextlib.suppress(OSError):  # a shared file system may be away for a moment
                os.utime(directory / LOCK)


def _release_own(pid: int) -> None:
    """At exit, but not at that of a forked child."""
    if os.getpid() == pid:
        release_all()
