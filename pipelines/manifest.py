"""MANIFEST.json: written last, so its existence means that the stage is complete.

A stage asks `open_stage` what its output directory holds. The answer decides between skipping (same fingerprint,
complete), continuing (same fingerprint, half done), growing (only what may grow has changed), starting (nothing there)
and refusing (another run's output).
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines import machine
from pipelines.cost import USED, Meter
from pipelines.errors import UserError
from pipelines.files import read_text, write_text
from pipelines.lock import LOCK, command_line, hold, release

MANIFEST = "MANIFEST.json"
CLAIM = ".stage.json"
_PACKAGES = ("captune", "torch", "transformers", "peft", "ray", "deepspeed", "py-data-juicer", "pyarrow", "pillow")


@dataclass
class StageOutput:
    """An output directory that this run has claimed.

    Attributes:
        directory: where the stage writes.
        complete: the stage was finished by an earlier run with the same fingerprint; `manifest` holds its record.
        resumed: an earlier run with the same fingerprint left unfinished work here.
        grown: an earlier run left work here that differs only in keys that may grow; `manifest` holds its record when
            it was finished. Nothing is claimed before `accept`.
        notes: what the first start wrote down besides, without deciding anything.
    """

    directory: Path
    stage: str
    fingerprint: str
    inputs: dict[str, Any]
    complete: bool = False
    resumed: bool = False
    grown: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    _started: float = field(default_factory=time.time)
    _meter: Meter | None = field(default=None, repr=False, compare=False)

    @property
    def new(self) -> bool:
        """Nothing is there yet."""
        return not (self.complete or self.resumed or self.grown)

    def claim(self) -> None:
        """Write down whose directory it is."""
        claim = {"stage": self.stage, "fingerprint": self.fingerprint, "inputs": self.inputs, "notes": self.notes}
        write_json(self.directory / CLAIM, claim)

    def accept(self) -> None:
        """Claim a directory that has `grown`: from here on it is unfinished, and belongs to this run."""
        self.claim()
        (self.directory / MANIFEST).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the work that lies there, half done as it is; the directory stays claimed."""
        for path in self.directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif not is_own(path.relative_to(self.directory)):
                path.unlink()

    def finish(self, *, clear: Path | None = None, **facts: Any) -> dict[str, Any]:
        """Write MANIFEST.json with the stage's own facts (counts, timings, identities), let others write, return it.

        Args:
            clear: a directory that is of no use once the stage is complete.
        """
        manifest = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "inputs": self.inputs,
            **facts,
            "seconds": round(time.time() - self._started, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": _versions(),
            "commit": _commit(),
            "command": command_line(),
            "machine": _machine(),
            "cost": self._meter.stop() if self._meter else {},
        }
        write_json(self.directory / MANIFEST, manifest)
        (self.directory / USED).unlink(missing_ok=True)
        self.manifest, self.complete = manifest, True
        if clear is not None:
            shutil.rmtree(clear)  # before somebody who waits for the directory begins to work in it
        release(self.directory)
        return manifest


def open_stage(
    directory: Path | str,
    stage: str,
    inputs: dict[str, Any],
    *,
    restart: bool = False,
    grows: Collection[str] = (),
    notes: dict[str, Any] | None = None,
) -> StageOutput:
    """Claim `directory` for `stage`, and unless the stage is complete keep other processes out of it until `finish` or
    the end of this one.

    Args:
        inputs: everything that decides the result: config, input and model identities, seed. Not paths of the output,
            not worker counts. Dataclasses are accepted.
        restart: throw away what another fingerprint left there.
        grows: keys of `inputs` that may differ from the earlier run's, for a stage that can use its old work for a
            changed input.
        notes: what a later start shall know of the first one, see `claim_of`.

    Raises:
        UserError: the directory holds another run's output and `restart` is not set, or something captune never wrote;
            or another process writes there.
    """
    directory = Path(directory)
    restart = restart and (directory / CLAIM).exists()
    if not restart:
        output = look(directory, stage, inputs, grows=grows)
        if output.complete:
            return output
    directory.mkdir(parents=True, exist_ok=True)
    hold(directory)
    if restart:
        _empty(directory)
    output = look(directory, stage, inputs, grows=grows)  # again, as it is now that nobody else writes
    if output.new:
        output.notes = notes or {}
        output.claim()
    if output.complete:
        release(directory)
    else:
        output._meter = Meter(directory, output.manifest.get("cost"))
    return output


_STANDARD = (
    "stage",
    "fingerprint",
    "inputs",
    "seconds",
    "finished",
    "versions",
    "commit",
    "command",
    "machine",
    "cost",
)
"""Keys of a manifest that `finish` writes by itself."""


def facts_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The stage's own facts."""
    return {key: value for key, value in manifest.items() if key not in _STANDARD}


def is_own(file: Path) -> bool:
    """Whether a file, by its path inside a stage's directory, is what a stage keeps of itself rather than its work."""
    return str(file) in (MANIFEST, CLAIM, USED) or str(file).startswith(LOCK)


def claim_of(directory: Path | str, stage: str) -> dict[str, Any]:
    """The `inputs` and `notes` of the run of a stage that has begun in `directory`; empty when none has."""
    claim = read_json(Path(directory) / CLAIM) if (Path(directory) / CLAIM).exists() else {}
    return claim if claim.get("stage") == stage else {}


def _empty(directory: Path) -> None:
    """Remove everything but the lock."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def look(directory: Path | str, stage: str, inputs: dict[str, Any], *, grows: Collection[str] = ()) -> StageOutput:
    """What `open_stage` would find in `directory`; writes nothing.

    Raises:
        UserError: as `open_stage`.
    """
    directory = Path(directory)
    inputs = json.loads(json.dumps(inputs, default=_jsonable, sort_keys=True))
    output = StageOutput(directory, stage, fingerprint(inputs), inputs)
    if not (directory / CLAIM).exists():
        if directory.exists() and (
            not directory.is_dir() or any(not path.name.startswith(LOCK) for path in directory.iterdir())
        ):
            raise UserError(f"{directory}: already holds files that no captune stage wrote; choose an empty directory")
        return output
    claim = read_json(directory / CLAIM)
    if claim["stage"] != stage:
        raise UserError(
            f"{directory}: holds the output of stage '{claim['stage']}', not of '{stage}'; choose another directory"
        )
    finished = read_json(directory / MANIFEST) if (directory / MANIFEST).exists() else None
    differences = _differences(claim["inputs"], inputs) if claim["fingerprint"] != output.fingerprint else []
    # a kill inside `accept` can leave the new claim beside the old manifest
    stale = not differences and finished is not None and finished["fingerprint"] != output.fingerprint
    if stale or (differences and set(differences) <= set(grows)):
        output.grown, output.manifest = True, finished or {}
        return output
    if claim["fingerprint"] != output.fingerprint:
        changed = ", ".join(d for d in differences if d not in grows) or "its inputs"
        raise UserError(
            f"{directory}: holds the output of another run (what changed: {changed}). "
            "Choose another directory, or pass --restart to throw that output away and start over"
        )
    output.resumed = True
    if finished is not None:
        output.manifest, output.complete = finished, True
    return output


def fingerprint(inputs: Any) -> str:
    """128-bit BLAKE2b of the canonical JSON of `inputs`."""
    text = json.dumps(inputs, default=_jsonable, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def identity(path: Path | str) -> str:
    """Identity of a file or directory: name-independent digest of its contents.

    A stage output is identified by its own manifest's fingerprint, so that a moved directory keeps its identity. Of a
    model, ask `pipelines.modelfiles.model_identity`.
    """
    path = Path(path)
    if (path / CLAIM).exists():
        return str(read_json(path / CLAIM)["fingerprint"])
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    digest = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def require_finished(directory: Path | str) -> None:
    """Nothing when `directory` is a finished stage's output, or no stage's at all.

    Raises:
        UserError: a stage has begun there and has not ended.
    """
    directory = Path(directory)
    if (directory / CLAIM).exists() and not (directory / MANIFEST).exists():
        stage = read_json(directory / CLAIM)["stage"]
        raise UserError(
            f"{directory}: captune {stage} has not finished there (there is no {MANIFEST}); run it again first"
        )


def training_text(directory: Path | str) -> str:
    """The column that trains, of a directory of sample records: the one that it was refined for, or the new captions
    where there are any.

    Raises:
        UserError: its stage has not finished.
    """
    require_finished(directory)
    directory = Path(directory)
    manifest = read_json(directory / MANIFEST) if (directory / MANIFEST).exists() else {}
    if "text" in manifest:
        return str(manifest["text"])
    if manifest.get("stage") == "caption":
        return "recaption"
    from pipelines.records import read_shards

    recaptions = read_shards(directory, columns=["recaption"])["recaption"]
    return "recaption" if recaptions.null_count < len(recaptions) else "caption"


def read_json(path: Path) -> Any:
    """JSON of a file; a file that is no JSON is named in the error."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets in brackets
        raise UserError(f"{path}: not valid JSON ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(value, indent=1, default=_jsonable, ensure_ascii=False) + "\n")


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a manifest")


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, for the message that refuses to mix two runs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if old == new else [prefix]


@cache
def _commit() -> str | None:
    """The commit of the checkout that this code comes from, with a `+` when files differ from it; None outside git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--match=", "--dirty=+"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None  # a machine without git, or a repository on a slow disk
    return done.stdout.strip() or None


def _machine() -> dict[str, Any]:
    """What the command ran on; on a cluster that is the driver's machine."""
    cards = machine.cards()
    found = {"host": platform.node(), "cpus": machine.cpus(), "memory_gib": round(machine.memory() / 2**30, 1)}
    if not cards:
        return found
    shown = [f"{card.name}, {card.memory / 2**30:.0f} GiB" for card in cards]
    return {**found, "cards": shown, "driver": machine.driver()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # an extra that this machine does not need
    return found
