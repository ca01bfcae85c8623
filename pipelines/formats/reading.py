"""What a dataset does not say of itself: which column is the caption, which of several captions is meant, and in which
encoding old files are.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.errors import UserError

CAPTION, IMAGE = "caption", "image"
EACH, FIRST, LONGEST, JOIN = "each", "first", "longest", "join"
_SEVERAL = (EACH, FIRST, LONGEST, JOIN)
_CAPTIONS = ("text", "caption", "txt", "captions")
_IMAGES = (
    "image", "image_bytes", "images", "jpg", "jpeg", "png", "webp", "img", "image_uri", "image_path", "file_name",
)  # fmt: skip


@dataclass
class Reading:
    """How a dataset is read where it could be meant in more than one way.

    Attributes:
        columns: `caption` or `image` -> the name that it has in the dataset, e.g. `{caption: prompt}`. Where none is
            given: text, caption, txt or captions, and image, images, jpg and the like, in capitals, too.
        several: what becomes of several captions of one picture, in a list: `each` is a sample of its own, or the
            `first`, the `longest`, or all in one (`join`).
        encoding: of texts that are not UTF-8, e.g. gb18030 or cp1251; empty: UTF-16 and Windows-1252 are recognized,
            and texts in any other are left out.
    """

    columns: dict[str, Any] = field(default_factory=dict)
    several: str = EACH
    encoding: str = ""

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if name not in (CAPTION, IMAGE):
                raise UserError(f"caption.reading.columns: captune reads the columns caption and image, not '{name}'")
            if not isinstance(column, str) or not column:
                raise UserError(f"caption.reading.columns: '{column}' is no column's name")
        if self.several not in _SEVERAL:
            raise UserError(f"caption.reading.several must be one of {', '.join(_SEVERAL)}, not '{self.several}'")
        try:
            codecs.lookup(self.encoding or "utf-8")
        except LookupError:
            raise UserError(f"caption.reading.encoding: Python knows no encoding '{self.encoding}'") from None

    def decides(self) -> dict[str, Any]:
        """What is not as by default, for the fingerprint of what is made of a dataset."""
        return {key: value for key, value in asdict(self).items() if value != getattr(DEFAULT, key)}

    def caption_column(self, names: Collection[str]) -> str:
        """The column of captions: the one that was named, be it there or not; else one of `names`, or nothing."""
        return self.columns.get(CAPTION) or _known(_CAPTIONS, names)

    def image_column(self, names: Collection[str]) -> str:
        """The column of images, likewise."""
        return self.columns.get(IMAGE) or _known(_IMAGES, names)

    def chosen(self, captions: list[str]) -> list[str]:
        """Of several captions of one picture those that become samples; at least one, which may be empty."""
        captions = list(dict.fromkeys(captions)) or [""]
        if self.several == FIRST:
            return captions[:1]
        if self.several == LONGEST:
            return [max(captions, key=len)]
        return [" ".join(captions)] if self.several == JOIN else captions


DEFAULT = Reading()


def _known(wanted: tuple[str, ...], names: Collection[str]) -> str:
    if found := next((name for name in wanted if name in names), ""):
        return found
    by_name = {name.lower(): name for name in names}
    return next((by_name[name] for name in wanted if name in by_name), "")


def columns_of(given: Iterable[str]) -> dict[str, str]:
    """`["caption=TEXT"]` as on the command line -> `{"caption": "TEXT"}`.

    Raises:
        UserError: no such pairs.
    """
    found = {}
    for pair in given:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise UserError(f"--columns {pair}: give what it is and the column's name, as in --columns caption=TEXT")
        found[name] = column
    return found
