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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.caption.partitions import Partitions, digits_for
from pipelines.errors import UserError
from pipelines.formats import Dataset, Row, error_kind, to_record_and_picture
from pipelines.formats.texts import NOTE
from pipelines.images import BadImage, read_bytes
from pipelines.progress import Progress, say
from pipelines.records import SAME_PICTURE, repeat_id, sample_id, schema
from pipelines.storage import AnyPath, RemotePath, is_remote
from pipelines.tasks import in_tasks

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SMALLEST, LARGEST = 32, 512
_PART = 16  # a file holds this part of the rows before it
# Reading and hashing both release the interpreter lock; far away, waiting is all there is.
_READERS, _REMOTE_READERS = 4, 32
_MAX_BYTES = 256 << 20
_SMALL_BYTES = 32 << 20
"""A file of a dataset up to this size is read sooner than a task for it has started."""
_MARKED_TOGETHER = 32


def index_schema() -> pa.Schema:
    """A record plus `where` (place in the dataset), `result_of` (id whose caption is this row's too), `picture` (key of
    what rows share that have one caption: image and prompt) and `skip` (the model never sees it).
    """
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("where", "result_of", "picture")]
    return pa.unify_schemas([schema(), pa.schema([*texts, ("skip", pa.bool_())])])


def index_files(directory: Path) -> list[Path]:
    """Index files in the dataset's order."""
    return sorted(directory.glob("*.parquet"))


def read_index(files: Iterable[Path], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of index files, one after another."""
    import pyarrow.parquet as pq

    for file in files:
        yield pq.ParquetFile(file).read(columns=list(columns))


def numbered(files: Iterable[Path], columns: Sequence[str]) -> Iterator[pa.Table]:
    """The same, with `row`: the number of a row in the dataset, from 0 on."""
    import numpy as np
    import pyarrow as pa

    start = 0
    for table in read_index(files, columns):
        yield table.append_column("row", pa.array(np.arange(start, start + len(table))))
        start += len(table)


@dataclass
class Seen:
    """Counts over the rows of a dataset, or of a part of it.

    Attributes:
        failed: rows that cannot be used, by kind of error; `example` is the first error.
        odd: rows whose old text or metadata had to be mended; `odd_example` says of the first what was wrong.
    """

    rows: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    example: str = ""
    odd: int = 0
    odd_example: str = ""

    def add(self, later: Seen) -> None:
        """Count in the rows that come next."""
        self.rows += later.rows
        self.failed += later.failed
        self.example = self.example or later.example
        self.odd += later.odd
        self.odd_example = self.odd_example or later.odd_example


def build_index(dataset: Dataset, directory: Path, prompt_key: str = "") -> Seen:
    """Write the index; `directory` appears under its name only when it is whole, so a kill here costs the pass and
    nothing else. Where a dataset is of several large files, each is read by a task.

    Duplicate content (same image and caption) stays in the count: the n-th row with an id gets `<id>-n`. It, and rows
    with the same image under another caption, are given the first one's new caption instead of the model's time; the
    latter say so in their `meta` (`records.SAME_PICTURE`).

    Args:
        prompt_key: field of `meta` that holds a row's own prompt; only rows with the same prompt share a caption.
    """
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with Progress(None, "caption: reading the dataset") as progress:
        seen, tasks = _read(dataset, part, prompt_key, progress)
    if not seen.rows:
        raise UserError(f"{dataset.path}: this dataset has no rows")
    _mark_duplicates(part, seen.rows, tasks)
    part.rename(directory)
    if seen.odd:
        odd = f"odd old text or metadata in {seen.odd} rows, which are captioned all the same"
        say(f"caption: {odd}; e.g. {seen.odd_example}")
    return seen


def _read(dataset: Dataset, directory: Path, prompt_key: str, progress: Progress) -> tuple[Seen, bool]:
    """Index every row as if it were the only one of its content: small files and the first rows here, the rest in
    tasks; and whether there were any.
    """
    seen, pieces, alone = Seen(), dataset.pieces(), 0
    while alone < len(pieces) and (
        alone == len(pieces) - 1 or (progress.done < _PART * LARGEST and _size(pieces[alone].path) <= _SMALL_BYTES)
    ):
        seen.add(_read_piece(pieces[alone], directory, prompt_key, alone, progress.done, progress.update))
        alone += 1
    calls = ((pieces[number], directory, prompt_key, number, _PART * LARGEST) for number in range(alone, len(pieces)))
    for found in in_tasks(_read_piece, calls) if alone < len(pieces) else ():
        seen.add(found)
        progress.update(found.rows)
    return seen, alone < len(pieces)


def _size(path: AnyPath | str) -> int:
    """Bytes of a file, which is never a pattern."""
    return path.size_and_time()[0] if isinstance(path, RemotePath) else Path(path).stat().st_size


def _read_piece(
    piece: Dataset,
    directory: Path,
    prompt_key: str,
    number: int,
    before: int,
    tell: Callable[[int], None] = lambda rows: None,
) -> Seen:
    """Index files of one piece of a dataset, `before` which there are so many rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    seen, files = Seen(), 0
    with ThreadPoolExecutor(_REMOTE_READERS if is_remote(piece.path) else _READERS) as readers:
        rows = piece.rows()
        while chunk := _next_chunk(rows, min(max(SMALLEST, (before + seen.rows) // _PART), LARGEST)):
            found = readers.map(to_record_and_picture, chunk)
            entries = [_entry(row, *each, prompt_key) for row, each in zip(chunk, found, strict=True)]
            table = pa.Table.from_pylist(entries, schema=index_schema())
            pq.write_table(table, directory / f"{number:06d}-{files:06d}.parquet", compression="zstd")
            files += 1
            seen.add(_count(chunk, entries))
            tell(len(chunk))
    return seen


def _count(rows: list[Row], entries: list[dict[str, Any]]) -> Seen:
    errors = [entry["error"] for entry in entries if entry["error"] is not None]
    odd = [f"{row.meta[NOTE]} ({row.where})" for row in rows if NOTE in row.meta]
    failed = Counter(map(error_kind, errors))
    return Seen(len(rows), failed, next(iter(errors), ""), len(odd), next(iter(odd), ""))


def _mark_duplicates(directory: Path, rows: int, tasks: bool) -> None:
    """Rows whose picture came before say so, and are skipped."""
    found = list(_duplicates(index_files(directory), directory / "ids", rows))
    batches = [(found[start : start + _MARKED_TOGETHER],) for start in range(0, len(found), _MARKED_TOGETHER)]
    for _ in in_tasks(_mark, batches) if tasks else starmap(_mark, batches):
        pass


_Marks = tuple[Path, "np.ndarray", "np.ndarray", "np.ndarray"]
"""An index file, rows of it, which of the rows with its content each of them is, from 1 on, and the id of the first row
with its picture."""


def _duplicates(files: list[Path], folder: Path, rows: int) -> Iterator[_Marks]:
    """The files that have such rows; `folder` is for ids on their way."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.schema([("picture", pa.string()), ("result_of", pa.string()), ("row", pa.int64())])
    with Partitions(folder, "picture", digits_for(rows), ids) as parts:
        parts.add(numbered(files, ["picture", "result_of"]))
        found = [_repeats(parts.table(name)) for name in parts.names()]
    places, numbers, firsts = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(places)
    places, numbers, firsts = places[order], numbers[order], firsts[order]
    first = start = 0
    for file in files if len(places) else ():
        end = start + pq.read_metadata(file).num_rows
        last = int(np.searchsorted(places, end))
        if first < last:
            yield file, places[first:last] - start, numbers[first:last], firsts[first:last]
        first, start = last, end


def _repeats(ids: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a table in the dataset's order: `row` of each whose picture came before, which of its id it is, and the id of
    the first row with the picture.
    """
    import numpy as np

    first_of_id, before = _firsts(ids["result_of"])
    first_of_picture, _ = _firsts(ids["picture"])
    first = first_of_picture[first_of_id]  # prompts of rows with one id may differ: they share the first one's caption
    again = first != np.arange(len(ids))
    names = ids["result_of"].take(first[again]).to_numpy().astype("S")
    return ids["row"].to_numpy()[again], before[again] + 1, names


def _firsts(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row: the first row with its value, and how many with it came before."""
    import numpy as np

    codes = column.combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    sizes = np.diff(starts, append=len(codes))
    first, before = np.empty_like(order), np.empty_like(order)
    first[order] = np.repeat(order[starts], sizes)
    before[order] = np.arange(len(codes)) - np.repeat(starts, sizes)
    return first, before


def _mark(marks: Sequence[_Marks]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file, places, numbers, firsts in marks:
        table = pq.ParquetFile(file).read()
        columns = {name: table[name].to_pylist() for name in ("sample_id", "meta", "result_of", "skip")}
        for place, number, first in zip(places.tolist(), numbers.tolist(), firsts.tolist(), strict=True):
            own, first = columns["sample_id"][place], first.decode()
            if first != own:
                meta = {**json.loads(columns["meta"][place]), SAME_PICTURE: first}
                columns["meta"][place] = json.dumps(meta, sort_keys=True, ensure_ascii=False)
            columns["sample_id"][place] = repeat_id(own, number)
            columns["result_of"][place] = first
            columns["skip"][place] = True
        for name, values in columns.items():
            index = table.schema.get_field_index(name)
            table = table.set_column(index, name, pa.array(values, table.schema.field(name).type))
        pq.write_table(table, file, compression="zstd")


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


def _entry(row: Row, record: Any, picture: str, prompt_key: str) -> dict[str, Any]:
    own = record["sample_id"]
    shared = f"{picture}{row.meta.get(prompt_key, '')}" if picture else own
    return {**record, "where": row.where, "result_of": own, "picture": shared, "skip": record["error"] is not None}
