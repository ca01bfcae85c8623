"""Rows of a table, whichever file carried it: images as bytes, as Hugging Face's struct, or as paths; captions as a
text or a list of texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.formats.datajuicer import without_tokens
from pipelines.formats.llava import first_answer
from pipelines.formats.reading import Reading
from pipelines.formats.rows import Row, broken, captioned, with_image_path, with_images
from pipelines.progress import say
from pipelines.storage import AnyPath

if TYPE_CHECKING:
    import pyarrow as pa

_NAMES = "images"
"""Data-Juicer's column of paths; beside it `image_bytes` may hold what they name, where it is not null."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are the image and the caption (empty: none is)."""

    image: str
    caption: str
    reading: Reading

    @classmethod
    def of(cls, schema: pa.Schema, file: AnyPath, reading: Reading) -> Columns:
        """Those of a table; a table without a caption is said.

        Raises:
            UserError: no column that could be an image, or none of the name that was given.
        """
        names = schema.names
        there = ", ".join(names)
        image, caption = reading.image_column(names), reading.caption_column(names)
        if not image:
            structs = [field.name for field in schema if _is_image(field.type)]
            if len(structs) != 1:
                raise UserError(
                    f"{file}: no image column, such as image, images or jpg; it has {there}. "
                    "--columns image=NAME says which it is"
                )
            image = structs[0]
        for column in filter(None, (image, caption)):
            if column not in names:
                raise UserError(f"{file}: no column '{column}'; it has {there}")
        if not caption and "conversations" not in names:
            _say_without_caption(str(file), there)
        return cls(image, caption, reading)


@lru_cache
def _say_without_caption(file: str, names: str) -> None:
    say(
        f"{file}: no column is called text, caption or captions, so that captions are empty; it has {names}. "
        "--columns caption=NAME says which it is"
    )


def _is_image(kind: pa.DataType) -> bool:
    """Hugging Face's struct of an image."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and {"bytes", "path"} == {kind.field(n).name for n in range(kind.num_fields)}


def values_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows of a batch. A value that Python cannot hold (text that is no UTF-8, a date beyond its calendar) costs itself
    and not its row: text becomes bytes, anything else None.
    """
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except (ValueError, OverflowError):
            columns[name] = [_value(scalar) for scalar in column]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else None
    except (ValueError, OverflowError):
        return None


def row_of(value: dict[str, Any], where: str, columns: Columns, base: AnyPath) -> Row:
    """A row of a table.

    Args:
        value: column -> value. Bytes that are not the image's are left out of `meta`, however deep they lie.
        base: folder that paths are relative to.
    """
    image, caption = value.pop(columns.image), without_tokens(value.pop(columns.caption, None))
    if not image and columns.image != _NAMES and _NAMES in value:
        image = value[_NAMES]
    meta = _without_bytes(value)
    if caption is None and "conversations" in meta:
        caption = first_answer(meta["conversations"])
    row = captioned(where, caption, meta, columns.reading)
    images = [_picture(one) for one in image] if isinstance(image, list) else [_picture(image)]
    if len(images) > 1:
        return with_images(row, images, base)
    image = next(iter(images), None)
    if isinstance(image, bytes):
        row.image = image
        return row
    if isinstance(image, str) and image:
        return with_image_path(row, image, base)
    if not image and meta.get("conversations"):
        return row
    return broken(row, f"its column '{columns.image}' holds no single image")


def _picture(image: Any) -> Any:
    """Bytes or a name; of Hugging Face's struct `{"bytes": ..., "path": ...}` whichever it has."""
    return image.get("bytes") or image.get("path") if isinstance(image, dict) else image


def _without_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_bytes(item) for key, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, list):
        return [_without_bytes(item) for item in value if not isinstance(item, bytes)]
    return value
