"""Arrow files of a table, as Hugging Face's `save_to_disk` and its cache hold them: the stream format, or the one of
files with a footer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.formats.parquet import BATCH
from pipelines.formats.reading import DEFAULT, Reading
from pipelines.formats.rows import Row, bad_row
from pipelines.formats.tables import Columns, row_of, values_of
from pipelines.storage import AnyPath, files_in

if TYPE_CHECKING:
    import pyarrow as pa

STATE = "state.json"
"""What `save_to_disk` writes beside the files of a split."""
_FOOTER = b"ARROW1"


def rows(path: AnyPath, reading: Reading = DEFAULT) -> Iterator[Row]:
    """Rows of one file or of every `*.arrow` in a folder, by file name. One that breaks off gives its whole rows and an
    error row.

    Raises:
        UserError: a file is not Arrow's, or has no column that could be an image.
    """
    import pyarrow as pa

    for file in files_in(path, "*.arrow"):
        number, columns = 0, None
        try:
            for batch in _batches(file):
                batch.validate(full=True)  # Arrow believes a damaged file, and reads beyond its memory
                columns = columns or Columns.of(batch.schema, file, reading)
                for start in range(0, len(batch), BATCH):
                    for value in values_of(batch.slice(start, BATCH)):
                        yield row_of(value, f"{file.name}:{number}", columns, file.parent)
                        number += 1
        except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
            if columns is None:
                raise UserError(f"{file}: not a readable Arrow file ({error})") from None
            yield bad_row(f"{file.name}:{number}", f"its file cannot be read from row {number} on, {error}")


def _batches(file: AnyPath) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with file.open("rb") as stream:
        footer = stream.read(len(_FOOTER)) == _FOOTER
        stream.seek(0)
        source = pa.memory_map(str(file)) if isinstance(file, Path) else pa.PythonFile(stream)
        if not footer:
            yield from pa.ipc.open_stream(source)
            return
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
