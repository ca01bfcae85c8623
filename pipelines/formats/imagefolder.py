"""A folder of pictures. Captions come from a file of the same name beside a picture (`.txt`, `.caption`, `.json`), or
from `metadata.csv`, `.jsonl` or `.parquet` in its folder or one above; otherwise they are empty.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.formats import delimited
from pipelines.formats.llava import first_answer
from pipelines.formats.reading import DEFAULT, Reading
from pipelines.formats.rows import SUFFIXES, TEXTS, Row, bad_row, captioned, parse_json, with_image_path
from pipelines.formats.texts import captions_of, shown
from pipelines.images import BadImage, read_bytes
from pipelines.storage import AnyPath, RemotePath

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_NAME = "file_name"

Entry = dict[str, Any]
"""What metadata say of a picture, without its name."""


def has_pictures(path: AnyPath) -> bool:
    """True when a file below `path` is named like a picture; stops at the first."""
    return any(is_picture(name) for _, names in _folders(path) for name in names)


def is_picture(name: str) -> bool:
    """Whether a file is named like a picture."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def rows(path: AnyPath, reading: Reading = DEFAULT) -> Iterator[Row]:
    """Pictures anywhere below `path`, by folder and name, then what metadata name in vain. Other files are not rows.

    A picture that several lines of metadata name has a row for each.

    Raises:
        UserError: no picture in the folder, or metadata that name none.
    """
    described: dict[str, list[Entry]] = {}
    wrong: list[Row] = []
    found = False
    for folder, names in _folders(path):
        there = set(names)
        for name in METADATA:
            if name in there:
                for where, key, entry in _metadata(path, f"{folder}{name}", reading):
                    if entry is None:
                        wrong.append(bad_row(where, key))
                    else:
                        described.setdefault(_place(folder, key), []).append(entry)
        for name in filter(is_picture, names):
            found = True
            for entry in described.pop(folder + name, [{}]):
                yield _row(path, folder, name, entry, there, reading)
    for name, entries in described.items():
        for entry in entries:
            yield with_image_path(_described(f"metadata: {name}", entry, reading), name, path)
    yield from wrong
    if not (found or described or wrong):
        raise UserError(f"{path}: no picture in this folder")


def _row(path: AnyPath, folder: str, name: str, entry: Entry, there: set[str], reading: Reading) -> Row:
    """One picture; `there` are the files beside it."""
    stem, notes = os.path.splitext(name)[0], []
    texts: list[str] = []
    sidecar: Entry = {}
    for beside in [f"{stem}{suffix}" for suffix in (*TEXTS, ".json") if f"{stem}{suffix}" in there]:
        try:
            data = _read(path, folder + beside)
            if beside.endswith(".json"):
                value = parse_json(data, reading.encoding)
                sidecar = value if isinstance(value, dict) else {"json": value}
                continue
            found, note = captions_of(data, reading.encoding)
            texts += found
        except OSError as error:
            note = f"its {beside} cannot be read, {error.strerror or error}"
        except ValueError as error:
            note = f"its JSON is {error}"
        notes.append(note)
    row = _described(shown(folder + name), entry, reading, texts, sidecar, *notes)
    place = f"{path}/{folder}{name}"
    try:
        place.encode()
        row.image_uri = place
    except UnicodeEncodeError:  # no record could say where it is, so it holds the picture
        try:
            row.image = read_bytes(place)
        except BadImage as problem:
            row.error = shown(str(problem))
    return row


def _read(path: AnyPath, name: str) -> bytes:
    if isinstance(path, RemotePath):
        return (path / name).read_bytes()
    with open(os.path.join(path, name), "rb") as stream:
        return stream.read()


def _described(
    where: str, entry: Entry, reading: Reading, texts: Sequence[str] = (), sidecar: Entry | None = None, *notes: str
) -> Row:
    """A row with the caption of its metadata; else, and in this order, what lies beside it as text and as JSON."""
    sidecar = sidecar or {}
    column, caption = _caption_in(entry, reading)
    if not caption and texts and reading.columns.get("caption") not in sidecar:
        caption = list(texts)
    elif not caption:
        column, caption = _caption_in(sidecar, reading)
    meta = {**sidecar, **entry}
    named = reading.columns.get("caption")
    lacking = f"it has no '{named}'" if named and named not in meta else ""
    if column and meta.get(column) is caption:
        del meta[column]
    return captioned(where, caption, meta, reading, *notes, lacking)


def _caption_in(entry: Entry, reading: Reading) -> tuple[str, Any]:
    """The key of an entry's caption, and that."""
    column = reading.caption_column([key for key, value in entry.items() if value])
    return column, entry.get(column) or first_answer(entry.get("conversations"))


def _place(folder: str, name: str) -> str:
    """A name in metadata as one below the dataset's folder; an address of the web as it is."""
    return name if "://" in name else posixpath.normpath(posixpath.join(folder, name))


def _folders(path: AnyPath) -> Iterator[tuple[str, list[str]]]:
    """Folders below `path`, each with the names of its files; the one above comes first. Hidden files and folders
    (thumbnails, version control) are not the user's.
    """
    if isinstance(path, RemotePath):
        files = [posixpath.split(file.relative(path)) for file, _ in path.files()]
        seen = [file for file in files if not any(map(_hidden, "/".join(file).split("/")))]
        for folder, group in groupby(sorted(seen), key=lambda file: file[0]):
            yield (f"{folder}/" if folder else ""), [name for _, name in group]
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(each for each in folders if not _hidden(each))
        prefix = os.path.relpath(folder, path)
        yield ("" if prefix == "." else f"{prefix}/"), sorted(name for name in names if not _hidden(name))


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _metadata(path: AnyPath, name: str, reading: Reading) -> Iterator[tuple[str, str, Entry | None]]:
    """Place, picture's name, and the rest of each line of a file of metadata; in place of a name what is wrong with a
    line, and then no rest.

    Raises:
        UserError: a table without a column of names, or in an encoding that nobody can tell.
    """
    file = path / name
    if name.endswith(".jsonl"):
        yield from _lines(file, name, reading)
        return
    table = delimited.lines(file, reading) if name.endswith(".csv") else _parquet(file)
    for number, value in enumerate(table, start=1):
        if not (key := _name_in(value, reading)):
            raise UserError(f"{file}: no column '{_NAME}' of pictures' names; it has {', '.join(map(str, value))}")
        yield _entry(f"{name}:{number}", key, value)


def _lines(file: AnyPath, name: str, reading: Reading) -> Iterator[tuple[str, str, Entry | None]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{name}:{number}"
            if not line.strip():
                continue
            try:
                value = parse_json(line, reading.encoding)
            except ValueError as error:
                yield where, str(error), None
                continue
            yield _entry(where, _name_in(value, reading) if isinstance(value, dict) else "", value)


def _name_in(entry: Entry, reading: Reading) -> str:
    """Key of a picture's name; empty where there is none."""
    column = _NAME if _NAME in entry and "image" not in reading.columns else reading.image_column(entry)
    return column if column in entry else ""


def _entry(where: str, key: str, value: Any) -> tuple[str, str, Entry | None]:
    if not key or not isinstance(value[key], str) or not value[key]:
        return where, f"it lacks '{key or _NAME}'", None
    return where, value.pop(key), value


def _parquet(file: AnyPath) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file if isinstance(file, Path) else file.open())
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({error})") from None
    yield from table.to_pylist()
