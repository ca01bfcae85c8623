"""WebDataset tars: files with the same stem are one sample (`000.jpg`, `000.txt`, `000.json`)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pipelines.errors import UserError
from pipelines.formats.rows import SUFFIXES, Row, bad_row, parse_json
from pipelines.formats.texts import caption_of, noted
from pipelines.storage import AnyPath, files_in

_TEXTS = (".txt", ".text", ".caption")


def rows(path: AnyPath) -> Iterator[Row]:
    """Samples of one tar or of every `*.tar` in a folder, by file name. A tar that breaks off gives its whole samples
    and one error row.

    Raises:
        UserError: a file is no tar at all.
    """
    for file in files_in(path, "*.tar"):
        yield from _shard(file)


def _shard(file: AnyPath) -> Iterator[Row]:
    key, reading, broken = "", False, ""
    parts: list[tuple[str, bytes]] = []
    try:
        with file.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in _members(tar, raw):
                stem, suffix = _split(member.name)
                if parts and stem != key:
                    yield _row(parts, f"{file.name}/{key}", key)
                    parts = []
                key, reading = stem, True
                stream = tar.extractfile(member)
                assert stream is not None  # it is a file
                parts.append((suffix, stream.read()))
                reading = False
    except (tarfile.TarError, OSError, EOFError) as error:
        if not key:
            raise UserError(f"{file}: not a readable tar ({error})") from None
        broken = f"the tar breaks off here, {error}"
    if parts and not reading:
        yield _row(parts, f"{file.name}/{key}", key)
    if broken:  # in the middle of a sample it is that sample's fault, after one it is a row of its own
        yield bad_row(f"{file.name}/{key}" if reading else file.name, broken)


def _members(tar: tarfile.TarFile, raw: BinaryIO) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
            yield member
    # Python takes a damaged header after the first for the end of the tar; the true end is a block of zeros, or
    # nothing.
    raw.seek(tar.offset)
    if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no valid header at byte {tar.offset:,}")


def _split(name: str) -> tuple[str, str]:
    """`a/b.seg.png` -> (`a/b`, `.seg.png`): WebDataset splits at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), (dot + suffix).lower()


def _row(parts: list[tuple[str, bytes]], where: str, key: str) -> Row:
    pictures = [data for suffix, data in parts if suffix in SUFFIXES]
    row, notes = Row(where, meta={"__key__": key}), []
    for suffix, data in parts:
        if suffix in _TEXTS:
            row.caption, note = caption_of(data)
            notes.append(note)
        elif suffix == ".json":
            try:
                value = parse_json(data)
            except ValueError as error:
                notes.append(f"its JSON is {error}")
                continue
            row.meta = {"__key__": key, **(value if isinstance(value, dict) else {"json": value})}
    if not row.caption:
        row.caption, note = caption_of(row.meta.get("caption") or row.meta.get("text"))
        notes.append(note)
    row.meta = noted(row.meta, "; ".join(filter(None, notes)))
    if len(pictures) != 1:
        found = f"holds {len(pictures)} images" if pictures else "lacks an image"
        return bad_row(where, f"the sample {found}", caption=row.caption, meta=row.meta)
    row.image = pictures[0]
    return row


def write(samples: Iterable[dict[str, Any]], path: Path) -> int:
    """Write `{"caption", "image", "suffix", "meta", "sample_id"}` samples to one tar, the same bytes every time;
    returns their number.
    """
    count = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            count += 1
            meta = {key: value for key, value in sample["meta"].items() if key not in ("__key__", "caption", "text")}
            _add(tar, sample["sample_id"] + sample["suffix"], sample["image"])
            _add(tar, sample["sample_id"] + ".txt", sample["caption"].encode())
            if meta:
                _add(tar, sample["sample_id"] + ".json", json.dumps(meta, ensure_ascii=False).encode())
    return count


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
