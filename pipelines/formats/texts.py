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
_KEYS_OF_TEXT = ("raw", "caption", "text", "sentence")
"""Of captions that are objects, as in `[{"raw": "a red sign", "sentid": 7}]`: the key that holds the text."""


def decode(data: bytes, encoding: str = "") -> tuple[str, str]:
    """Text of some bytes, and what was odd about them; empty when nothing was.

    UTF-8, UTF-16, and Windows-1252 where no more than two bytes in a row are beyond ASCII, as in Western languages: of
    any other encoding nobody can tell which it is, and a guess would be a caption of nonsense.

    Args:
        encoding: of what is not UTF-8, where somebody has said it.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace"), "its text was UTF-16"
    if data.count(0) * 3 > len(data):  # every second byte of Western text
        wide = "utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"
        return data.decode(wide, "replace"), "its text was UTF-16"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return _decode_foreign(data, encoding)
    return text.replace("\0", ""), "its text held NULs, which were left out" if "\0" in text else ""


def _decode_foreign(data: bytes, encoding: str) -> tuple[str, str]:
    if encoding:
        try:
            return data.decode(encoding), ""
        except UnicodeDecodeError:
            return "", f"its text is neither UTF-8 nor {encoding} and was left out"
    if _NOT_WESTERN.search(data):
        unknown = "its text is in an unknown encoding and was left out"
        return "", f"{unknown}; --caption.reading.encoding says which it is"
    return data.decode("cp1252", "replace"), "its text was not UTF-8 and was read as Windows-1252"


def captions_of(value: Any, encoding: str = "") -> tuple[list[str], str]:
    """Whatever stands where a caption should -> the captions, and what was odd about them. Each is without white space
    at its ends, and none is empty.
    """
    if isinstance(value, list):
        found, notes = [], []
        for item in value:
            texts, note = captions_of(item, encoding)
            found += texts
            notes.append(note)
        return found, next(filter(None, notes), "")
    if isinstance(value, dict):
        value = next((value[key] for key in _KEYS_OF_TEXT if isinstance(value.get(key), str)), value)
    text, note = value, ""
    if isinstance(value, bytes):
        text, note = decode(value, encoding)
    if text is not None and not isinstance(text, str):
        return [], f"its caption is of type {type(value).__name__}, no text, and was left out"
    text = (text or "").strip()
    return [text] if text else [], note


def shown(name: str) -> str:
    """A file's name as text can hold it: bytes that are no UTF-8 stand there as hexadecimal escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def noted(meta: dict[str, Any], note: str) -> dict[str, Any]:
    """`meta` with a note in it, where there is one to make."""
    return {**meta, NOTE: note} if note else meta
