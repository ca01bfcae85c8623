"""Tables in text: `.csv` with commas, `.tsv` with tabs; the first line names the columns, and one of them the pictures.

Images lie in the file's folder, or in `images/` beside the file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from pipelines.errors import UserError
from pipelines.formats.packed import ending, unpacked
from pipelines.formats.reading import DEFAULT, Reading
from pipelines.formats.rows import Row, broken, captioned, image_folder, with_image_path
from pipelines.formats.texts import decode
from pipelines.storage import AnyPath

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = tuple(_DELIMITERS)


def rows(path: AnyPath, reading: Reading = DEFAULT) -> Iterator[Row]:
    """Rows of one file.

    Raises:
        UserError: no column could be the pictures', or the text is in an encoding that nobody can tell.
    """
    for number, value in enumerate(lines(path, reading), start=1):
        image, text = reading.image_column(value), reading.caption_column(value)
        if image not in value or (text and text not in value):
            wanted = text if image in value else image or "file_name"
            raise UserError(f"{path}: no column '{wanted}'; it has {', '.join(value)}")
        where, name = f"{path.name}:{number}", value.pop(image)
        row = captioned(where, value.pop(text, None), value, reading)
        if name:
            yield with_image_path(row, name, image_folder(path.parent, name))
        else:
            yield broken(row, f"it lacks '{image}'")


def lines(path: AnyPath, reading: Reading) -> Iterator[dict[str, Any]]:
    """Column -> text of each line; fields beyond the named ones are a list under `further`.

    Raises:
        UserError: the text is in an encoding that nobody can tell, or no table.
    """
    with unpacked(path)[0] as stream:
        text, note = decode(stream.read(), reading.encoding)
    if note and not text:
        raise UserError(f"{path}: {note}")
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[ending(path.name)], restkey="further")
    try:
        yield from table
    except csv.Error as error:
        raise UserError(f"{path}: no table at line {table.line_num} ({error})") from None


def columns_of(path: AnyPath) -> list[str]:
    """What the first line names."""
    with unpacked(path)[0] as stream:
        head, _ = decode(stream.readline(1 << 16))
    try:
        return next(csv.reader([head], delimiter=_DELIMITERS[ending(path.name)]), [])
    except csv.Error:  # no table; where it is meant as one, its reader will say what is wrong
        return []
