"""Work that two arms would do alike is done once: the other takes it, files and all, under a manifest of its own that
says `same_as`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.lock import Busy, held, hold, release
from pipelines.manifest import facts_of, is_own, look, open_stage, training_text
from pipelines.progress import say
from pipelines.records import read_shards
from pipelines.rundir import SAME_AS, Stage, Walk

Twin = tuple[Walk, Stage, dict[str, Any]]
"""Another arm's model, its stage, and the inputs of which that stage's work is the work wanted."""


def rows_digest(dataset: Path) -> str:
    """What a refined dataset trains on: a digest of its kept rows in their order, each by its id (which is of its image
    and caption as found), its text and what came with it. Empty while it is not finished.
    """
    manifest = Stage(dataset).manifest
    if not manifest:
        return ""
    return str(manifest.get("rows_digest") or digest(dataset, training_text(dataset)))


def digest(directory: Path, text: str) -> str:
    """`rows_digest` of the shards in a directory, whose training text is the column `text`."""
    columns, found = ("sample_id", text, "meta"), hashlib.blake2b(digest_size=16)
    table = read_shards(directory, columns=columns)
    for row in zip(*(table[name].to_pylist() for name in columns), strict=True):
        found.update("".join(f"{len(value or '')}:{value or ''}" for value in row).encode())
    return found.hexdigest()


def taken(stage: str, twins: Iterable[Twin], output: Path, wanted: dict[str, Any], what: str, *, restart: bool) -> bool:
    """Take a stage's output from the first of its twins that has finished it. False where none has, and where the
    output is complete already.

    Args:
        stage: its name.
        output: its directory.
        wanted: its inputs.
        what: as messages call it.
        restart: throw away what lies in `output`.

    Raises:
        UserError: `output` holds another run's work, or another process writes there.
    """
    if not restart and look(output, stage, wanted).complete:
        return False
    return any(
        _take(stage, walk, source, output, wanted, what, restart)
        for walk, source, inputs in twins
        if source.manifest and source.inputs == inputs
    )


def _take(
    stage: str, walk: Walk, source: Stage, output: Path, wanted: dict[str, Any], what: str, restart: bool
) -> bool:
    """False when another process is at work in the twin's directory after all."""
    ours = source.directory.resolve() in held()
    try:
        hold(source.directory)
    except Busy:
        return False
    try:
        if not (manifest := Stage(source.directory).manifest):
            return False  # begun anew just now
        here = open_stage(output, stage, wanted, restart=restart)
        here.clear()
        _link(source.directory, output)
        say(f"{what}: taken from {walk.name}, whose data are equal")
        here.finish(**{**facts_of(manifest), SAME_AS: walk.directory.name})
        return True
    finally:
        if not ours:
            release(source.directory)


def _link(source: Path, output: Path) -> None:
    """The same files under another directory, where the file system can: models take gigabytes. What a stage keeps of
    itself stays behind.
    """
    for file in sorted(source.rglob("*")):
        place = output / file.relative_to(source)
        if file.is_dir():
            place.mkdir(exist_ok=True)
        elif not is_own(file.relative_to(source)):
            try:
                os.link(file, place)
            except OSError:  # across volumes, or where there are no links
                shutil.copyfile(file, place)
