"""First pass: every row of the dataset once, with its content key, as Parquet that the captioning pass reads and
resumes from.

One index file is one unit of work: what is in flight when a run is killed is captioned again. Files grow with the
dataset, so that a large one does not drown in files, and are captioned last ones first: the small ones at the end leave
no replica waiting long for another (guided self-scheduling, Polychronopoulos and Kuck 1987).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.formats import Dataset, Row, to_record
from pipelines.formats.texts import NOTE
from pipelines.images import BadImage, read_bytes
from pipelines.progress import Progress, say
from pipelines.records import sample_id, schema
from pipelines.storage import is_remote

if TYPE_CHECKING:
    import pyarrow as pa

SMALLEST, LARGEST = 32, 512
_PART = 16  # a file holds this part of the rows before it
# Reading and hashing both release the interpreter lock; far away, waiting is all there is.
_READERS, _REMOTE_READERS = 4, 32
_MAX_BYTES = 256 << 20


def index_schema() -> pa.Schema:
    """A record plus `where` (place in the dataset), `result_of` (id whose caption is this row's too) and `skip` (the
    model never sees it).
    """
    import pyarrow as pa

    return pa.unify_schemas(
        [schema(), pa.schema([("where", pa.string()), ("result_of", pa.string()), ("skip", pa.bool_())])]
    )


def index_files(directory: Path) -> list[Path]:
    """Index files in the dataset's order."""
    return sorted(directory.glob("*.parquet"))


def build_index(dataset: Dataset, directory: Path) -> None:
    """Write the index; `directory` appears under its name only when it is whole, so a kill here costs the pass and
    nothing else.

    Duplicate content (same image and caption) stays in the count: the n-th row with an id gets `<id>-n`, says so in
    `meta.duplicate_of`, and is given the first one's caption instead of the model's time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    seen: Counter[str] = Counter()
    odd: list[str] = []
    progress = Progress(None, "caption: reading the dataset")
    threads = _REMOTE_READERS if is_remote(dataset.path) else _READERS
    with progress, ThreadPoolExecutor(threads) as readers:
        rows = dataset.rows()
        number = 0
        while chunk := _next_chunk(rows, min(max(SMALLEST, progress.done // _PART), LARGEST)):
            odd += [f"{row.meta[NOTE]} ({row.where})" for row in chunk if NOTE in row.meta]
            entries = [
                _entry(row, record, seen) for row, record in zip(chunk, readers.map(to_record, chunk), strict=True)
            ]
            table = pa.Table.from_pylist(entries, schema=index_schema())
            pq.write_table(table, part / f"{number:06d}.parquet", compression="zstd")
            number += 1
            progress.update(len(chunk))
    if number == 0:
        raise UserError(f"{dataset.path}: this dataset has no rows")
    part.rename(directory)
    if odd:
        say(f"caption: odd old text or metadata in {len(odd)} rows, which are captioned all the same; e.g. {odd[0]}")


def errors_of(directory: Path) -> list[str | None]:
    """Each row's error, None where there is none."""
    import pyarrow.parquet as pq

    tables = (pq.read_table(file, columns=["error"]) for file in index_files(directory))
    return [error for table in tables for error in table["error"].to_pylist()]


def content(row: dict[str, Any]) -> bytes:
    """Encoded bytes of an index row; a file that changed since the index was made must not get its old content's
    key.
    """
    if row["image"] is not None:
        return bytes(row["image"])
    data = read_bytes(row["image_uri"])
    if sample_id(data, None, row["caption"]) != row["result_of"]:
        raise BadImage(f"changed file: {row['image_uri']} is another picture than when this run began")
    return data


def _next_chunk(rows: Iterator[Row], size: int) -> list[Row]:
    """Up to `size` rows, fewer when they carry many bytes."""
    chunk, held = [], 0
    for row in islice(rows, size):
        chunk.append(row)
        held += len(row.image or b"")
        if held > _MAX_BYTES:
            break
    return chunk


def _entry(row: Row, record: Any, seen: Counter[str]) -> dict[str, Any]:
    first = record["sample_id"]
    seen[first] += 1
    entry = {**record, "where": row.where, "result_of": first, "skip": record["error"] is not None or seen[first] > 1}
    if seen[first] > 1:
        entry["sample_id"] = f"{first}-{seen[first]}"
        entry["meta"] = json.dumps(
            {**json.loads(record["meta"]), "duplicate_of": first}, sort_keys=True, ensure_ascii=False
        )
    return entry
