"""Rows to train on: kept records of a refined dataset, or the conversations of a LLaVA file.

A row that cannot be used is counted and named with its reason, never skipped in silence.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.images import read_bytes
from pipelines.manifest import training_text
from pipelines.records import shard_paths

IMAGE = "<image>"


class BadRow(Exception):
    """This row cannot be trained on; the text is the reason."""


@dataclass(frozen=True)
class Row:
    """One sample before tokenization.

    Attributes:
        name: how messages name it: its sample id, or file and row.
        turns: (role, text) with role `user` or `assistant`; a caption is a single assistant turn.
        image: what tells one image from another: its path, or its place in the spool. None for a row of text only.
    """

    name: str
    turns: tuple[tuple[str, str], ...]
    image: str | tuple[int, int] | None


@dataclass
class Rows:
    """A training set.

    Attributes:
        source: file or directory.
        rows: what looked usable when it was read.
        broken: name -> reason; grows while training finds images that do not decode.
        total: rows as found, broken ones included.
        spool: open file that holds the images which came inside of records.
    """

    source: str
    rows: list[Row]
    broken: dict[str, str] = field(default_factory=dict)
    total: int = 0
    spool: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def image_bytes(self, image: str | tuple[int, int]) -> bytes:
        """Encoded bytes of an image.

        Raises:
            BadImage: the file is missing, unreadable or empty.
        """
        if isinstance(image, str):
            return read_bytes(image)
        offset, size = image
        return os.pread(self.spool.fileno(), size, offset)

    def require_some(self) -> Rows:
        """Self, or `UserError` naming some of the broken rows when none is usable."""
        if self.rows and len(self.broken) < self.total:
            return self
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(self.broken.items())[:5])
        raise UserError(
            f"{self.source}: no row to train on" + (f" ({len(self.broken)} broken: {shown})" if shown else "")
        )


def read_rows(path: Path | str) -> Rows:
    """Rows of a directory of sample records or of a LLaVA JSON file.

    Raises:
        UserError: neither of the two, unfinished, or without a usable row.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    return (read_records(path) if path.is_dir() else read_llava(path)).require_some()


def read_records(directory: Path) -> Rows:
    """Kept records of a refined dataset (or of `captune caption`'s output), in the order of their ids."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = training_text(directory)
    wanted = ["sample_id", "image_uri", column, "keep", "error"]
    tables: list[Any] = []
    blobs: dict[str, tuple[int, int]] = {}
    spool = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the rows)
    for shard in shard_paths(directory):
        try:
            file = pq.ParquetFile(shard)
            tables.append(file.read(columns=wanted).select(wanted))
            for batch in file.iter_batches(columns=["sample_id", "image"], batch_size=256):
                _spool(batch, blobs, spool)
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise UserError(f"{shard}: not a readable Parquet shard of sample records ({error})") from error
    spool.flush()
    found = Rows(str(directory), [], spool=spool)
    for record in pa.concat_tables(tables, promote_options="permissive").sort_by("sample_id").to_pylist():
        if record["keep"] is False:
            continue
        found.total += 1
        name, text, uri = record["sample_id"], (record[column] or "").strip(), record["image_uri"]
        image = blobs.get(name) or (uri.removeprefix("file://") if uri else None)
        reason = record["error"] or (None if text else f"empty {column}") or (None if image else "no image")
        if reason:
            found.broken[name] = reason
        else:
            found.rows.append(Row(name, (("assistant", text),), image))
    return found


def _spool(batch: Any, blobs: dict[str, tuple[int, int]], spool: Any) -> None:
    """Copy encoded images to an unlinked file: a random read from Parquet would decompress a whole row group."""
    for name, image in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
        if image:
            blobs[name] = (spool.tell(), len(image))
            spool.write(image)


def read_llava(path: Path) -> Rows:
    """Conversations of a LLaVA JSON (or JSONL) file; images are relative to the file, or to `images/` beside it."""
    try:
        text = path.read_text()
        entries = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(entries, list):
        raise UserError(f"{path}: a LLaVA file is a list of conversations, this is a {type(entries).__name__}")
    found = Rows(str(path), [], total=len(entries))
    for number, entry in enumerate(entries):
        name = f"{path.name} row {number}"
        try:
            found.rows.append(_llava_row(name, entry, path.parent))
        except BadRow as reason:
            found.broken[name] = str(reason)
    return found


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def _llava_row(name: str, entry: Any, root: Path) -> Row:
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list) or not entry["conversations"]:
        raise BadRow("no 'conversations'")
    turns: list[tuple[str, str]] = []
    for turn in entry["conversations"]:
        role, value = _ROLES.get(turn.get("from", "")), turn.get("value")
        if role is None or not isinstance(value, str):
            raise BadRow(f"a turn needs 'from' (human or gpt) and a text 'value': {str(turn)[:80]}")
        if role != ("user", "assistant")[len(turns) % 2]:
            raise BadRow("turns must alternate, human first")
        turns.append((role, value))
    if not any(role == "assistant" and value.strip() for role, value in turns):
        raise BadRow("no answer to learn")
    placeholders = sum(value.count(IMAGE) for _, value in turns)
    image = entry.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            raise BadRow(f"{len(image)} images; one is supported")
        image = image[0] if image else None
    if placeholders != (1 if image else 0) or any(IMAGE in value for role, value in turns if role == "assistant"):
        raise BadRow(f"{placeholders} {IMAGE} placeholder(s) for {1 if image else 0} image(s)")
    return Row(name, tuple(turns), str(_locate(root, image)) if image else None)


def _locate(root: Path, image: str) -> Path:
    beside = root / image
    return beside if beside.exists() or not (root / "images" / image).exists() else root / "images" / image
