"""One writer per directory: a small file names the process that writes there, and says for how long it has been silent.

`flock` does not do: several shared file systems keep it to one machine, or ignore it. What all of them have is a file
that only one process can create, and that decides, here and between pods that mount one volume. Of a process on this
machine the kernel knows whether it lives; one elsewhere shows that it does by touching its file every ten seconds, and
a minute of silence is its end: a job that starts anew on another node goes on by itself. Times are those of the file
system, so clocks need not agree. A process whose place was taken meanwhile, because its node was cut off, ends when it
sees that.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import platform
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.files import write_text
from pipelines.progress import say

LOCK = ".lock"
BEAT_S, SILENT_S = 10.0, 60.0
_held: dict[Path, str] = {}
"""Directory -> content of its lock file, of this process."""
_lost: list[str] = []
_beating = threading.Event()


class Busy(UserError):
    """Another process writes there; that passes."""


def hold(directory: Path, patience_s: float = 0.0) -> None:
    """Keep other processes from writing to `directory` until `release` or the end of this one. Twice is once.

    Args:
        patience_s: seconds to wait for one that writes there.

    Raises:
        Busy: another process writes there (host, process and command are named).
        OSError: the directory cannot be written to.
    """
    directory = directory.resolve()
    if directory in _held:
        return
    give_up = time.monotonic() + patience_s
    first_beat: float | None = None
    while holder := _try(directory):
        beat = _last_beat(directory)
        lives = holder["place"] == _place() or (first_beat is not None and beat not in (None, first_beat))
        if lives and time.monotonic() >= give_up:
            raise Busy(_refusal(directory, holder))
        if first_beat is None:
            first_beat = beat
            if not lives:
                who = f"process {holder['pid']} on {holder['host']}"
                say(f"{directory}: {who} wrote here; waiting to see whether it lives")
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


def lost() -> str:
    """Why this process ends: another has taken its place. Empty while none has."""
    return next(iter(_lost), "")


def _try(directory: Path) -> dict[str, Any] | None:
    """Take the place if it is free or its holder is dead; else say who has it."""
    mine = json.dumps(_me())
    try:
        while not _created(directory / LOCK, mine):
            text = _text(directory)
            if text is None:
                continue  # let go this very moment
            holder = _parsed(text)
            if not _dead(holder, directory) or not _replaced(directory, text, mine):
                return holder
            say(f"{directory}: process {holder['pid']} on {holder['host']} wrote here and is gone; taking over")
            break
        _held[directory] = mine
    except BaseException:  # Ctrl-C just now
        if _text(directory) == mine:
            (directory / LOCK).unlink()
        raise
    if not _beating.is_set():
        _beating.set()
        threading.Thread(target=_beat, daemon=True, name="captune-lock").start()
        atexit.register(_release_own, os.getpid())
    return None


def _created(path: Path, text: str) -> bool:
    """Whether the file is new, and so this process's: of several only one can make it, on shared file systems, too."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
    except BaseException as error:
        path.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # a full volume names none
        raise
    return True


def _replaced(directory: Path, dead: str, mine: str) -> bool:
    """Whether this process has taken over from that dead one; of several that try at once, one does."""
    turn = directory / f"{LOCK}.after-{hashlib.blake2b(dead.encode(), digest_size=8).hexdigest()}"
    if not _created(turn, mine):
        if _silent(turn):
            turn.unlink(missing_ok=True)  # who had the turn died, too
        return False
    try:
        if _text(directory) != dead:
            return False
        write_text(directory / LOCK, mine)
        return True
    finally:
        turn.unlink(missing_ok=True)


def _last_beat(directory: Path) -> float | None:
    path = directory / LOCK
    return path.stat().st_mtime if path.exists() else None


def _dead(holder: dict[str, Any], directory: Path) -> bool:
    if holder["place"] == _place():
        return _started(holder["pid"]) != holder["started"]
    return _silent(directory / LOCK)


def _silent(path: Path) -> bool:
    """Whether nobody has touched a file for so long, by the clock of its file system; one that has gone is not."""
    now = path.with_name(f"{LOCK}.{platform.node()}.{os.getpid()}")
    now.touch()
    try:
        return now.stat().st_mtime - path.stat().st_mtime > SILENT_S
    except FileNotFoundError:
        return False
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
    try:
        return (directory / LOCK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _parsed(text: str) -> dict[str, Any]:
    """The holder; one that cannot be read is somebody elsewhere."""
    unknown = {"host": "another host", "pid": "?", "place": "", "started": "", "since": "?", "command": "?"}
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return unknown
    return unknown | found if isinstance(found, dict) else unknown


def _beat() -> None:
    """Show that this process lives, as long as it does; end it when another has its place."""
    while True:
        time.sleep(BEAT_S)
        for directory, mine in list(_held.items()):
            with contextlib.suppress(OSError):  # a shared file system may be away for a moment
                text = _text(directory)
                if text == mine:
                    os.utime(directory / LOCK)
                elif text and _held.get(directory) == mine:
                    holder = _parsed(text)
                    _lost.append(
                        f"{directory}: this process was silent for more than {SILENT_S:g} s, and process "
                        f"{holder['pid']} on {holder['host']} ({holder['command']}) has gone on in its place"
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                    return


def _release_own(pid: int) -> None:
    """At exit, but not at that of a forked child."""
    if os.getpid() == pid:
        release_all()
