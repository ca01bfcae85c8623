"""Data-Juicer's multimodal JSONL: `text` with special tokens, `images` with one path relative to the file's own
folder. Lines that name caption and image otherwise (`caption`, `image`, ...) are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.formats.reading import DEFAULT, Reading
from pipelines.formats.rows import Row, bad_row, broken, captioned, rows_of_lines, with_image_path
from pipelines.storage import AnyPath

IMAGE_TOKEN = "<__dj__image>"
END_TOKEN = "<|__dj__eoc|>"


def rows(path: AnyPath, reading: Reading = DEFAULT) -> Iterator[Row]:
    """Rows of one JSONL file; blank lines are no rows.

    Raises:
        UserError: this is no JSONL at all.
    """

    def read(value: Any, where: str, base: AnyPath) -> Row:
        return _row(value, where, base, reading)

    return rows_of_lines(path, read, reading)


def without_tokens(value: Any) -> Any:
    """A text without Data-Juicer's special tokens; anything else as it is."""
    return value.replace(IMAGE_TOKEN, " ").replace(END_TOKEN, " ") if isinstance(value, str) else value


def literal(text: str) -> str:
    """A text in which nothing is a special token, whatever its author wrote."""
    return text.replace("<__dj__", "< __dj__").replace("<|__dj__", "< |__dj__")


def _row(value: Any, where: str, base: AnyPath, reading: Reading) -> Row:
    if not isinstance(value, dict):
        return bad_row(where, f"a JSON {type(value).__name__} where an object was expected")
    text, image = reading.caption_column(value), reading.image_column(value)
    note = f"it has no '{text}'" if text and text not in value else ""
    caption, images = without_tokens(value.pop(text, None)), value.pop(image, None)
    row = captioned(where, caption, value, reading, note)
    if isinstance(images, str):
        images = [images]
    if not images:
        return broken(row, "it lacks 'images'")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        return broken(row, "'images' is not a list of file names")
    if len(images) > 1:
        return broken(row, f"'images' names {len(images)} images, and a row is one image-text pair")
    return with_image_path(row, images[0], base)


def write(samples: Iterable[dict[str, Any]], path: Path) -> int:
    """Write `{"caption", "image_path", "meta", "stats", "sample_id"}` samples, one line each; returns the number of
    lines.
    """
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for sample in samples:
            count += 1
            line = {
                "text": f"{IMAGE_TOKEN} {literal(sample['caption'])} {END_TOKEN}",
                "images": [sample["image_path"]],
                **{key: value for key, value in sample["meta"].items() if key not in ("text", "images")},
            }
            if sample["stats"]:
                line["__dj__stats__"] = sample["stats"]
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    return count
