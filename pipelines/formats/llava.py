"""LLaVA's instruction JSON: a list of `{"id", "image", "conversations"}`, images relative to the file's own folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.formats.rows import Row, bad_row, parse_json, with_image_path
from pipelines.storage import AnyPath

REQUEST = "<image>\nProvide a brief description of the given image."
"""What the human says in an exported pair; the wording of LLaVA's own alignment data."""


def rows(path: AnyPath) -> Iterator[Row]:
    """Rows of one JSON list; the caption is the first answer, the whole conversation stays in `meta`.

    Raises:
        UserError: the file is not a JSON list.
    """
    try:
        items = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: no LLaVA dataset ({error})") from None
    if not isinstance(items, list) or not items:
        raise UserError(f"{path}: no LLaVA dataset, it is not a JSON list of conversations")
    for number, item in enumerate(items, start=1):
        yield _row(item, f"{path.name}: item {number}", path.parent)


def _row(item: Any, where: str, base: AnyPath) -> Row:
    if not isinstance(item, dict):
        return bad_row(where, f"a JSON {type(item).__name__} where an object was expected")
    meta = {key: value for key, value in item.items() if key != "image"}
    turns, image = item.get("conversations"), item.get("image")
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        return bad_row(where, "'conversations' is not a list of turns", meta=meta)
    caption = next((turn["value"] for turn in turns if turn.get("from") in ("gpt", "assistant")), "").strip()
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if not image:
        return bad_row(where, "it lacks 'image'", caption=caption, meta=meta)
    if not isinstance(image, str):
        return bad_row(where, "'image' is not one file name", caption=caption, meta=meta)
    return with_image_path(Row(where, caption, meta=meta), image, base)


def write(samples: Iterable[dict[str, Any]], path: Path) -> int:
    """Write samples (see `datajuicer.write`) as one JSON list with one item a line; returns the number of items."""
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        stream.write("[")
        for count, sample in enumerate(samples, start=1):
            item = {
                "id": str(sample["meta"].get("id", sample["sample_id"])),
                "image": sample["image_path"],
                "conversations": _conversation(sample["meta"].get("conversations"), sample["caption"]),
            }
            stream.write(("\n" if count == 1 else ",\n") + json.dumps(item, ensure_ascii=False))
        stream.write("\n]\n")
    return count


def _conversation(turns: Any, caption: str) -> list[dict[str, str]]:
    """The sample's own request with the new answer; a longer conversation was about more than the caption and is
    replaced.
    """
    request = REQUEST
    if isinstance(turns, list) and len(turns) == 2 and turns[0].get("from") == "human":
        request = turns[0]["value"]
    return [{"from": "human", "value": request}, {"from": "gpt", "value": caption}]
