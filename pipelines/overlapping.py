"""What `captune overlap` wrote, for those that leave it out."""

from __future__ import annotations

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
