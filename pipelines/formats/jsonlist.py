"""A JSON list read item by item: a list of a million conversations would fill the memory of who reads it whole."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

from pipelines.formats.packed import unpacked
from pipelines.formats.rows import mended, parse_json
from pipelines.storage import AnyPath

_PIECE = 1 << 20
_SPACE = " \t\r\n"


def items_of_list(path: AnyPath, encoding: str = "") -> Iterator[Any]:
    """Items of a file that holds one JSON list, mended as `parse_json` mends them.

    A file in another encoding than UTF-8 is read as a whole.

    Raises:
        ValueError: no JSON list; the text says why. Items before the damage have come by then.
    """
    done = 0
    with unpacked(path)[0] as stream:
        try:
            for item in _items(stream):
                yield item
                done += 1
            return
        except UnicodeDecodeError:
            pass
    with unpacked(path)[0] as stream:
        items = parse_json(stream.read(), encoding)
    if not isinstance(items, list):
        raise ValueError("no JSON list")
    yield from islice(items, done, None)


def _items(stream: BinaryIO) -> Iterator[Any]:
    text = _Text(stream)
    if text.peek() != "[":
        raise ValueError("no JSON list")
    text.at += 1
    while text.peek() != "]":
        yield text.value()
        if text.peek() == ",":
            text.at += 1
        elif text.peek() != "]":
            raise ValueError("not valid JSON, the list breaks off")


class _Text:
    """As much of a stream's text as has been asked for, from the place `at` on."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._ended, self.at = "", False, 0

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self.at < len(self._text) and self._text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._more(_PIECE)

    def value(self) -> Any:
        """The JSON value that begins here."""
        size = _PIECE
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise ValueError(f"not valid JSON, {error.msg}") from None
                self._more(size)
                size *= 2  # a value of many pieces is parsed from its beginning a few times, and not at each
                continue
            except RecursionError:
                raise ValueError("not valid JSON, nested too deeply") from None
            text, self.at = self._text[self.at : end], end
            return mended(value, text)

    def _more(self, size: int) -> None:
        piece = self._stream.read(size)
        self._ended = not piece
        self._text, self.at = self._text[self.at :] + self._decoder.decode(piece, final=self._ended), 0
