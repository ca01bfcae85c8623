"""Files that are compressed as a whole (gzip, Zstandard, bzip2, xz), read as if they were not."""

from __future__ import annotations

import io
import lzma
import zlib
from typing import BinaryIO, cast

from pipelines.storage import AnyPath

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_ENDINGS = (".gz", ".zst", ".zstd", ".bz2", ".xz")
_SHORT = {".tgz": ".tar", ".tbz2": ".tar", ".txz": ".tar"}
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file may raise."""


def unpacked(path: AnyPath) -> tuple[BinaryIO, bool]:
    """The contents of a file from its beginning, and whether they had to be unpacked: then they cannot be sought in."""
    raw = path.open("rb")
    head = raw.read(6)
    raw.seek(0)
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
    return (_unpacking(raw, kind), True) if kind else (raw, False)


def _unpacking(raw: BinaryIO, kind: str) -> BinaryIO:
    if kind == "zstd":  # which Python learns in 3.14
        import pyarrow as pa

        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(raw, "zstd")), 1 << 20)
    import bz2
    import gzip

    if kind == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    return cast(BinaryIO, bz2.BZ2File(raw) if kind == "bz2" else lzma.LZMAFile(raw))


def ending(name: str) -> str:
    """Ending of a file's name without that of its compression: `.tar` of `0.tar.gz` and of `0.tgz`."""
    name = name.lower()
    bare = next((name.removesuffix(each) for each in _ENDINGS if name.endswith(each)), name)
    suffix = f".{bare.rpartition('.')[2]}" if "." in bare.lstrip(".") else ""
    return _SHORT.get(suffix, suffix)
