"""What the captioning pass has finished: data files beside Ray Data's checkpoint of the ids in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.caption.index import index_files, read_index
from pipelines.caption.partitions import Partitions, digits_for
from pipelines.files import replacing
from pipelines.records import is_repeat, shard_paths

if TYPE_CHECKING:
    import pyarrow as pa

SCORES = "candidate_scores"
"""Key of a record's `stats` under which the scores of its candidates stand, where a choice needed any."""
_PENDING = ".pending.parquet"
_CARRIED = "carried"


def result_schema() -> pa.Schema:
    """Arrow schema of a result: what the model said of one sample, without the sample."""
    import pyarrow as pa

    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("candidates", pa.list_(pa.string())),
            ("scores", pa.list_(pa.float64())),
            ("recaption", pa.string()),
            ("error", pa.string()),
        ]
    )


class Results:
    """Committed results of one model and recipe.

    Their fingerprint stands in the checkpoint's path, because Ray Data's checkpoint itself does not know which recipe
    it belongs to.
    """

    def __init__(self, work: Path, fingerprint: str) -> None:
        self.shards = work / "shards"
        self.checkpoint = work / f"checkpoint-{fingerprint}"

    def make_directories(self) -> None:
        """Ray Data wants both to exist."""
        self.shards.mkdir(parents=True, exist_ok=True)
        self.checkpoint.mkdir(parents=True, exist_ok=True)

    def any(self) -> bool:
        """Whether anything is committed."""
        return bool(self._checkpoints())

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Committed results, an id perhaps more than once (Ray Data is at-least-once).

        A kill can leave a data file half written; its checkpoint is then still pending, and the file is not read.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        wanted = result_schema()
        if columns is not None:
            wanted = pa.schema([wanted.field(name) for name in columns])
        for file in self._committed():
            yield pq.ParquetFile(file).read(columns=wanted.names).select(wanted.names).cast(wanted)

    def carry_over(self, records: Path) -> None:
        """Take the captions of finished records as committed results, so that only what is new is captioned.

        Rows that failed are left out: their files may be there now. Safe to be killed in, and to be done twice.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.make_directories()
        for number, path in enumerate(shard_paths(records)):
            columns = ["sample_id", "candidates", "recaption", "error", "stats"]
            rows = [r for r in pq.read_table(path, columns=columns).to_pylist() if _is_first_and_good(r)]
            for row in rows:
                row["scores"] = json.loads(row.pop("stats")).get(SCORES)
            table = pa.Table.from_pylist(rows, schema=result_schema())
            name = f"{_CARRIED}_{number:06d}.parquet"
            _write(table, self.shards / name)
            _write(table.select(["sample_id"]), self.checkpoint / name)

    def forget_failed(self) -> None:
        """Give failed rows another chance, after whatever made so many of them fail was put right.

        First out of the checkpoint, then out of the data: a kill in between leaves a result too many, never one too
        few.
        """
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        for file in self._committed():
            table = pq.read_table(file)
            good = table.filter(pc.is_null(table["error"]))
            if len(good) < len(table):
                ids = self.checkpoint / _checkpoint_of(file, self._checkpoints())
                kept = pq.read_table(ids)
                bad = table.filter(pc.is_valid(table["error"]))["sample_id"]
                _write(kept.filter(pc.invert(pc.is_in(kept["sample_id"], value_set=bad.combine_chunks()))), ids)
                _write(good, file)

    def _checkpoints(self) -> set[str]:
        return {p.stem for p in self.checkpoint.glob("*.parquet") if not p.name.endswith(_PENDING)}

    def _committed(self) -> list[Path]:
        done = self._checkpoints()
        return [file for file in sorted(self.shards.glob("*.parquet")) if _checkpoint_of(file, done)]


def _checkpoint_of(file: Path, done: set[str]) -> str:
    """A data file has its checkpoint's name, plus a number per file when one write makes several; empty while it is not
    committed.
    """
    for stem in (file.stem, re.sub(r"-\d+$", "", file.stem)):
        if stem in done:
            return f"{stem}.parquet"
    return ""


def _is_first_and_good(record: dict[str, Any]) -> bool:
    """Ids of duplicates end in `-2`, `-3`, ...; their captions are the first one's."""
    return record["error"] is None and not is_repeat(record["sample_id"])


def _write(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    with replacing(path) as part:
        pq.write_table(table, part)


@dataclass(frozen=True)
class Work:
    """Index rows that the model has to see, and how many of them have a committed result already."""

    rows: int
    done: int


def count_work(index: Path, results: Results) -> Work:
    """What is there to do."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def wanted() -> Iterator[pa.Table]:
        for table in read_index(index_files(index), ["sample_id", "skip"]):
            yield table.filter(pc.invert(table["skip"])).select(["sample_id"])

    rows, done = sum(map(len, wanted())), 0
    if results.any():
        ids, digits = pa.schema([("sample_id", pa.string())]), digits_for(rows)
        with (
            Partitions(index.parent / "ids-wanted", "sample_id", digits, ids) as asked,
            Partitions(index.parent / "ids-found", "sample_id", digits, ids) as found,
        ):
            asked.add(wanted())
            found.add(results.tables(["sample_id"]))
            for name in asked.names():
                there = found.table(name)["sample_id"].combine_chunks()
                done += pc.sum(pc.is_in(asked.table(name)["sample_id"], value_set=there)).as_py() or 0
    return Work(rows, done)
