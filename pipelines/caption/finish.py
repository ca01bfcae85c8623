"""Third pass: committed results joined to the index, checked, and written as records in the dataset's order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.caption.guards import all_failed
from pipelines.caption.index import index_files
from pipelines.caption.results import SCORES
from pipelines.errors import WorkFailed
from pipelines.files import replacing
from pipelines.formats import error_kind
from pipelines.records import COLUMNS, schema
from pipelines.text import Texts, usable_texts

if TYPE_CHECKING:
    import pyarrow as pa

_MAX_SHARD_BYTES = 512 << 20


def write_records(index: Path, table: pa.Table, output: Path, rows_per_shard: int) -> dict[str, Any]:
    """Write the final shards and return the manifest's facts.

    Args:
        table: results as `Results.table` gives them.

    Raises:
        WorkFailed: rows that the model should have seen have no result, or not one row has a caption.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    files = index_files(index)
    wanted = pa.concat_tables(pq.read_table(file, columns=["result_of"]) for file in files)["result_of"]
    found = pc.index_in(wanted, value_set=table["sample_id"].combine_chunks())  # the first of an id's results
    unused = pc.invert(pc.is_in(table["sample_id"], value_set=wanted.combine_chunks()))
    facts = _Facts(vanished=pc.count_distinct(table["sample_id"].filter(unused)).as_py())
    with _ShardWriter(output, rows_per_shard) as writer:
        for file in files:
            entries = pq.read_table(file)
            records = _with_results(entries, table, found.slice(facts.rows, len(entries)))
            facts.add(records)
            writer.write(records)
    for stale in set(output.glob("part-*.parquet")) - set(writer.paths):  # of a run over more rows
        stale.unlink()
    if not facts.captioned:
        raise WorkFailed(all_failed(facts.failed, facts.example))
    rows_out = sum(pq.read_metadata(path).num_rows for path in writer.paths)
    return {"rows_in": facts.rows, "rows_out": rows_out, **facts.summary()}


def _with_results(entries: pa.Table, results: pa.Table, found: pa.ChunkedArray) -> pa.Table:
    """Index rows -> records; `found` is the row of `results` that each takes its text from, null where there is
    none.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    lost = pc.and_(pc.invert(entries["skip"]), pc.is_null(found))
    if pc.any(lost).as_py():
        examples = entries.filter(lost)["where"].to_pylist()
        raise WorkFailed(
            f"{len(examples)} rows never came back from captioning, e.g. {examples[0]}; run the same command again"
        )
    said = results.take(found)
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


class _ShardWriter:
    """`part-00000.parquet`, ... of exactly `rows_per_shard` rows (fewer when their images weigh too much), each whole
    or absent.
    """

    def __init__(self, output: Path, rows_per_shard: int) -> None:
        self._output, self._limit = output, rows_per_shard
        self._held: list[pa.Table] = []
        self._rows = self._bytes = 0
        self.paths: list[Path] = []

    def write(self, records: pa.Table) -> None:
        while len(records):
            head = records.slice(0, self._limit - self._rows)
            records = records.slice(len(head))
            self._held.append(head)
            self._rows += len(head)
            self._bytes += head.nbytes
            if self._rows == self._limit or self._bytes > _MAX_SHARD_BYTES:
                self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._output / f"part-{len(self.paths):05d}.parquet"
        with replacing(path) as part:
            pq.write_table(pa.concat_tables(self._held), part, compression="zstd")
        self.paths.append(path)
        self._held, self._rows, self._bytes = [], 0, 0

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._held:
            self._flush()


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
        duplicate = pc.match_substring(usable["meta"], '"duplicate_of"')
        self.duplicates += int(pc.sum(duplicate).as_py() or 0)
        self.captioned += len(usable) - int(pc.sum(duplicate).as_py() or 0)
        for name, texts in self._texts.items():
            texts.add(usable_texts(records[name].to_pylist(), errors))

    def summary(self) -> dict[str, Any]:
        return {
            "captioned": self.captioned,
            "failed": dict(sorted(self.failed.items())),
            "duplicates": self.duplicates,
            "vanished": self.vanished,
            "metrics": {name: texts.metrics() for name, texts in self._texts.items()},
        }
