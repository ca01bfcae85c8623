"""COCO's captions JSON: `images` with ids and file names, `annotations` with an image's id and a caption.

A row is one annotation, so a picture with five captions is five rows; a picture without any is a row without a caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipelines.errors import UserError
from pipelines.formats.rows import Row, bad_row, image_folder, parse_json, with_image_path
from pipelines.formats.texts import caption_of, noted
from pipelines.storage import AnyPath

_FIRST_KEYS = re.compile(rb'\{\s*("(info|licenses|annotations|categories|type)"|"images"\s*:\s*\[\s*(\{|\]))')


def is_coco(head: bytes) -> bool:
    """Whether a file that begins so is of this format: an object whose first key is one of COCO's, and whose `images`
    are objects and not names.
    """
    return _FIRST_KEYS.match(head) is not None


def rows(path: AnyPath) -> Iterator[Row]:
    """Rows in the order of the annotations, then pictures without one. Images lie in the file's folder, or in `images/`
    beside the file.

    Raises:
        UserError: the file is no such JSON, or its annotations are no captions (COCO's instances and keypoints).
    """
    images, annotations = _read(path)
    by_id = {str(image.get("id")): image for image in images}
    base = path.parent
    captioned = set()
    for number, annotation in enumerate(annotations):
        where, image_id = f"{path.name} annotation {number}", str(annotation.get("image_id"))
        caption, note = caption_of(annotation.get("caption"))
        captioned.add(image_id)
        if image_id not in by_id:
            yield bad_row(where, f"no image has its id, {image_id}", caption=caption)
        else:
            yield _row(by_id[image_id], where, caption, noted({"annotation_id": annotation.get("id")}, note), base)
    for number, image in enumerate(images):
        if str(image.get("id")) not in captioned:
            yield _row(image, f"{path.name} image {number}", "", {}, base)


def _read(path: AnyPath) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: no COCO dataset ({error})") from None
    found = []
    for key in ("images", "annotations"):
        items = value.get(key) if isinstance(value, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{path}: looks like COCO, but has no list of objects under '{key}'")
        found.append(items)
    images, annotations = found
    if annotations and not any("caption" in annotation for annotation in annotations):
        raise UserError(f"{path}: COCO annotations without captions; the file that has them is captions_*.json")
    return images, annotations


def _row(image: dict[str, Any], where: str, caption: str, meta: dict[str, Any], base: AnyPath) -> Row:
    meta = {**{key: value for key, value in image.items() if key != "file_name"}, **meta}
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        return bad_row(where, "its image has no 'file_name'", caption=caption, meta=meta)
    return with_image_path(Row(where, caption, meta=meta), name, image_folder(base, name))
