"""What a job of a cluster was refused stays in its run directory, so that the next attempt ends at once with the same
sentence: KubeRay tries a failed job again on a fresh cluster, which helps against lost nodes, and not against a wrong
value.

Only jobs go by it (`--recipe-is`); a person at a terminal is a new decision, and so are another recipe and the
preflight, which forgets what was refused. What is found before any work, or passes by itself, is not kept.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import UserError
from pipelines.manifest import read_json, write_json
from pipelines.rundir import RunDir


class _Again(UserError):
    """An attempt before this one ended so."""


@contextmanager
def kept(place: RunDir, what: str, recipe: str) -> Iterator[None]:
    """Around the work of a job.

    Args:
        what: the job does, e.g. `train enhanced`.
        recipe: digest of its recipe; empty when it is no job of a cluster.

    Raises:
        UserError: what the same job with the same recipe was refused before.
    """
    file = place.refused / f"{what.replace(', ', '-').replace(' ', '-')}.json"
    if recipe and file.is_file():
        _raise_again(file, recipe)
    try:
        yield
    except UserError as error:
        # Its subclasses are cheap to find again (NotReady) or pass by themselves (a lock, a volume).
        if recipe and type(error) is UserError:
            with contextlib.suppress(OSError):
                write_json(file, {"recipe": recipe, "when": _now(), "message": str(error)})
        raise


def forget(place: RunDir) -> None:
    """Let the next attempt try."""
    shutil.rmtree(place.refused, ignore_errors=True)


def _raise_again(file: Path, recipe: str) -> None:
    said = read_json(file)
    if said["recipe"] == recipe:
        raise _Again(
            f"{said['message']}\n  An attempt of {said['when']} ended so, and this one did nothing. Once it is put "
            f"right, run the preflight, or remove {file}"
        )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
