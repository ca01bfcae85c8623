"""Identity of a dataset for a stage's fingerprint: cheap enough for a million pictures, strict about everything that is text."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipelines import manifest

_TEXT = {".json", ".jsonl", ".ndjson", ".txt", ".caption"}


def identity(path: Path) -> str:
    """Digest of a dataset's contents, independent of where it lies.

    A file is read whole, and a captune stage's output has its manifest's fingerprint. In a folder, text is read whole while
    pictures and shards count by name and size: reading a terabyte to learn that nothing changed would cost more than it
    tells, and sample ids are made from the contents anyway.
    """
    if path.is_file() or (path / manifest.CLAIM).exists():
        return manifest.identity(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        if file.suffix.lower() in _TEXT:
            digest.update(file.read_bytes())
    return digest.hexdigest()
