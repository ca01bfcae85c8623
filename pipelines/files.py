"""A file whole or not at all: written beside its place, flushed to the disk, then put there under its name.

A kill, a full disk or a lost node leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import UserError

PART = ".part"
"""What an unfinished file's name ends in."""


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
    except BaseException:
        part.unlink(missing_ok=True)
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
