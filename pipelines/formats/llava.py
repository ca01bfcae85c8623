"""LLaVA's rows: `{"id", "image", "conversations"}` as a JSON list, or one a line; images relative to the file's folder.
Several images of a row are a list, in the order of their placeholders, under `image` or `images`. In a list, rows may
have a `caption` (one or several) in place of conversations, as LAVIS and BLIP have them.

The only place that knows what a conversation looks like: captioning, training and export ask it, whichever format
carried the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.formats.jsonlist import items_of_list
from pipelines.formats.packed import unpacked
from pipelines.formats.reading import DEFAULT, Reading
from pipelines.formats.rows import (
    Row,
    bad_row,
    broken,
    captioned,
    image_folder,
    rows_of_lines,
    with_image_path,
    with_images,
)
from pipelines.formats.texts import captions_of
from pipelines.storage import AnyPath

Turn = tuple[str, str]
"""Who says it (`user` or `assistant`; a word that is neither stays as it is) and the text, in which `<image>` stands
for the image."""
ROLES = {"human": "user", "gpt": "assistant"}
IMAGE = "<image>"
REQUEST = f"{IMAGE}\nProvide a brief description of the given image."
"""What the human says about a caption that came without a request; the wording of LLaVA's own alignment data."""
_WHO = {role: who for who, role in ROLES.items()}


def turns_of(conversations: Any) -> tuple[Turn, ...]:
    """The turns of a `conversations` value, whatever its shape turns out to be.

    Raises:
        ValueError: not a list of turns with `from` and `value`; the text says what stands there instead.
    """
    if not isinstance(conversations, list) or not conversations:
        raise ValueError("'conversations' is not a list of turns")
    turns = []
    for number, turn in enumerate(conversations):
        who, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(who, str) or not isinstance(text, str):
            raise ValueError(f"'conversations' turn {number} is not a 'from' and a text 'value': {str(turn)[:80]}")
        turns.append((ROLES.get(who, who), text))
    return tuple(turns)


def about(caption: str, conversations: Any = None) -> tuple[Turn, Turn]:
    """The conversation that teaches a caption: the sample's own request where it had one, else `REQUEST`.

    Args:
        caption: where it says `<image>` itself, a space keeps that from being a placeholder.
        conversations: what came with the sample. One of more than a request and an answer was about more than the
            caption, and is left out; a request without its placeholder gets one.
    """
    try:
        own = turns_of(conversations)
    except ValueError:
        own = ()
    request = own[0][1] if len(own) == 2 and own[0][0] == "user" and own[0][1].strip() else REQUEST
    if request.count(IMAGE) != 1:
        request = REQUEST if IMAGE in request else f"{IMAGE}\n{request}"
    return ("user", request), ("assistant", caption.replace(IMAGE, "< image>"))


def conversation(turns: Iterable[Turn]) -> list[dict[str, str]]:
    """Turns in the form that a file has; undoes `turns_of`."""
    return [{"from": _WHO.get(role, role), "value": text} for role, text in turns]


def first_answer(conversations: Any) -> str | None:
    """What a `conversations` value answers first; None where it is none, or holds no answer."""
    try:
        turns = turns_of(_with_texts(conversations, ""))
    except ValueError:
        return None
    return next((text for role, text in turns if role == "assistant"), None)


def is_row(value: Any) -> bool:
    """Whether a JSON value is a row of this format, and not of another that is written one object a line."""
    return isinstance(value, dict) and "conversations" in value and "text" not in value


def rows(path: AnyPath, reading: Reading = DEFAULT) -> Iterator[Row]:
    """Rows of one file; the caption is the first answer, the whole conversation stays in `meta`. A row of text only has
    no image and is not broken.

    Raises:
        UserError: the file is neither a JSON list nor JSON lines.
    """

    def read(value: Any, where: str, base: AnyPath) -> Row:
        return _row(value, where, base, reading)

    stream, _ = unpacked(path)
    with stream:
        is_list = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    yield from _rows_of_list(path, reading) if is_list else rows_of_lines(path, read, reading)


def _rows_of_list(path: AnyPath, reading: Reading) -> Iterator[Row]:
    number = -1
    try:
        for number, item in enumerate(items_of_list(path, reading.encoding)):
            yield _row(item, f"{path.name} row {number}", path.parent, reading)
    except ValueError as error:
        raise UserError(f"{path}: no LLaVA dataset ({error})") from None
    if number < 0:
        raise UserError(f"{path}: no LLaVA dataset, the list is empty")


def _row(item: Any, where: str, base: AnyPath, reading: Reading) -> Row:
    if not isinstance(item, dict):
        return bad_row(where, f"a JSON {type(item).__name__} where an object was expected")
    column = reading.image_column(item)
    meta = {key: value for key, value in item.items() if key not in (column, "image", "images")}
    own = reading.caption_column(item)
    if "conversations" not in item and own and own in item:
        row = captioned(where, meta.pop(own), meta, reading)
    else:
        try:
            turns = turns_of(_with_texts(item.get("conversations"), reading.encoding))
        except ValueError as reason:
            return bad_row(where, str(reason), meta=meta)
        row = Row(where, next((text for role, text in turns if role == "assistant"), "").strip(), meta=meta)
    image = item.get(column) or item.get("image") or item.get("images")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if not image:
        return row
    if isinstance(image, list):
        return with_images(row, image, base)
    if not isinstance(image, str):
        return broken(row, "'image' is not a file name")
    return with_image_path(row, image, image_folder(base, image))


def _with_texts(conversations: Any, encoding: str) -> Any:
    """An answer that is null or anything but text is an empty one: the picture is still there to be captioned."""
    if not isinstance(conversations, list):
        return conversations
    return [
        {**turn, "value": next(iter(captions_of(turn.get("value"), encoding)[0]), "")}
        if isinstance(turn, dict) and turn.get("from") in ("gpt", "assistant")
        else turn
        for turn in conversations
    ]


def write(samples: Iterable[dict[str, Any]], path: Path) -> int:
    """Write samples (see `datajuicer.write`) as one JSON list with one item a line; returns the number of items."""
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        stream.write("[")
        for count, sample in enumerate(samples, start=1):
            turns = about(sample["caption"], sample["meta"].get("conversations"))
            item = {
                "id": str(sample["meta"].get("id", sample["sample_id"])),
                "image": sample["image_path"],
                "conversations": conversation(turns),
            }
            stream.write(("\n" if count == 1 else ",\n") + json.dumps(item, ensure_ascii=False))
        stream.write("\n]\n")
    return count
