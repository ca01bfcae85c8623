"""Rows that are looked up by id, when there are more of them than memory should hold: they are put into files by the
first digits of their id, and two such sets are joined file by file (a Grace hash join, Kitsuregawa et al. 1983).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1 << 18
"""Rows that a partition has about: with texts of a hundred bytes a join of two holds some 200 MB."""
_BUFFERED = 1 << 16
_MOST_DIGITS = 2
"""256 files; more would be too many to have open. From 64 million rows on partitions grow beyond `ROWS`."""


def digits_for(rows: int) -> int:
    """How many digits of an id part so many rows; sets that are joined must be parted by the same number."""
    digits = 0
    while rows > ROWS << (4 * digits) and digits < _MOST_DIGITS:
        digits += 1
    return digits


class Partitions:
    """Rows of tables by the first digits of an id. Within a partition they stand in the order in which they came.

    Args:
        folder: receives the files, and is removed at the end of the block.
        key: column of the id, which begins with hexadecimal digits.
        digits: see `digits_for`.
        schema: of the tables.
    """

    def __init__(self, folder: Path, key: str, digits: int, schema: pa.Schema) -> None:
        self._folder, self._key, self._digits, self._schema = folder, key, digits, schema
        self._held: list[pa.Table] = []
        self._rows = 0
        self._writers: dict[str, pa.RecordBatchStreamWriter] = {}

    def add(self, tables: Iterable[pa.Table]) -> None:
        """Put the rows of some more tables into their partitions."""
        for table in tables:
            self._held.append(table)
            self._rows += len(table)
            if self._rows >= _BUFFERED:
                self._flush()
        self._flush()
        for writer in self._writers.values():
            writer.close()

    def names(self) -> set[str]:
        """Digits that any id begins with."""
        return set(self._writers)

    def table(self, name: str) -> pa.Table:
        """The rows of one partition; none where no id begins so."""
        import pyarrow as pa

        if name not in self._writers:
            return self._schema.empty_table()
        with pa.OSFile(str(self._path(name))) as file:
            return pa.ipc.open_stream(file).read_all()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self._rows:
            return
        table, start = pa.concat_tables(self._held).cast(self._schema), 0
        self._held, self._rows = [], 0
        first = pc.utf8_slice_codeunits(table[self._key], 0, self._digits)
        order = pc.sort_indices(first)  # a stable sort
        table = table.take(order)
        for run in pc.value_counts(first.take(order).combine_chunks()):
            count = run["counts"].as_py()
            self._write(run["values"].as_py(), table.slice(start, count))
            start += count

    def _write(self, name: str, table: pa.Table) -> None:
        import pyarrow as pa

        if name not in self._writers:
            self._writers[name] = pa.ipc.new_stream(str(self._path(name)), self._schema)
        self._writers[name].write_table(table.combine_chunks())

    def _path(self, name: str) -> Path:
        return self._folder / f"{name or 'all'}.arrow"

    def __enter__(self) -> Partitions:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
        shutil.rmtree(self._folder, ignore_errors=True)
