"""A folder of pictures; captions come from a `.txt` of the same name or from `metadata.jsonl`, otherwise they are
empty.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.formats.rows import SUFFIXES, Row, bad_row, parse_json, with_image_path
from pipelines.formats.texts import caption_of, noted
from pipelines.storage import AnyPath, RemotePath

METADATA = "metadata.jsonl"


def has_pictures(path: AnyPath) -> bool:
    """True when a file below `path` is named like a picture; stops at the first."""
    return next((True for name in _files(path) if _is_picture(name)), False)


def rows(path: AnyPath) -> Iterator[Row]:
    """Pictures anywhere below `path`, by name, then whatever `metadata.jsonl` names in vain. Other files are not rows.

    Raises:
        UserError: no picture in the folder.
    """
    described, broken = _metadata(path)
    names: Iterable[str] = _files(path)
    if isinstance(path, RemotePath):  # asking for every picture's text is a round trip each; one listing knows them all
        names = list(names)
        texts = {name for name in names if name.endswith(".txt")}
    seen = set()
    for name in filter(_is_picture, names):
        seen.add(name)
        meta = dict(described.get(name, {}))
        caption, note = caption_of(meta.pop("text", None) or meta.pop("caption", None))
        beside = os.path.splitext(name)[0] + ".txt"
        if not caption and (isinstance(path, Path) or beside in texts):
            caption, about_file = caption_of(_bytes(path / beside))
            note = about_file or note
        yield Row(name, caption, image_uri=str(path / name), meta=noted(meta, note))
    for name in described:
        if name not in seen:
            yield with_image_path(Row(f"{METADATA}: {name}", meta=described[name]), name, path)
    yield from broken
    if not (seen or described or broken):
        raise UserError(f"{path}: no picture in this folder")


def _files(path: AnyPath) -> Iterator[str]:
    """Names below `path`, depth first; hidden files and folders (thumbnails, version control) are not the user's."""
    if isinstance(path, RemotePath):
        names = (file.relative(path) for file, _ in path.files())
        yield from (name for name in names if not any(part.startswith(".") for part in name.split("/")))
        return
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name).relative_to(path).as_posix()


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _bytes(file: AnyPath) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _metadata(path: AnyPath) -> tuple[dict[str, dict[str, Any]], list[Row]]:
    described: dict[str, dict[str, Any]] = {}
    broken = []
    if (path / METADATA).exists():
        for number, line in enumerate((path / METADATA).read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{METADATA}:{number}"
            try:
                value = parse_json(line)
            except ValueError as error:
                broken.append(bad_row(where, str(error)))
                continue
            if isinstance(value, dict) and isinstance(value.get("file_name"), str):
                described[value.pop("file_name")] = value
            else:
                broken.append(bad_row(where, "it lacks 'file_name'"))
    return described, broken
