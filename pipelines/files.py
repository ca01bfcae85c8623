"""A file whole or not at all: written beside its place, flushed to the disk, then put there under its name.

A kill, a full disk or a lost node leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import UserError

PART = ".part"
"""What an unfinished file's name ends in."""


FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM)


def refusal(error: OSError, path: Path | str | None = None) -> str:
    """What a file system refused, in one line: the path, why, and what to do.

    Args:
        path: that was meant, where the error names none.
    """
    named = error.filename or path
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = error.strerror or (lines[-1] if lines else type(error).__name__)
    if named is None or isinstance(named, int):
        return what
    if error.errno in (*FULL, errno.EROFS, *FORBIDDEN):
        what = os.strerror(error.errno)  # pyarrow has words of its own
    place = _standing(Path(os.fsdecode(named)).absolute())
    if error.errno in FULL:
        volume, size = _volume(place)
        todo = "make room or enlarge it, and the same command continues"
        return f"{named}: {what}: the volume {volume} holds {size}; {todo}"
    if error.errno == errno.EROFS:
        return f"{named}: {what}: so is the volume {_volume(place)[0]}; mount it for writing, or write elsewhere"
    if error.errno in FORBIDDEN:
        facts = place.stat()
        return (
            f"{named}: {what}: this is user {os.geteuid()}, group {os.getegid()}, and {place} belongs to user "
            f"{facts.st_uid}, group {facts.st_gid} (mode {facts.st_mode & 0o7777:o})"
        )
    return f"{named}: {what}"


def _standing(path: Path) -> Path:
    """The path, or what of it is there and can be looked at."""
    while path != path.parent:
        try:
            path.stat()
            return path
        except OSError:
            path = path.parent
    return path


def _volume(place: Path) -> tuple[Path, str]:
    """Where the file system of a path is mounted, and how large it is."""
    space = os.statvfs(place)
    while place != place.parent and not os.path.ismount(place):
        place = place.parent
    size = space.f_blocks * space.f_frsize
    return place, f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what stands there at the end of the block becomes `path`. After an error nothing of it is
    left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full volume names none
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """A text file in UTF-8, without the byte order mark that editors on Windows put before it.

    Raises:
        UserError: it is no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error})") from error
