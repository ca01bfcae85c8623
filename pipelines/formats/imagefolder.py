"""A folder of pictures; captions come from a `.txt` of the same name or from `metadata.jsonl`, otherwise they are empty."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.formats.rows import SUFFIXES, Row, bad_row, parse_json, with_image_path

METADATA = "metadata.jsonl"


def has_pictures(path: Path) -> bool:
    """True when a file below `path` is named like a picture; stops at the first."""
    return next(_pictures(path), None) is not None


def rows(path: Path) -> Iterator[Row]:
    """Pictures anywhere below `path`, by name, then whatever `metadata.jsonl` names in vain. Other files are not rows.

    Raises:
        UserError: no picture in the folder.
    """
    described, broken = _metadata(path)
    seen = set()
    for file in _pictures(path):
        name = file.relative_to(path).as_posix()
        seen.add(name)
        meta = dict(described.get(name, {}))
        caption = meta.pop("text", None) or meta.pop("caption", None) or _beside(file)
        yield Row(name, str(caption).strip(), image_uri=str(file), meta=meta)
    for name in described:
        if name not in seen:
            yield with_image_path(Row(f"{METADATA}: {name}", meta=described[name]), name, path)
    yield from broken
    if not (seen or described or broken):
        raise UserError(f"{path}: no picture in this folder")


def _pictures(path: Path) -> Iterator[Path]:
    """Sorted depth first; hidden files and folders (thumbnails, version control) are not the user's pictures."""
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(folder, name)


def _beside(file: Path) -> str:
    try:
        return file.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _metadata(path: Path) -> tuple[dict[str, dict[str, Any]], list[Row]]:
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
