"""Identity of a dataset for a stage's fingerprint: cheap enough for a million pictures, strict about everything that is
text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines import manifest
from pipelines.formats.rows import TEXTS
from pipelines.storage import AnyPath

_TEXT = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", *TEXTS}


def identity(path: AnyPath) -> str:
    """Digest of a dataset's contents, independent of where it lies.

    A file is read whole, and a captune stage's output has its manifest's fingerprint. In a folder, text is read whole
    while pictures and shards count by name and size: reading a terabyte to learn that nothing changed would cost more
    than it tells, and sample ids are made from the contents anyway. A shard in a storage system counts by size and
    time.
    """
    if isinstance(path, Path) and (path.is_file() or (path / manifest.CLAIM).exists()):
        return manifest.identity(path)
    digest = hashlib.blake2b(digest_size=16)
    for file, name, size in _files(path):
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        if file.suffix.lower() in _TEXT:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def identity_of_parts(parts: Sequence[AnyPath]) -> str:
    """Digest of a dataset of several files, in their order; text is read whole, shards count by name and size, as in a
    folder.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole = not isinstance(part, Path) or part.suffix.lower() in _TEXT
        contents = identity(part) if whole else part.stat().st_size  # type: ignore[union-attr]
        digest.update(f"{part.name}\0{contents}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_otherwise(identity: str, reading: dict[str, Any]) -> str:
    """Identity of the same dataset when it is read in another way than by default; `{}` is that."""
    if not reading:
        return identity
    text = json.dumps([identity, reading], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _files(path: AnyPath) -> Iterator[tuple[AnyPath, str, str]]:
    if isinstance(path, Path):
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            yield file, str(file.relative_to(path)), str(file.stat().st_size)
    elif path.is_file():
        yield path, path.name, "{}\0{}".format(*path.size_and_time())
    else:
        yield from ((file, file.relative(path), str(size)) for file, size in path.files())
