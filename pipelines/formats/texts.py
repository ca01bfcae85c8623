"""Old captions as people's files hold them: null, numbers, lists, text in another encoding.

None of it costs a picture, since a new caption is what it is here for: what cannot be read is empty, and the row's
`meta` says so under `NOTE`.
"""

from __future__ import annotations

import codecs
import re
from typing import Any

NOTE = "captune_note"
"""Key of a row's `meta`: what was odd about its old caption or its metadata."""

_NOT_WESTERN = re.compile(rb"[\x80-\xff]{3}")


def decode(data: bytes) -> tuple[str, str]:
    """Text of some bytes, and what was odd about them; empty when nothing was.

    UTF-8, UTF-16, and Windows-1252 where no more than two bytes in a row are beyond ASCII, as in Western languages: of
    any other encoding nobody can tell which it is, and a guess would be a caption of nonsense.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace"), "its text was UTF-16"
    if data.count(0) * 3 > len(data):  # every second byte of Western text
        encoding = "utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"
        return data.decode(encoding, "replace"), "its text was UTF-16"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if _NOT_WESTERN.search(data):
            return "", "its text is in an unknown encoding and was left out"
        return data.decode("cp1252", "replace"), "its text was not UTF-8 and was read as Windows-1252"
    return text.replace("\0", ""), "its text held NULs, which were left out" if "\0" in text else ""


def caption_of(value: Any) -> tuple[str, str]:
    """Whatever stands where a caption should -> the caption, and what was odd about it. Of several texts the first."""
    if value is None or isinstance(value, str):
        return (value or "").strip(), ""
    if isinstance(value, bytes):
        text, note = decode(value)
        return text.strip(), note
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        texts = [text.strip() for text in value if text.strip()]
        first = "the first of " if value else ""
        return (texts or [""])[0], f"its caption is {first}a list of {len(value)}" if len(value) != 1 else ""
    return "", f"its caption is of type {type(value).__name__}, no text, and was left out"


def noted(meta: dict[str, Any], note: str) -> dict[str, Any]:
    """`meta` with a note in it, where there is one to make."""
    return {**meta, NOTE: note} if note else meta
