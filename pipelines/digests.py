"""Digests of files as large as model weights: read by many threads, and remembered while a file stays untouched.

What was computed is kept in the user's cache directory (`$XDG_CACHE_HOME/captune/digests`), one small file for each
large one. Where nothing can be written there, everything is read again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_BLOCK = 32 << 20
_WORTH_REMEMBERING = 1 << 20
_SETTLED_NS = 2_000_000_000
"""A file changed so shortly ago could change again within one tick of its file system's clock."""


def file_digests(files: Sequence[Path]) -> list[str]:
    """Hexadecimal 128-bit digests of files' contents, in their order.

    Raises:
        OSError: a file is not there or cannot be read.
    """
    entries = [_entry(file) for file in files]
    found = [_remembered(entry) for entry in entries]
    unread = [number for number, digest in enumerate(found) if digest is None]
    for number, digest in zip(unread, _computed([files[number] for number in unread]), strict=True):
        found[number] = digest
        # A file that changed while it was read has another entry by now, under which nothing is kept.
        if _entry(files[number]) == entries[number]:
            _remember(entries[number], digest)
    return [digest for digest in found if digest is not None]


def _computed(files: Sequence[Path]) -> list[str]:
    """Digest of the digests of each file's blocks: several threads can then work on one file."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        blocks = [
            [pool.submit(_block_digest, file, start) for start in range(0, max(1, file.stat().st_size), _BLOCK)]
            for file in files
        ]
        return [_hex(b"".join(block.result() for block in file)) for file in blocks]


def _block_digest(file: Path, start: int) -> bytes:
    digest, buffer = hashlib.blake2b(digest_size=16), bytearray(1 << 20)
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        left = _BLOCK
        while left and (count := stream.readinto(memoryview(buffer)[: min(left, len(buffer))])):
            digest.update(memoryview(buffer)[:count])
            left -= count
    return digest.digest()


def _hex(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _entry(file: Path) -> Path | None:
    """Where the file's digest is kept, by everything that changes when the file does; None when it shall not be."""
    stat, settled = file.stat(), time.time_ns() - _SETTLED_NS
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if stat.st_size < _WORTH_REMEMBERING or max(stat.st_mtime_ns, stat.st_ctime_ns) > settled or not root.is_absolute():
        return None
    # The inode's change time cannot be set by hand: a file unpacked with an old modification time is a new one.
    state = (file.resolve(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return root / "captune" / "digests" / _hex(repr(state).encode())


def _remembered(entry: Path | None) -> str | None:
    with suppress(OSError, ValueError):
        if entry is not None and len(bytes.fromhex(digest := entry.read_text())) == 16:
            return digest
    return None


def _remember(entry: Path | None, digest: str) -> None:
    if entry is None:
        return
    part = entry.with_name(f"{entry.name}.{os.getpid()}")
    with suppress(OSError):  # a full or read-only disk costs time at the next call, nothing else
        entry.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(digest)
        part.replace(entry)
