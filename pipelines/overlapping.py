"""What `captune overlap` wrote, for those that leave it out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.manifest import read_json


def overlapping(path: Path | str, key: str) -> dict[str, Any]:
    """The facts that `overlap.find.find` lists, from their file or its directory.

    Args:
        key: of the recipe, which names it.

    Raises:
        UserError: no such file, or another one.
    """
    place = Path(path) / "overlap.json" if Path(path).is_dir() else Path(path)
    if not place.is_file():
        raise UserError(f"{key}: {place}: no such file; captune overlap writes it")
    found = read_json(place)
    if not isinstance(found, dict) or not {"rows", "contaminated", "benchmark"} <= set(found):
        raise UserError(f"{key}: {place}: not what captune overlap writes")
    return found


def rows_of(file: str | None, dataset: str, key: str) -> frozenset[str]:
    """Rows of a dataset that show a benchmark's picture, by what their format calls them; none without a file.

    Raises:
        UserError: as `overlapping`.
    """
    if not file:
        return frozenset()
    place = Path(dataset).absolute()
    return frozenset(row["row"] for row in overlapping(file, key)["rows"] if Path(row["dataset"]).absolute() == place)


def identity_of_rows(file: str, key: str) -> str:
    """Changes with the rows that the file names, wherever it and their datasets lie.

    Raises:
        UserError: as `overlapping`.
    """
    rows = sorted([Path(row["dataset"]).name, row["row"], row["sample_id"]] for row in overlapping(file, key)["rows"])
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
