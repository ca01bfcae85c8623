"""Parquet: shards of captune's own records, or any table with images and texts (bytes, Hugging Face's image struct, or
paths). What is written is a table for Hugging Face's `datasets`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.files import replacing
from pipelines.formats.rows import Row, bad_row, with_image_path, with_images
from pipelines.formats.texts import caption_of, noted
from pipelines.records import is_record
from pipelines.storage import AnyPath, files_in

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_IMAGE = ("image", "images", "image_bytes", "jpg", "image_uri", "image_path", "file_name")
_TEXT = ("text", "caption", "txt")
_BATCH = 64  # rows held decoded at a time: bytes columns are large
_GROUP_ROWS, _GROUP_BYTES = 100, 32 << 20
"""Of a row group, which a reader decodes as a whole: what `datasets` itself writes for images, or less."""
_SHARD_BYTES = 500 << 20
_EXPORTED = b"captune.export"
"""Key of the metadata of a table that `write` made: its `meta` holds JSON."""


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
        exported = _EXPORTED in (shard.schema_arrow.metadata or {})
        try:
            for batch in shard.iter_batches(batch_size=_BATCH):
                for value in _values(batch):
                    where = f"{file.name}:{number}"
                    if exported:
                        value |= json.loads(value.pop("meta"))
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


def _values(batch: pa.RecordBatch) -> list[dict[str, Any]]:
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
    caption, note = caption_of(caption)
    meta = noted(meta, note)
    images = [_picture(one) for one in image] if isinstance(image, list) else [_picture(image)]
    if len(images) > 1:
        return with_images(Row(where, caption, meta=meta), images, base)
    image = next(iter(images), None)
    if isinstance(image, bytes):
        return Row(where, caption, image=image, meta=meta)
    if isinstance(image, str) and image:
        return with_image_path(Row(where, caption, meta=meta), image, base)
    if not image and meta.get("conversations"):
        return Row(where, caption, meta=meta)
    return bad_row(where, f"its column '{image_column}' holds no single image", caption=caption, meta=meta)


def _picture(image: Any) -> Any:
    """Bytes or a name; of Hugging Face's struct `{"bytes": ..., "path": ...}` whichever it has."""
    return image.get("bytes") or image.get("path") if isinstance(image, dict) else image


def write(samples: Iterable[dict[str, Any]], path: Path) -> int:
    """Write samples (see `webdataset.write`) as a table for Hugging Face's `datasets`; returns the number of rows.

    Columns: `image` (struct of `bytes` and `path`, declared as `datasets.Image`), `text`, `sample_id`, and `stats` and
    `meta` as JSON. No more than a row group is held in memory.

    Args:
        path: a file named `*.parquet`; or a folder, which receives shards of some 500 MB.
    """
    one_file, groups, count = path.suffix == ".parquet", _row_groups(samples), 0
    for number in range(sys.maxsize):
        first = next(groups, None)
        if first is None and number:
            break
        file = path if one_file else path / f"part-{number:05d}.parquet"
        count += _write_shard(file, chain([first or []], groups), math.inf if one_file else _SHARD_BYTES)
    return count


def _row_groups(samples: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    held = 0
    for sample in samples:
        row = {key: json.dumps(sample[key], ensure_ascii=False) for key in ("stats", "meta")}
        image = {"bytes": sample["image"], "path": sample["sample_id"] + sample["suffix"]}
        group.append({"image": image, "text": sample["caption"], "sample_id": sample["sample_id"], **row})
        held += len(sample["image"])
        if len(group) == _GROUP_ROWS or held > _GROUP_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group


def _write_shard(path: Path, groups: Iterator[list[dict[str, Any]]], limit: float) -> int:
    """One file of as many groups as fit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = held = 0
    schema = _schema()
    with replacing(path) as part, pq.ParquetWriter(part, schema, compression="zstd", use_dictionary=False) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            rows += len(group)
            held += sum(len(row["image"]["bytes"]) for row in group)
            if held >= limit:
                break
    return rows


def _schema() -> pa.Schema:
    """With the metadata by which `datasets` knows that the struct is an image."""
    import pyarrow as pa

    image, texts = pa.struct([("bytes", pa.binary()), ("path", pa.string())]), ("text", "sample_id", "stats", "meta")
    features = {"image": {"_type": "Image"}, **{name: {"dtype": "string", "_type": "Value"} for name in texts}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), _EXPORTED: "1"}
    return pa.schema([("image", image), *((name, pa.string()) for name in texts)], metadata=metadata)
