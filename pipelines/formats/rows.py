"""A row as its format gives it, before anything has been read from its image, and how it becomes a sample record."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.formats.packed import unpacked
from pipelines.formats.reading import DEFAULT, Reading
from pipelines.formats.texts import captions_of, decode, noted
from pipelines.images import BadImage, read_bytes
from pipelines.records import Record, ids, new_record
from pipelines.storage import AnyPath, is_remote

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_UNUSUAL = re.compile(r"^\.|//|/\.|/$|^$")
"""In a name: something that a path is written without."""
_KIND = re.compile(r"[a-z]+(?: [a-z]+)*")
SUFFIXES = {
    ".avif", ".bmp", ".dds", ".dib", ".gif", ".icns", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pcx",
    ".pgm", ".png", ".pnm", ".ppm", ".sgi", ".tga", ".tif", ".tiff", ".webp",
}  # fmt: skip
"""File name endings that make a file a picture in a folder or a tar."""
TEXTS = (".txt", ".text", ".caption")
"""Those of the caption beside it."""


@dataclass
class Row:
    """One row of a dataset.

    Attributes:
        where: file and line, tar and key, or file name: what a person needs to find the row again, e.g.
            `dataset.jsonl:7`.
        caption: the text as found, without any format's special tokens.
        also: further captions of the same picture; `Dataset.rows` makes a row of each.
        image: encoded bytes, for formats that hold them.
        image_uri: absolute path or storage address, for formats that name a file. A row that has neither is text only:
            fit to train on, not to be captioned.
        images: all of them, each as bytes or as an address, where a row has several; then `image` and `image_uri` are
            None. Such a row is fit to train on, not to be captioned.
        error: why this row cannot be used; starts with its kind, see `error_kind`.
        meta: whatever else came with the row.
    """

    where: str
    caption: str = ""
    image: bytes | None = None
    image_uri: str | None = None
    error: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    images: tuple[bytes | str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[bytes | str, ...]:
        """Its images, however many."""
        one = self.image if self.image is not None else self.image_uri
        return self.images or (() if one is None else (one,))


def bad_row(where: str, reason: str, **known: Any) -> Row:
    """A row that stays in the count although nothing can be done with it."""
    return Row(where, error=f"bad row: {reason} ({where})", **known)


def broken(row: Row, reason: str) -> Row:
    """A row of which all but the picture is known."""
    return bad_row(row.where, reason, caption=row.caption, meta=row.meta)


def error_kind(error: str) -> str:
    """Kind of a record's error, for counting: `missing file: /a/b.jpg (x.jsonl:7)` is a `missing file`."""
    match = _KIND.match(error)
    return match.group() if match else "other"


def captioned(where: str, value: Any, meta: dict[str, Any], reading: Reading, *notes: str) -> Row:
    """A row without its picture.

    Args:
        value: whatever stands where its captions should.
        meta: the rest of it.
        notes: what else was odd about it.
    """
    if isinstance(value, str):  # nearly always, and worth the haste
        return Row(where, value.strip(), meta=noted(meta, "; ".join(filter(None, notes))))
    found, note = captions_of(value, reading.encoding)
    caption, *others = reading.chosen(found)
    return Row(where, caption, meta=noted(meta, "; ".join(filter(None, [*notes, note]))), also=tuple(others))


def with_image_path(row: Row, image: str, base: AnyPath) -> Row:
    """Resolve an image name against the dataset's folder; an address on the web is an error row, since captune fetches
    nothing from there.
    """
    if is_remote(image):
        row.image_uri = image
    elif _URL.match(image):
        row.error = (
            f"remote image: {image[:200]} is an address of the web, and captune fetches nothing from there "
            f"({row.where})"
        )
    elif isinstance(base, Path) and not _UNUSUAL.search(image):  # what pathlib would make of it, in a tenth of the time
        row.image_uri = os.path.join(base, image)
    else:
        row.image_uri = str(base / image)
    return row


def with_images(row: Row, images: Sequence[Any], base: AnyPath) -> Row:
    """The row with its images: bytes, or names that are resolved as in `with_image_path`. What is neither makes it an
    error row.
    """
    found: list[bytes | str] = []
    for image in images:
        if not isinstance(image, (bytes, str)) or not image:
            return broken(row, f"not a picture's name: {str(image)[:80]}")
        place = Row(row.where)
        if isinstance(image, str):
            place = with_image_path(place, image, image_folder(base, image))
        if place.error is not None:
            row.error = place.error
            return row
        found.append(place.image_uri or image)
    row.images = tuple(found)
    return row


def image_folder(base: AnyPath, image: str) -> AnyPath:
    """Where an image lies that a file in `base` names: in its folder, or in `images/` beside the file."""
    if isinstance(base, Path) and not os.path.exists(base / image) and os.path.exists(base / "images" / image):
        return base / "images"
    return base


def parse_json(data: bytes | str, encoding: str = "") -> Any:
    """JSON whose every string can be stored. An object, or an object of a list, whose text had to be mended for that
    says so under `NOTE`.

    Args:
        encoding: as for `texts.decode`.

    Raises:
        ValueError: no JSON; the text says why.
    """
    text, note = decode(data, encoding) if isinstance(data, bytes) else (data, "")
    foreign = not text and bool(data)
    try:
        value = json.loads(data.decode("utf-8", "replace") if foreign and isinstance(data, bytes) else text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON, {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not valid JSON, nested too deeply") from None
    return mended(value, text, note)


def mended(value: Any, text: str, note: str = "") -> Any:
    """A JSON value as it can be stored: `text` is what it was read from, `note` what was odd about that."""
    if not note and not ("\\u" in text and "\\ud" in text.lower()):
        return value
    return [_mended(item, note) for item in value] if isinstance(value, list) else _mended(value, note)


def _mended(value: Any, note: str) -> Any:
    try:
        written = json.dumps(value, ensure_ascii=False)
        written.encode()
    except UnicodeEncodeError:
        value = _each_string(value, lambda text: text.encode("utf-8", "ignore").decode())
        note = "its text held half a surrogate pair, which is no Unicode and was left out"
    else:
        if "\ufffd" in written:  # of an unknown encoding
            value = _each_string(value, lambda text: "" if "\ufffd" in text else text)
    return noted(value, note) if isinstance(value, dict) else value


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {change(key): _each_string(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_string(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def rows_of_lines(path: AnyPath, read: Callable[[Any, str, AnyPath], Row], reading: Reading = DEFAULT) -> Iterator[Row]:
    """Rows of a file with a JSON value a line; blank lines are no rows.

    Args:
        read: makes a row of a value, given where it stands and the file's folder.

    Raises:
        UserError: not one of the first 100 lines is a JSON object, so this is no JSONL at all.
    """
    good = seen = 0
    name, folder = path.name, path.parent
    stream, _ = unpacked(path)
    with stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where, seen = f"{name}:{number}", seen + 1
            try:
                value = parse_json(line, reading.encoding)
                good += isinstance(value, dict)
                row = read(value, where, folder)
            except ValueError as error:
                row = bad_row(where, str(error))
            if seen == 100 and not good:
                break
            yield row
    if not good:
        wrong = "none of its lines is a JSON object (`jq -c .` puts one on each line)" if seen else "it is empty"
        raise UserError(f"{path}: no JSONL dataset, {wrong}")


def to_record(row: Row) -> Record:
    """Read the image once for its content key; a record whose image is a file keeps the path and not the bytes."""
    return to_record_and_picture(row)[0]


def to_record_and_picture(row: Row) -> tuple[Record, str]:
    """The record, and the key of its picture, which rows with other captions may share; empty where there is none."""
    content, error = row.image, row.error
    if error is None and row.images:
        error = f"bad row: it has {len(row.images)} images, and a caption is about one ({row.where})"
    if error is None and content is None and row.image_uri is None:
        error = f"bad row: it has no image ({row.where})"
    if error is None and content is None:
        try:
            content = read_bytes(row.image_uri or "")
        except BadImage as problem:
            error = f"{problem} ({row.where})"
    if error is None and not content:
        error = f"empty file: the image has no bytes ({row.where})"
    if content is None and row.image_uri is None:
        content = row.where.encode()  # nothing else tells such rows apart
    sample, picture = ids(content, row.image_uri, row.caption)
    record = new_record(row.caption, image=row.image, image_uri=row.image_uri, error=error, meta=row.meta, key=sample)
    return record, "" if error else picture
