"""Third pass: committed results joined to the index, checked, and written as records in the dataset's order."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.caption.index import index_files
from pipelines.errors import WorkFailed
from pipelines.formats import error_kind
from pipelines.records import COLUMNS, schema

if TYPE_CHECKING:
    import pyarrow as pa

_PENDING = ".pending.parquet"
_MAX_SHARD_BYTES = 512 << 20


class Results:
    """What the captioning pass has finished: data files beside Ray Data's checkpoint of the ids in them.

    The fingerprint stands in the checkpoint's path, because Ray Data's checkpoint itself does not know which recipe it belongs to.
    """

    def __init__(self, work: Path, fingerprint: str) -> None:
        self.shards = work / "shards"
        self.checkpoint = work / f"checkpoint-{fingerprint}"

    def make_directories(self) -> None:
        """Ray Data wants both to exist."""
        self.shards.mkdir(parents=True, exist_ok=True)
        self.checkpoint.mkdir(parents=True, exist_ok=True)

    def count(self) -> int:
        """Distinct ids with a committed result."""
        import pyarrow.compute as pc

        return int(pc.count_distinct(self.table().column("sample_id")).as_py())

    def table(self) -> pa.Table:
        """Committed results: `sample_id`, `recaption`, `error`, sorted, an id perhaps more than once (Ray Data is at-least-once).

        A kill can leave a data file half written; its checkpoint is then still pending, and the file is not read.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = pa.schema([("sample_id", pa.string()), ("recaption", pa.string()), ("error", pa.string())])
        committed = {p.stem for p in self.checkpoint.glob("*.parquet") if not p.name.endswith(_PENDING)}
        tables = [columns.empty_table()]
        for file in self.shards.glob("*.parquet"):
            # a data file has its checkpoint's name, plus a number per file when one write makes several
            if file.stem in committed or re.sub(r"-\d+$", "", file.stem) in committed:
                tables.append(pq.read_table(file, schema=columns))
        return pa.concat_tables(tables).sort_by([("sample_id", "ascending"), ("recaption", "ascending")])


def count_work(index: Path) -> int:
    """Index rows that the model has to see."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    todo = (pc.sum(pc.invert(pq.read_table(file, columns=["skip"])["skip"])).as_py() for file in index_files(index))
    return sum(int(count or 0) for count in todo)


def write_records(index: Path, results: Results, output: Path, rows_per_shard: int) -> dict[str, Any]:
    """Write the final shards and return the manifest's facts.

    Raises:
        WorkFailed: rows that the model should have seen have no result.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table, files = results.table(), index_files(index)
    wanted = pa.concat_tables(pq.read_table(file, columns=["result_of"]) for file in files)["result_of"]
    found = pc.index_in(wanted, value_set=table["sample_id"].combine_chunks())  # the first of an id's results
    facts = _Facts()
    with _ShardWriter(output, rows_per_shard) as writer:
        for file in files:
            entries = pq.read_table(file)
            records = _with_results(entries, table, found.slice(facts.rows, len(entries)))
            facts.add(records)
            writer.write(records)
    rows_out = sum(pq.read_metadata(path).num_rows for path in writer.paths)
    return {"rows_in": facts.rows, "rows_out": rows_out, **facts.summary()}


def _with_results(entries: pa.Table, results: pa.Table, found: pa.ChunkedArray) -> pa.Table:
    """Index rows -> records; `found` is the row of `results` that each takes its text from, null where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lost = pc.and_(pc.invert(entries["skip"]), pc.is_null(found))
    if pc.any(lost).as_py():
        examples = entries.filter(lost)["where"].to_pylist()
        raise WorkFailed(
            f"{len(examples)} rows never came back from captioning, e.g. {examples[0]}; run the same command again"
        )
    recaption = results["recaption"].take(found)
    error = pc.coalesce(entries["error"], results["error"].take(found))
    candidates = pa.array([[] if text is None else [text] for text in recaption.to_pylist()], pa.list_(pa.string()))
    columns = {name: entries[name] for name in COLUMNS}
    columns |= {"recaption": recaption, "error": error, "candidates": candidates}
    return pa.table(columns, schema=schema())


class _ShardWriter:
    """`part-00000.parquet`, ... of exactly `rows_per_shard` rows (fewer when their images weigh too much), each whole or absent."""

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
        part = path.with_suffix(".parquet.part")
        pq.write_table(pa.concat_tables(self._held), part, compression="zstd")
        part.replace(path)
        self.paths.append(path)
        self._held, self._rows, self._bytes = [], 0, 0

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._held:
            self._flush()


class _Facts:
    """Every input row accounted for: captioned, failed (by kind) or duplicate; and what captioning did to the text."""

    def __init__(self) -> None:
        self.rows = self.captioned = self.duplicates = 0
        self.failed: Counter[str] = Counter()
        self._words = {"caption": _Words(), "recaption": _Words()}

    def add(self, records: pa.Table) -> None:
        import pyarrow.compute as pc

        self.rows += len(records)
        self.failed.update(error_kind(error) for error in records["error"].drop_null().to_pylist())
        usable = records.filter(pc.is_null(records["error"]))
        duplicate = pc.match_substring(usable["meta"], '"duplicate_of"')
        self.duplicates += int(pc.sum(duplicate).as_py() or 0)
        self.captioned += len(usable) - int(pc.sum(duplicate).as_py() or 0)
        for name, words in self._words.items():
            words.add(usable[name].to_pylist())

    def summary(self) -> dict[str, Any]:
        return {
            "captioned": self.captioned,
            "failed": dict(sorted(self.failed.items())),
            "duplicates": self.duplicates,
            "metrics": {name: words.summary() for name, words in self._words.items()},
        }


class _Words:
    """Mean words and lexical diversity (unique words / words) of one text column, over rows without an error."""

    def __init__(self) -> None:
        self.texts = self.words = 0
        self.unique: set[str] = set()

    def add(self, texts: list[str | None]) -> None:
        for text in texts:
            words = (text or "").lower().split()
            self.texts += 1
            self.words += len(words)
            self.unique.update(words)

    def summary(self) -> dict[str, float]:
        return {
            "mean_words": round(self.words / self.texts, 4) if self.texts else 0.0,
            "lexical_diversity": round(len(self.unique) / self.words, 4) if self.words else 0.0,
        }
