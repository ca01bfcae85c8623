"""Parquet: shards of captune's own records, or any table with images and texts (bytes, Hugging Face's image struct, or
paths).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.formats.rows import Row, bad_row, with_image_path
from pipelines.records import COLUMNS, Record, is_record, write_shard
from pipelines.storage import AnyPath, files_in

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_IMAGE = ("image", "image_bytes", "jpg", "image_uri", "image_path", "file_name")
_TEXT = ("text", "caption", "txt")
_BATCH = 64  # rows held decoded at a time: bytes columns are large


def rows(path: AnyPath) -> Iterator[Row]:
    """Rows of one file or of every `*.parquet` in a folder, by file name. Rows that damage makes unreadable are still
    counted, as error rows.

    Raises:
        UserError: a file is not Parquet, is truncated, or has no column that could be an image.
    """
    import pyarrow as pa

    for file in files_in(path, "*.parquet"):
        number = 0
        shard = _open(file)
        captune = is_record(shard.schema_arrow.names)
        image, text = ("", "") if captune else _columns(shard, file)
        try:
            for batch in shard.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    where = f"{file.name}:{number}"
                    yield _from_record(value, where) if captune else _from_table(value, where, image, text, file.parent)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            for lost in range(number, shard.metadata.num_rows):
                yield bad_row(f"{file.name}:{lost}", f"its shard cannot be read from row {number} on, {error}")


def _open(file: AnyPath) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file if isinstance(file, Path) else file.open())
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({error})") from None


def _columns(shard: pq.ParquetFile, file: AnyPath) -> tuple[str, str]:
    names = shard.schema_arrow.names
    image = next((name for name in _IMAGE if name in names), None)
    if image is None:
        raise UserError(f"{file}: no image column (one of {', '.join(_IMAGE)}); it has {', '.join(names)}")
    return image, next((name for name in _TEXT if name in names), "")


def _from_record(value: dict[str, Any], where: str) -> Row:
    meta = json.loads(value["meta"] or "{}")
    return Row(where, value["caption"] or "", value["image"], value["image_uri"], value.get("error"), meta)


def _from_table(value: dict[str, Any], where: str, image_column: str, text_column: str, base: AnyPath) -> Row:
    image, caption = value.pop(image_column), value.pop(text_column, None)
    meta = {key: item for key, item in value.items() if not isinstance(item, bytes)}
    caption = str(caption if caption is not None else "").strip()
    if isinstance(image, dict):  # Hugging Face datasets: {"bytes": ..., "path": ...}
        image = image.get("bytes") or image.get("path")
    if isinstance(image, list):
        image = image[0] if len(image) == 1 else None
    if isinstance(image, bytes):
        return Row(where, caption, image=image, meta=meta)
    if isinstance(image, str) and image:
        return with_image_path(Row(where, caption, meta=meta), image, base)
    return bad_row(where, f"its column '{image_column}' holds no single image", caption=caption, meta=meta)


def write(records: Iterable[Record], path: Path) -> int:
    """Write records as one file of captune's own schema; returns their number."""
    kept = [Record(**{name: record[name] for name in COLUMNS}) for record in records]  # type: ignore[literal-required,typeddict-item]
    write_shard(path, kept)
    return len(kept)
