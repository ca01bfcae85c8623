"""Parquet: shards of captune's own records, or any table with images and texts (see `tables`). What is written is a
table for Hugging Face's `datasets`.
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
from pipelines.formats.reading import DEFAULT, Reading
from pipelines.formats.rows import Row, bad_row
from pipelines.formats.tables import Columns, row_of, values_of
from pipelines.records import SAME_PICTURE, is_record
from pipelines.storage import AnyPath, files_in

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH = 64
"""Rows held decoded at a time: columns of bytes are large."""
_GROUP_ROWS, _GROUP_BYTES = 100, 32 << 20
"""Of a row group, which a reader decodes as a whole: what `datasets` itself writes for images, or less."""
_SHARD_BYTES = 500 << 20
_EXPORTED = b"captune.export"
"""Key of the metadata of a table that `write` made: its `meta` holds JSON."""


def rows(path: AnyPath, reading: Reading = DEFAULT) -> Iterator[Row]:
    """Rows of one file or of every `*.parquet` in a folder, by file name. Rows that damage makes unreadable are still
    counted, as error rows.

    Raises:
        UserError: a file is not Parquet, is truncated, or has no column that could be an image.
    """
    import pyarrow as pa

    for file in files_in(path, "*.parquet"):
        number = 0
        shard, schema = _open(file)
        captune = is_record(schema.names)
        columns = None if captune else Columns.of(schema, file, reading)
        exported = _EXPORTED in (schema.metadata or {})
        try:
            for batch in shard.iter_batches(batch_size=BATCH):
                for value in values_of(batch):
                    where = f"{file.name}:{number}"
                    if exported:
                        value |= json.loads(value.pop("meta"))
                    yield row_of(value, where, columns, file.parent) if columns else _from_record(value, where)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            for lost in range(number, shard.metadata.num_rows):
                yield bad_row(f"{file.name}:{lost}", f"its shard cannot be read from row {number} on, {error}")


def _open(file: AnyPath) -> tuple[pq.ParquetFile, pa.Schema]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        shard = pq.ParquetFile(file if isinstance(file, Path) else file.open())
        schema = shard.schema_arrow
        list(schema.names)  # which may be no UTF-8
        return shard, schema
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({error})") from None


def _from_record(value: dict[str, Any], where: str) -> Row:
    meta = json.loads(value["meta"] or "{}")
    meta.pop(SAME_PICTURE, None)  # who shares a picture is found anew: the other may not be there any more
    return Row(where, value["caption"] or "", value["image"], value["image_uri"], value.get("error"), meta)


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
