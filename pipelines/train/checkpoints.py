"""The checkpoints of a training run on disk: which are whole, and from which one a new start goes on.

Ray Train notes its checkpoints in a file that it overwrites in place; a kill in that moment leaves the file empty, and
no later start of Ray's can read it. So a checkpoint vouches for itself, with a list of its files and their sizes, and
a new start takes the newest whole one, whatever Ray's note says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

RUN = "run"
"""Ray Train's name for the run, which is the directory's."""
STATE = "state.json"
_FILES = "files.json"


def directory_of(output: Path) -> Path:
    """Where the checkpoints of a stage's output directory are."""
    return output / "checkpoints" / RUN


def sizes(directory: Path) -> dict[str, int]:
    """Path within `directory` -> bytes, of every file."""
    return {str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*") if path.is_file()}


def vouch(directory: Path, files: dict[str, int]) -> None:
    """Write down what a whole checkpoint has, over all workers."""
    (directory / _FILES).write_text(json.dumps(files))


def done_steps(checkpoint: Path | None) -> dict[str, int]:
    """Phase -> finished steps, as a checkpoint has them; nothing without one."""
    return {} if checkpoint is None else dict(json.loads((checkpoint / STATE).read_text())["done"])


def newest(output: Path) -> Path | None:
    """The whole checkpoint with the most steps."""
    whole = [path for path in directory_of(output).glob("checkpoint_*") if _is_whole(path)]
    return max(whole, key=lambda path: (sum(done_steps(path).values()), path.name), default=None)


def clear_all_but(output: Path, kept: Path | None) -> None:
    """Remove partial and older checkpoints, and Ray's note, before a new start. Nobody else may write there."""
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    (directory_of(output) / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).unlink(missing_ok=True)
    for path in directory_of(output).glob("checkpoint_*"):
        if path.is_dir() and path != kept:
            shutil.rmtree(path)


def _is_whole(directory: Path) -> bool:
    try:
        files: dict[str, int] = json.loads((directory / _FILES).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):  # a kill left it half copied
        return False
    found = sizes(directory)
    return all(found.get(name) == size for name, size in files.items())
