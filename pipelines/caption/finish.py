"""Third pass: committed results joined to the index, checked, and written as records in the dataset's order."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.caption.guards import all_failed
from pipelines.caption.index import index_files
from pipelines.caption.join import join, results_of
from pipelines.caption.results import SCORES
from pipelines.errors import WorkFailed
from pipelines.files import replacing
from pipelines.formats import error_kind
from pipelines.records import COLUMNS, is_repeat, schema
from pipelines.tasks import in_tasks
from pipelines.text import Texts, usable_texts

if TYPE_CHECKING:
    import pyarrow as pa

_MAX_SHARD_BYTES, _GROUP_BYTES = 512 << 20, 64 << 20
"""Of a file, and of what is held of it before it is written."""


@dataclass(frozen=True)
class _Shard:
    """What one file of records is made of.

    Attributes:
        number: of the file.
        start: number in the dataset of its first row.
        pieces: index files, with the first row and the number of rows of each that go into it.
    """

    number: int
    start: int
    pieces: tuple[tuple[Path, int, int], ...]

    @property
    def rows(self) -> int:
        return sum(rows for *_, rows in self.pieces)

    def path(self, output: Path) -> Path:
        return output / f"part-{self.number:05d}.parquet"


def write_records(index: Path, results: Iterable[pa.Table], output: Path, rows_per_shard: int) -> dict[str, Any]:
    """Write the final shards, in tasks where there are several, and return the manifest's facts.

    Args:
        results: as `Results.tables` gives them.

    Raises:
        WorkFailed: rows that the model should have seen have no result, or not one row has a caption.
    """
    import pyarrow.parquet as pq

    files, joined = index_files(index), index.parent / "joined"
    shards = list(_shards(files, rows_per_shard))
    bounds = [*(shard.start for shard in shards), shards[-1].start + shards[-1].rows]
    facts = _Facts(vanished=join(files, results, joined, bounds))
    calls = [(shard, joined, output) for shard in shards]
    for written in in_tasks(_write, calls) if len(calls) > 1 else starmap(_write, calls):
        facts.merge(written)
    shutil.rmtree(joined)
    paths = [shard.path(output) for shard in shards]
    for stale in set(output.glob("part-*.parquet")) - set(paths):  # of a run over more rows
        stale.unlink()
    if not facts.captioned:
        raise WorkFailed(all_failed(facts.failed, facts.example))
    rows_out = sum(pq.read_metadata(path).num_rows for path in paths)
    return {"rows_in": facts.rows, "rows_out": rows_out, **facts.summary()}


def _shards(files: list[Path], rows_per_shard: int) -> Iterator[_Shard]:
    """Shards of exactly `rows_per_shard` rows, fewer when their images weigh too much."""
    import pyarrow.parquet as pq

    held: list[tuple[Path, int, int]] = []
    number = start = rows = size = 0
    for file in files:
        footer, first = pq.read_metadata(file), 0
        weight = sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups))
        while first < footer.num_rows:
            taken = min(rows_per_shard - rows, footer.num_rows - first)
            held.append((file, first, taken))
            first, rows, size = first + taken, rows + taken, size + weight * taken // footer.num_rows
            if rows == rows_per_shard or size > _MAX_SHARD_BYTES:
                yield _Shard(number, start, tuple(held))
                held, number, start, rows, size = [], number + 1, start + rows, 0, 0
    if held:
        yield _Shard(number, start, tuple(held))


def _write(shard: _Shard, joined: Path, output: Path) -> _Facts:
    """One file of records, whole or absent."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = results_of(joined, shard.number)
    places = np.full(shard.rows, -1)
    places[said["row"].to_numpy() - shard.start] = np.arange(len(said))
    facts = _Facts()
    held: list[pa.Table] = []
    with replacing(shard.path(output)) as part, pq.ParquetWriter(part, schema(), compression="zstd") as writer:
        for file, first, rows in shard.pieces:
            entries = pq.ParquetFile(file).read().slice(first, rows)
            found = places[facts.rows : facts.rows + rows]
            held.append(_with_results(entries, said.take(pa.array(found, mask=found < 0))))
            facts.add(held[-1])
            if sum(table.nbytes for table in held) > _GROUP_BYTES:
                writer.write_table(pa.concat_tables(held))
                held = []
        if held:
            writer.write_table(pa.concat_tables(held))
    return facts


def _with_results(entries: pa.Table, said: pa.Table) -> pa.Table:
    """Index rows -> records; `said` are their results, of nulls where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    stats = [
        _with_scores(stats, scores)
        for stats, scores in zip(entries["stats"].to_pylist(), said["scores"].to_pylist(), strict=True)
    ]
    columns = {name: entries[name] for name in COLUMNS}
    columns |= {
        "recaption": said["recaption"],
        "error": pc.coalesce(entries["error"], said["error"]),
        "candidates": pa.array([texts or [] for texts in said["candidates"].to_pylist()], pa.list_(pa.string())),
        "stats": pa.array(stats, pa.string()),
    }
    return pa.table(columns, schema=schema())


def _with_scores(stats: str, scores: list[float] | None) -> str:
    if scores is None:
        return stats
    return json.dumps({**json.loads(stats), SCORES: scores}, sort_keys=True)


class _Facts:
    """Every input row accounted for: captioned, failed (by kind) or duplicate; and what captioning did to the text.

    `vanished` are captions of rows that the dataset no longer has, `example` is one of the errors.
    """

    def __init__(self, vanished: int = 0) -> None:
        self.vanished = vanished
        self.rows = self.captioned = self.duplicates = 0
        self.failed: Counter[str] = Counter()
        self.example = ""
        self._texts = {"caption": Texts(), "recaption": Texts()}

    def add(self, records: pa.Table) -> None:
        import pyarrow.compute as pc

        self.rows += len(records)
        errors = records["error"].to_pylist()
        self.failed.update(error_kind(error) for error in errors if error)
        self.example = self.example or next(filter(None, errors), "")
        usable = records.filter(pc.is_null(records["error"]))
        repeats = sum(map(is_repeat, usable["sample_id"].to_pylist()))
        self.duplicates += repeats
        self.captioned += len(usable) - repeats
        for name, texts in self._texts.items():
            texts.add(usable_texts(records[name].to_pylist(), errors))

    def merge(self, later: _Facts) -> None:
        """Count in the records that come next."""
        self.rows += later.rows
        self.captioned += later.captioned
        self.duplicates += later.duplicates
        self.failed += later.failed
        self.example = self.example or later.example
        for name, texts in self._texts.items():
            texts.merge(later._texts[name])

    def summary(self) -> dict[str, Any]:
        return {
            "captioned": self.captioned,
            "failed": dict(sorted(self.failed.items())),
            "duplicates": self.duplicates,
            "vanished": self.vanished,
            "metrics": {name: texts.metrics() for name, texts in self._texts.items()},
        }
