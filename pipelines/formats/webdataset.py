"""WebDataset tars: files with the same stem are one sample (`000.jpg`, `000.txt`, `000.json`)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from pipelines.errors import UserError
from pipelines.formats.packed import DAMAGED, unpacked
from pipelines.formats.reading import DEFAULT, Reading
from pipelines.formats.rows import SUFFIXES, TEXTS, Row, bad_row, broken, captioned, parse_json
from pipelines.formats.texts import captions_of, shown
from pipelines.storage import AnyPath, files_in

Parts = list[tuple[str, bytes]]
"""Files of a sample: ending and contents."""


class _Member(NamedTuple):
    """A file in a tar, and where its contents lie."""

    key: str
    suffix: str
    offset: int
    size: int


def rows(path: AnyPath, reading: Reading = DEFAULT) -> Iterator[Row]:
    """Samples of one tar or of every `*.tar` in a folder, by file name. A tar that breaks off gives its whole samples
    and one error row.

    Files of a sample need not lie next to each other in a tar on a disk. In one that is compressed or far away they
    have to.

    Raises:
        UserError: a file is no tar at all, or cannot be read in its order.
    """
    for file in files_in(path, "*.tar"):
        stream, packed = unpacked(file)
        with stream:
            near = isinstance(file, Path) and not packed
            samples = _by_key(file, stream) if near else _in_order(file, stream, packed)
            for where, key, parts in samples:
                yield _row(parts, where, key, reading) if isinstance(parts, list) else bad_row(where, parts)


def _by_key(file: AnyPath, raw: BinaryIO) -> Iterator[tuple[str, str, Parts | str]]:
    """Place, key and files of every sample of a tar that can be sought in; in place of files what is wrong with them.

    All headers come first, since the file that makes a sample whole may be the tar's last.
    """
    members, damage = [], ""
    try:
        with tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in _members(tar, raw):
                members.append(_Member(*_split(member.name), member.offset_data, member.size))
    except (tarfile.TarError, *DAMAGED) as error:
        if not members:
            raise UserError(f"{file}: not a readable tar ({error})") from None
        damage = f"the tar breaks off here, {error}"
    places, short = _samples(members), ""
    for place, group in groupby(sorted(range(len(members)), key=places.__getitem__), key=places.__getitem__):
        parts: Parts = []
        key = members[place].key
        for part in map(members.__getitem__, group):
            raw.seek(part.offset)
            parts.append((part.suffix, raw.read(part.size)))
            short = key if len(parts[-1][1]) < part.size else short
        yield f"{file.name}/{key}", key, damage if short == key and damage else parts
    if damage and not short:  # after a sample it is a row of its own
        yield file.name, "", damage


def _samples(members: Sequence[_Member]) -> list[int]:
    """Of each file the first one of its sample. A second file of the same name begins a sample of its own: tars were
    appended to one another.
    """
    places: list[int] = []
    begun: dict[str, tuple[int, str]] = {}
    for number, member in enumerate(members):
        first, suffixes = begun.get(member.key, (number, ""))
        if f"{member.suffix}|" in suffixes:
            first, suffixes = number, ""
        begun[member.key] = first, f"{suffixes}{member.suffix}|"
        places.append(first)
    return places


def _in_order(file: AnyPath, stream: BinaryIO, packed: bool) -> Iterator[tuple[str, str, Parts | str]]:
    """The same of a tar that can only be read once."""
    key, reading, damage = "", False, ""
    parts: Parts = []
    done: set[str] = set()
    try:
        with tarfile.open(fileobj=stream, mode="r|" if packed else "r:") as tar:
            for member in _members(tar, None if packed else stream):
                stem, suffix = _split(member.name)
                if parts and stem != key:
                    yield f"{file.name}/{key}", key, parts
                    done.add(key)
                    parts = []
                if stem in done:
                    raise UserError(
                        f"{file}: not sorted, the files of sample '{stem}' are apart; captune reads such a tar when "
                        "it is on a disk and not compressed, or put files of one name together (tar --sort=name)"
                    )
                key, reading = stem, True
                contents = tar.extractfile(member)
                assert contents is not None  # it is a file
                parts.append((suffix, contents.read()))
                reading = False
    except (tarfile.TarError, *DAMAGED) as error:
        if not key:
            raise UserError(f"{file}: not a readable tar ({error})") from None
        damage = f"the tar breaks off here, {error}"
    if parts and not reading:
        yield f"{file.name}/{key}", key, parts
    if damage:
        yield f"{file.name}/{key}" if reading else file.name, key, damage


def _members(tar: tarfile.TarFile, raw: BinaryIO | None) -> Iterator[tarfile.TarInfo]:
    while member := tar.next():
        tar.members.clear()  # type: ignore[attr-defined]  # of which Python would keep every one
        if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
            yield member
    # Python takes a damaged header after the first for the end of the tar; the true end is a block of zeros, or
    # nothing.
    if raw is not None:
        raw.seek(tar.offset)
        if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no valid header at byte {tar.offset:,}")


def _split(name: str) -> tuple[str, str]:
    """`a/b.seg.png` -> (`a/b`, `.seg.png`): WebDataset splits at the first dot of the base name."""
    folder, _, base = shown(name).removeprefix("./").rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), (dot + suffix).lower()


def _row(parts: Parts, where: str, key: str, reading: Reading) -> Row:
    pictures = [data for suffix, data in parts if suffix in SUFFIXES]
    meta: dict[str, Any] = {"__key__": key}
    texts: list[str] = []
    notes = []
    for suffix, data in parts:
        if suffix in TEXTS:
            found, note = captions_of(data, reading.encoding)
            texts += found
            notes.append(note)
        elif suffix == ".json":
            try:
                value = parse_json(data, reading.encoding)
            except ValueError as error:
                notes.append(f"its JSON is {error}")
                continue
            meta = {"__key__": key, **(value if isinstance(value, dict) else {"json": value})}
    column = reading.caption_column(meta)
    named = reading.columns.get("caption")
    if named and named not in meta:
        notes.append(f"it has no '{named}'")
    caption = texts if texts and named not in meta else meta.get(column)
    row = captioned(where, caption, meta, reading, *notes)
    if len(pictures) != 1:
        return broken(row, f"the sample {f'holds {len(pictures)} images' if pictures else 'lacks an image'}")
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
            name = sample["sample_id"].replace(".", "_")  # at a dot WebDataset parts key and ending
            _add(tar, name + sample["suffix"], sample["image"])
            _add(tar, name + ".txt", sample["caption"].encode())
            if meta:
                _add(tar, name + ".json", json.dumps(meta, ensure_ascii=False).encode())
    return count


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
