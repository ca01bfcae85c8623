"""Rows to train on, of any dataset that captune reads: kept records with the text that trains, conversations where rows
carry them, and captions otherwise.

A row that cannot be used is counted and named with its reason, never skipped in silence.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import formats
from pipelines.errors import UserError
from pipelines.formats import error_kind, open_dataset
from pipelines.formats.llava import IMAGE, Turn, about, conversation, turns_of
from pipelines.images import BadImage, decode, read_bytes
from pipelines.manifest import training_text
from pipelines.mgm.conversation import BadConversation, alternating
from pipelines.progress import say
from pipelines.records import holds_records, shard_paths

_LOOKED_AT = 100  # images decoded before training starts, to find a dataset whose images lie elsewhere

Image = str | tuple[int, int]
Keep = Callable[[bytes], Image]


class BadRow(Exception):
    """This row cannot be trained on; the text is the reason, its kind first (`error_kind`)."""


@dataclass(frozen=True)
class Row:
    """One sample before tokenization.

    Attributes:
        name: how messages name it: its sample id, or file and row.
        turns: (role, text) with role `user` or `assistant`; each `<image>` stands for the next image. A caption is a
            single assistant turn.
        images: what tells one image from another: its path, or its place in the spool. Empty for a row of text only.
        request: what the user asks for where the row is a caption; LLaVA's own wording when it is empty.
    """

    name: str
    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()
    request: str = ""

    @property
    def size(self) -> int:
        """About how long it is, in characters; MGM's 576 tokens of an image are worth some 2,000."""
        return 2000 * len(self.images) + len(self.request) + sum(len(text) for _, text in self.turns)


@dataclass
class Rows:
    """A training set.

    Attributes:
        source: file or directory.
        rows: what looked usable when it was read.
        broken: name -> reason; grows while training finds images that do not decode.
        total: rows as found, broken ones included.
        spool: open file that holds the images which came inside of rows.
        foreseen: share of the rows that will turn out broken, by the images that were looked at.
        left_out: rows that nobody wants, which `total` does not count.
    """

    source: str
    rows: list[Row]
    broken: dict[str, str] = field(default_factory=dict)
    total: int = 0
    spool: Any = None
    foreseen: float = 0.0
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, name: str, make: Callable[..., Row], *arguments: Any) -> None:
        """Count one more row: what `make` returns, or broken for the reason that it raises."""
        self.total += 1
        try:
            self.rows.append(make(*arguments))
        except BadRow as reason:
            self.broken[name] = str(reason)

    def image_bytes(self, image: Image) -> bytes:
        """Encoded bytes of an image.

        Raises:
            BadImage: the file is missing, unreadable or empty.
        """
        if isinstance(image, str):
            return read_bytes(image)
        offset, size = image
        return os.pread(self.spool.fileno(), size, offset)

    def look_at_images(self) -> None:
        """Decode some images that rows name, evenly spread; those that cannot be are broken rows from here on."""
        named = [row for row in self.rows if row.images and isinstance(row.images[0], str)]
        looked = named[:: max(1, len(named) // _LOOKED_AT)]
        before = len(self.broken)
        for row in looked:
            try:
                for image in row.images:
                    decode(self.image_bytes(image))
            except BadImage as reason:
                self.broken[row.name] = str(reason)
        if looked:
            failing = (len(self.broken) - before) / len(looked) * len(named)
            self.foreseen = (before + failing) / self.total

    def foresee(self, share: float) -> Rows:
        """Self, expecting that this share of the rows that looked usable are not."""
        if self.total:
            self.foreseen = 1 - (1 - share) * len(self.rows) / self.total
        return self

    def require_usable(self, max_share: float = 1.0) -> Rows:
        """Self, or `UserError` that shows an example of each kind of broken row.

        Args:
            max_share: largest share of broken rows, found or foreseen; all of them are too many even at 1.
        """
        broken = max(len(self.broken) / self.total, self.foreseen) if self.total else 1.0
        if broken < 1 and broken <= max_share:
            return self
        reason = f"{100 * broken:.0f} % of {self.total} rows are unusable, and train.max_broken_share is {max_share:g}"
        reason = reason if broken < 1 else "no row to train on"
        raise UserError(f"{self.source}: {reason}" + "".join(f"\n  {line}" for line in self.kinds()))

    def kinds(self) -> list[str]:
        """One line per kind of broken row, the most frequent first, with an example."""
        examples = {error_kind(reason): f"{name}: {reason}" for name, reason in reversed(self.broken.items())}
        counted = Counter(map(error_kind, self.broken.values())).most_common()
        return [f"{kind} ({count}), e.g. {examples[kind][:300]}" for kind, count in counted]


def say_broken(broken: dict[str, str], phase: str, what: str) -> None:
    """Tell the person how many rows of a phase are left out, with an example."""
    if broken:
        name, reason = next(iter(broken.items()))
        say(f"{what}: {len(broken)} row(s) of {phase} could not be used, e.g. {name}: {reason}")


def read_rows(path: Path | str, *, images: bool = True, without: Container[str] = ()) -> Rows:
    """Rows of a directory of sample records or of any dataset in another format.

    Args:
        without: rows of a dataset in another format that are left out, by `formats.Row.where`.
        images: keep the images that come inside of rows; without them nothing can be trained.

    Raises:
        UserError: no dataset, an unfinished stage, or a shard of records that is given by itself.
    """
    dataset = open_dataset(path)
    if dataset.format == "parquet":
        for part in dataset.parts or (dataset.path,):
            assert not isinstance(part, str)
            if isinstance(part, Path) and part.is_dir() and holds_records(part):
                return read_records(part, images=images)
            if holds_records(part):
                raise UserError(f"{part}: a shard of captune's records; give the local directory that it belongs to")
    found = Rows(str(dataset.path), [], spool=tempfile.TemporaryFile())  # noqa: SIM115  (lives as long as the rows)
    keep = _spooling(found.spool) if images else _forget
    for row in dataset.rows():
        if row.where in without:
            found.left_out += 1
        else:
            found.add(row.where, _from_dataset, row, keep)
    found.spool.flush()
    return found


def _from_dataset(row: formats.Row, keep: Keep) -> Row:
    if row.error is not None:
        raise BadRow(row.error)
    images = tuple(keep(image) if isinstance(image, bytes) else image for image in row.pictures)
    conversations = row.meta.get("conversations")
    if conversations is None:
        if len(images) > 1:
            raise BadRow(f"bad row: it has {len(images)} images, and a caption is about one")
        return _about_caption(row.where, row.caption, images)
    try:
        turns = turns_of(conversations)
        alternating(conversation(turns))
    except (ValueError, BadConversation) as reason:
        raise BadRow(f"bad conversation: {reason}") from None
    if not any(role == "assistant" and text.strip() for role, text in turns):
        raise BadRow("bad conversation: no answer to learn")
    placeholders = sum(text.count(IMAGE) for _, text in turns)
    if placeholders != len(images):
        raise BadRow(f"bad conversation: {placeholders} {IMAGE} placeholder(s) for {len(images)} image(s)")
    return Row(row.where, turns, images)


def _about_caption(name: str, caption: str, images: tuple[Image, ...], conversations: Any = None) -> Row:
    if not caption.strip():
        raise BadRow("no text: its caption is empty")
    if not images:
        raise BadRow("no image: a caption without one teaches nothing")
    (_, request), answer = about(caption.strip(), conversations)
    return Row(name, (answer,), images, request)


def read_records(directory: Path, *, images: bool = True) -> Rows:
    """Kept records of a refined dataset (or of `captune caption`'s output), in the order of their ids."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = training_text(directory)
    wanted = ["sample_id", "image_uri", column, "keep", "error", "meta"]
    found = Rows(str(directory), [], spool=tempfile.TemporaryFile())  # noqa: SIM115
    keep = _spooling(found.spool) if images else _forget
    tables: list[Any] = []
    inside: dict[str, Image] = {}
    for shard in shard_paths(directory):
        try:
            file = pq.ParquetFile(shard)
            tables.append(file.read(columns=wanted).select(wanted))
            for batch in file.iter_batches(columns=["sample_id", "image"], batch_size=256):
                for name, image in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                    if image:
                        inside[name] = keep(image)
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise UserError(f"{shard}: not a readable Parquet shard of sample records ({error})") from error
    found.spool.flush()
    for record in pa.concat_tables(tables, promote_options="permissive").sort_by("sample_id").to_pylist():
        if record["keep"] is not False:
            found.add(record["sample_id"], _from_record, record, column, inside)
    return found


def _from_record(record: dict[str, Any], column: str, inside: dict[str, Image]) -> Row:
    if record["error"]:
        raise BadRow(record["error"])
    name, uri, meta = record["sample_id"], record["image_uri"], record["meta"] or ""
    image = inside.get(name) or (uri.removeprefix("file://") if uri else None)
    conversations = json.loads(meta).get("conversations") if '"conversations"' in meta else None
    return _about_caption(name, record[column] or "", (image,) if image else (), conversations)


def _spooling(spool: Any) -> Keep:
    """Copies encoded images to an unlinked file: a random read from Parquet would decompress a whole row group."""

    def keep(image: bytes) -> Image:
        place = (spool.tell(), len(image))
        spool.write(image)
        return place

    return keep


def _forget(image: bytes) -> Image:
    return (0, len(image))
