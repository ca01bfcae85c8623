"""Results brought to the rows of the index that they belong to, with a partition of both in memory at a time.

index: result_of, skip --+
                         +-- by id --> joined/DIGITS.arrow, a batch for each shard of records
results: sample_id, ... -+
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.caption.index import numbered, read_index
from pipelines.caption.partitions import Partitions, digits_for
from pipelines.caption.results import result_schema
from pipelines.errors import WorkFailed

if TYPE_CHECKING:
    import pyarrow as pa


def join(files: Sequence[Path], results: Iterable[pa.Table], folder: Path, bounds: Sequence[int]) -> int:
    """Put the result of each index row where `results_of` finds it. Of an id's results the one with a caption is taken,
    and of these the first by its text.

    Args:
        files: of the index.
        results: tables in `result_schema`.
        folder: is made anew.
        bounds: numbers of the rows with which shards begin, and at last how many rows there are.

    Returns:
        Ids that have a result and no row in the index.

    Raises:
        WorkFailed: rows that the model should have seen have no result.
    """
    import pyarrow as pa

    shutil.rmtree(folder, ignore_errors=True)
    asked = pa.schema([("result_of", pa.string()), ("skip", pa.bool_()), ("row", pa.int64())])
    digits, vanished, lost, first_lost = digits_for(bounds[-1]), 0, 0, bounds[-1]
    with (
        Partitions(folder / "wanted", "result_of", digits, asked) as wanted,
        Partitions(folder / "found", "sample_id", digits, result_schema()) as found,
    ):
        wanted.add(_asked(files))
        found.add(results)
        for name in sorted(wanted.names() | found.names()):
            rows, said = wanted.table(name), found.table(name)
            matched, missing, unused = _match(rows, said)
            _write(matched, folder / f"{name}.arrow", bounds)
            vanished, lost = vanished + unused, lost + len(missing)
            first_lost = min([first_lost, *missing[:1].to_pylist()])
    if lost:
        raise WorkFailed(
            f"{lost} rows never came back from captioning, e.g. {_where(files, first_lost)}; run the same command again"
        )
    return vanished


def _asked(files: Sequence[Path]) -> Iterator[pa.Table]:
    """What each row asks for. Rows that share another's picture may have an earlier run's captions under their own ids,
    too: nobody asks for these, row -1.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for table in numbered(files, ["sample_id", "result_of", "skip"]):
        yield table.select(["result_of", "skip", "row"])
        own = table.filter(pc.not_equal(table["sample_id"], table["result_of"]))["sample_id"]
        nobody = {"skip": pa.repeat(pa.scalar(True), len(own)), "row": pa.repeat(pa.scalar(-1, pa.int64()), len(own))}
        yield pa.table({"result_of": own, **nobody})


def results_of(folder: Path, shard: int) -> pa.Table:
    """Results of a shard's rows as `join` has left them in `folder`, with `row`, the number in the index, by which they
    are ordered.
    """
    import pyarrow as pa

    batches = []
    for path in sorted(folder.glob("*.arrow")):
        with pa.memory_map(str(path)) as file:
            batches.append(pa.ipc.open_file(file).get_batch(shard))
    return pa.Table.from_batches(batches).sort_by("row")


def _match(rows: pa.Table, results: pa.Table) -> tuple[pa.Table, pa.ChunkedArray, int]:
    """Results with the rows that they are of, in the rows' order; rows without a result that should have one; and the
    number of ids without a row.
    """
    import pyarrow.compute as pc

    results = results.sort_by([("sample_id", "ascending"), ("recaption", "ascending")])
    ids, wanted = results["sample_id"].combine_chunks(), rows["result_of"].combine_chunks()
    places = pc.index_in(rows["result_of"], value_set=ids)  # the first of an id's results
    there = pc.and_(pc.is_valid(places), pc.greater_equal(rows["row"], 0))
    missing = rows["row"].filter(pc.invert(pc.or_(there, rows["skip"])))
    unused = pc.count_distinct(ids.filter(pc.invert(pc.is_in(ids, value_set=wanted)))).as_py()
    matched = results.take(places.filter(there)).append_column("row", rows["row"].filter(there))
    return matched, missing, unused


def _write(matched: pa.Table, path: Path, bounds: Sequence[int]) -> None:
    import numpy as np
    import pyarrow as pa

    (batch,) = matched.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema=matched.schema)]
    with pa.ipc.new_file(str(path), matched.schema) as writer:
        for first, last in pairwise(np.searchsorted(batch["row"].to_numpy(), bounds).tolist()):
            writer.write_batch(batch.slice(first, last - first))


def _where(files: Sequence[Path], row: int) -> str:
    """What a person needs to find a row of the index again."""
    for table in read_index(files, ["where"]):
        if row < len(table):
            return str(table["where"][row].as_py())
        row -= len(table)
    raise AssertionError("a row that is not in the index")
