"""Data-Juicer's multimodal JSONL: `text` with special tokens, `images` with one path relative to the file's own
folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.formats.rows import Row, bad_row, rows_of_lines, with_image_path
from pipelines.formats.texts import caption_of, noted
from pipelines.storage import AnyPath

IMAGE_TOKEN = "<__dj__image>"
END_TOKEN = "<|__dj__eoc|>"


def rows(path: AnyPath) -> Iterator[Row]:
    """Rows of one JSONL file; blank lines are no rows.

    Raises:
        UserError: this is no JSONL at all.
    """
    return rows_of_lines(path, _row)


def _row(value: Any, where: str, base: AnyPath) -> Row:
    if not isinstance(value, dict):
        return bad_row(where, f"a JSON {type(value).__name__} where an object was expected")
    (text, note), images = caption_of(value.pop("text", "")), value.pop("images", None)
    value = noted(value, note)
    caption = text.replace(IMAGE_TOKEN, " ").replace(END_TOKEN, " ").strip()
    if isinstance(images, str):
        images = [images]
    if not images:
        return bad_row(where, "it lacks 'images'", caption=caption, meta=value)
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        return bad_row(where, "'images' is not a list of file names", caption=caption, meta=value)
    if len(images) > 1:
        return bad_row(
            where, f"'images' names {len(images)} images, and a row is one image-text pair", caption=caption, meta=value
        )
    return with_image_path(Row(where, caption, meta=value), images[0], base)


def write(samples: Iterable[dict[str, Any]], path: Path) -> int:
    """Write `{"caption", "image_path", "meta", "stats", "sample_id"}` samples, one line each; returns the number of
    lines.
    """
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for sample in samples:
            count += 1
            line = {
                "text": f"{IMAGE_TOKEN} {sample['caption']} {END_TOKEN}",
                "images": [sample["image_path"]],
                **{key: value for key, value in sample["meta"].items() if key not in ("text", "images")},
            }
            if sample["stats"]:
                line["__dj__stats__"] = sample["stats"]
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    return count
