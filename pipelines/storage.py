"""Files that are not on a local disk, through any pyarrow filesystem: `s3://`, `gs://`, `abfs://`, `hdfs://`.

Credentials and endpoints come from where each system looks for them itself (for S3: AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL, an instance's role), so that they stand in no recipe. `RemotePath` has the part of pathlib's interface
that reading needs: a format's reader does not know which of the two it has.
"""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "memory")
"""What captune reads from; `memory` is fsspec's, of one process. The web is not among them: captune fetches nothing
from there."""
_BUFFER = 4 << 20
_GLOB = set("*?[")


def is_remote(path: object) -> bool:
    """True for an address of a storage system that captune reads, e.g. `s3://bucket/key`."""
    scheme, mark, _ = str(path).partition("://")
    return bool(mark) and scheme.lower() in SCHEMES


def is_glob(path: object) -> bool:
    """True when a path holds a wildcard."""
    return bool(_GLOB & set(str(path)))


class RemotePath:
    """A file or folder by its address; every method may raise OSError, as a Path's does.

    Args:
        uri: e.g. `s3://bucket/folder/file.jpg`.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")

    def __str__(self) -> str:
        return self._uri

    def __truediv__(self, name: str) -> RemotePath:
        scheme, _, path = self._uri.partition("://")  # stores know no `..`, which names in a dataset may hold
        return RemotePath(f"{scheme}://{posixpath.normpath(f'{path}/{name}')}")

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self._uri.partition("://")[2])

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self._pure.name

    @property
    def suffix(self) -> str:
        """Ending of the name, with its dot."""
        return self._pure.suffix

    @property
    def parent(self) -> RemotePath:
        """The folder around it."""
        return RemotePath(self._uri.rpartition("/")[0])

    def relative(self, folder: RemotePath) -> str:
        """The address below `folder`."""
        return self._uri.removeprefix(str(folder)).lstrip("/")

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file's bytes, buffered and seekable; for reading only."""
        assert mode == "rb"
        filesystem, path = _locate(self._uri)
        return cast(BinaryIO, io.BufferedReader(cast(Any, filesystem.open_input_file(path)), _BUFFER))

    def read_bytes(self) -> bytes:
        """The whole file."""
        filesystem, path = _locate(self._uri)
        with filesystem.open_input_file(path) as stream:
            return bytes(stream.read())

    def exists(self) -> bool:
        """A file or a folder is there."""
        return self._info().type.name in ("File", "Directory")

    def is_dir(self) -> bool:
        """A folder is there (in an object store: a prefix of other addresses)."""
        return bool(self._info().type.name == "Directory")

    def is_file(self) -> bool:
        """A file is there."""
        return bool(self._info().type.name == "File")

    def size_and_time(self) -> tuple[int, int]:
        """Bytes and modification time in nanoseconds."""
        info = self._info()
        return int(info.size or 0), int(info.mtime_ns or 0)

    def glob(self, pattern: str) -> list[RemotePath]:
        """Files directly in this folder whose name fits."""
        return [file for file, _ in self.files(recursive=False) if fnmatchcase(file.name, pattern)]

    def files(self, *, recursive: bool = True) -> list[tuple[RemotePath, int]]:
        """Files below this folder, sorted by address, with their sizes."""
        from pyarrow.fs import FileSelector

        filesystem, path = _locate(self._uri)
        found = filesystem.get_file_info(FileSelector(path, recursive=recursive, allow_not_found=True))
        below = len(path.strip("/")) + 1
        sizes = {info.path.strip("/")[below:]: int(info.size) for info in found if info.type.name == "File"}
        return [(self / name, sizes[name]) for name in sorted(sizes)]

    def names(self) -> Iterator[tuple[str, bool]]:
        """Names directly in this folder, and whether each is a folder."""
        from pyarrow.fs import FileSelector

        filesystem, path = _locate(self._uri)
        for info in filesystem.get_file_info(FileSelector(path, allow_not_found=True)):
            yield info.base_name, info.type.name == "Directory"

    def _info(self) -> FileInfo:
        filesystem, path = _locate(self._uri)
        return filesystem.get_file_info(path)


AnyPath = Path | RemotePath


def files_in(path: AnyPath, pattern: str) -> list[AnyPath]:
    """The file itself, or those directly in the folder whose name fits, sorted."""
    if path.is_file():
        return [path]
    found: list[AnyPath] = [*path.glob(pattern)]
    return sorted(found, key=str)


def names_in(path: AnyPath) -> Iterator[tuple[str, bool]]:
    """Names directly in a folder, in no order, and whether each is a folder."""
    if isinstance(path, RemotePath):
        yield from path.names()
        return
    with os.scandir(path) as entries:
        yield from ((entry.name, entry.is_dir()) for entry in entries)


def expand(pattern: str) -> Iterator[AnyPath]:
    """Files that a pattern with `*`, `?`, `[...]` or `**` names, sorted."""
    if not is_remote(pattern):
        import glob

        yield from (Path(found).absolute() for found in sorted(glob.glob(pattern, recursive=True)))
        return
    parts = pattern.split("/")
    fixed = next(number for number, part in enumerate(parts) if is_glob(part))
    for file, _ in RemotePath("/".join(parts[:fixed])).files():
        if _fits(str(file).split("/"), parts):
            yield file


def _fits(names: list[str], patterns: list[str]) -> bool:
    """Path parts against pattern parts; `**` stands for any number of folders."""
    if not patterns or not names:
        return not patterns and not names
    if patterns[0] == "**":
        return _fits(names, patterns[1:]) or _fits(names[1:], patterns)
    return fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


def _locate(uri: str) -> tuple[FileSystem, str]:
    scheme, _, rest = uri.partition("://")
    return _filesystem(scheme.lower(), rest.partition("/")[0]), rest


@lru_cache
def _filesystem(scheme: str, bucket: str) -> FileSystem:
    """One per bucket and process: asking a bucket for its region takes a round trip."""
    import pyarrow.fs as fs

    if scheme == "memory":
        import fsspec

        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    return fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]
