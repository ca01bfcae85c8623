"""The largest part of the rows that a ladder needs, as a dataset of its own: nothing else of it is captioned."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.formats import DEFAULT, Reading, open_dataset, to_record
from pipelines.manifest import open_stage
from pipelines.records import Record, write_shard

_SHARD_ROWS = 10_000
_RANGE = 1 << 64


def draw(
    dataset: str, output: Path, part: int, seed: int, reading: Reading = DEFAULT, *, restart: bool = False
) -> dict[str, Any]:
    """Write about one row in `part` of a dataset as records, and return the manifest: `rows_in` and `rows_out`.

    Which ones is decided by what they are (their `sample_id`), so the same rows are drawn wherever they lie.

    Raises:
        UserError: no dataset; or so few rows that none is drawn.
    """
    source = open_dataset(dataset, reading)
    stage = open_stage(output, "draw", {"input": source.identity(), "part": part, "seed": seed}, restart=restart)
    if stage.complete:
        return stage.manifest
    records: list[Record] = []
    seen = written = shards = 0
    for row in source.rows():
        seen += 1
        record = to_record(row)
        if _chance(record["sample_id"], seed) * part < 1:
            records.append(record)
        if len(records) == _SHARD_ROWS:
            write_shard(output / f"part-{shards:05d}.parquet", records)
            written, shards, records = written + len(records), shards + 1, []
    if records:
        write_shard(output / f"part-{shards:05d}.parquet", records)
    if not (written := written + len(records)):
        raise UserError(f"dataset: {dataset} has {seen} rows; one in {part} of them is none")
    return stage.finish(rows_in=seen, rows_out=written)


def _chance(sample_id: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}/{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / _RANGE
