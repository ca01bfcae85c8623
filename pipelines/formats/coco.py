"""COCO's captions JSON: `images` with ids and file names, `annotations` with an image's id and a caption.

A row is one annotation, so a picture with five captions is five rows; a picture without any is a row without a caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipelines.errors import UserError
from pipelines.formats.packed import unpacked
from pipelines.formats.reading import DEFAULT, Reading
from pipelines.formats.rows import Row, broken, captioned, image_folder, parse_json, with_image_path
from pipelines.storage import AnyPath

_FIRST_KEYS = re.compile(rb'\{\s*("(info|licenses|annotations|categories|type)"|"images"\s*:\s*\[\s*(\{|\]))')


def is_coco(head: bytes) -> bool:
    """Whether a file that begins so is of this format: an object whose first key is one of COCO's, and whose `images`
    are objects and not names.
    """
    return _FIRST_KEYS.match(head) is not None


def rows(path: AnyPath, reading: Reading = DEFAULT) -> Iterator[Row]:
    """Rows in the order of the annotations, then pictures without one. Images lie in the file's folder, or in `images/`
    beside the file.

    Raises:
        UserError: the file is no such JSON, or its annotations are no captions (COCO's instances and keypoints).
    """
    images, annotations = _read(path, reading)
    by_id = {str(image.get("id")): image for image in images}
    base = path.parent
    seen = set()
    for number, annotation in enumerate(annotations):
        where, image_id = f"{path.name} annotation {number}", str(annotation.get("image_id"))
        meta = {"annotation_id": annotation.get("id")}
        seen.add(image_id)
        if image_id in by_id:
            yield _row(by_id[image_id], where, annotation.get("caption"), meta, base, reading)
        else:
            row = captioned(where, annotation.get("caption"), {}, reading)
            yield broken(row, f"no image has its id, {image_id}")
    for number, image in enumerate(images):
        if str(image.get("id")) not in seen:
            yield _row(image, f"{path.name} image {number}", None, {}, base, reading)


def _read(path: AnyPath, reading: Reading) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        value = parse_json(unpacked(path)[0].read(), reading.encoding)
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


def _row(image: dict[str, Any], where: str, caption: Any, meta: dict[str, Any], base: AnyPath, reading: Reading) -> Row:
    row = captioned(where, caption, {**{key: image[key] for key in image if key != "file_name"}, **meta}, reading)
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        return broken(row, "its image has no 'file_name'")
    return with_image_path(row, name, image_folder(base, name))
