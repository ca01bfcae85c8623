"""Choosing which samples and questions the report shows, and their small pictures."""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.formats import error_kind
from pipelines.images import BadImage, decode, read_bytes

if TYPE_CHECKING:
    import pyarrow as pa

SIDE = 224
"""Longest side of a small picture, in pixels."""
_BUDGET = 4_500_000
"""Bytes of pictures in one page; a run of any size gives a page that can be sent by mail."""
KEPT, REJECTED, LISTED = 12, 16, 500
"""Samples shown with their picture, and rejected ones listed in words."""
_ERRORS = 2
"""Pictures shown of each kind of broken file: there is little to see in them."""


@dataclass(frozen=True)
class Picture:
    """`url` is a data URL; empty when there is nothing to see, and `problem` says why."""

    url: str = ""
    problem: str = ""
    width: int = SIDE
    height: int = SIDE


class Thumbnails:
    """Makes small pictures, each file once, until the page is full."""

    def __init__(self) -> None:
        self._spent = 0
        self.of_file = cache(self._of_file)

    def of_bytes(self, data: bytes) -> Picture:
        """From an encoded image."""
        if self._spent > _BUDGET:
            return Picture(problem="left out to keep this page small")
        from PIL import Image

        try:
            picture = decode(data, max_side=2 * SIDE)
        except BadImage as error:
            return Picture(problem=str(error))
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=82, optimize=True)
        text = base64.b64encode(stream.getvalue()).decode()
        self._spent += len(text)
        return Picture(f"data:image/jpeg;base64,{text}", "", *picture.size)

    def _of_file(self, path: str) -> Picture:
        try:
            return self.of_bytes(read_bytes(path))
        except BadImage as error:
            return Picture(problem=str(error))


@dataclass(frozen=True)
class Sample:
    """A card of the gallery, or a line of the list of rejects (then without a picture)."""

    sample_id: str
    before: str
    after: str | None
    reason: str
    kind: str
    name: str
    picture: Picture | None = None


def kept_samples(dataset: Path, thumbnails: Thumbnails, text: str) -> list[Sample]:
    """The first kept samples by `sample_id`; ids are digests, so this is as good as drawing lots and always the same.

    Args:
        text: the column that trains; where it is the caption itself there is nothing to show after it.
    """
    rows = _rows(dataset, ["caption", "recaption"]).slice(0, KEPT).to_pylist()
    return _with_pictures(dataset, [_sample(row, "", text) for row in rows], thumbnails)


def rejected_samples(dataset: Path, thumbnails: Thumbnails) -> tuple[list[Sample], list[Sample], int]:
    """Cards with a picture, in turn of every kind of reason; the list in words; and how many rejects there are."""
    table = _rows(dataset / "rejects", ["caption", "recaption", "reject_reason"])
    by_kind: dict[str, list[Sample]] = defaultdict(list)
    listed = []
    for number, row in enumerate(table.to_pylist()):
        sample = _sample(row, row["reject_reason"] or "no reason was recorded", "recaption")
        if len(by_kind[sample.kind]) < (_ERRORS if sample.kind.startswith("error") else REJECTED):
            by_kind[sample.kind].append(sample)
        if number < LISTED:
            listed.append(sample)
    turns = [(turn, kind) for kind, found in by_kind.items() for turn in range(len(found))]
    chosen = sorted(turns)[:REJECTED]
    cards = [by_kind[kind][turn] for turn, kind in sorted(chosen, key=lambda pick: (pick[1], pick[0]))]
    listed.sort(key=lambda sample: (sample.kind, sample.sample_id))
    return _with_pictures(dataset / "rejects", cards, thumbnails), listed, table.num_rows


def most_common_answer(answers: Iterable[str]) -> tuple[str, int]:
    """What most humans said, and how many of them."""
    counted = Counter(answer.strip().lower() for answer in answers)
    return counted.most_common(1)[0] if counted else ("", 0)


def _rows(directory: Path, columns: list[str]) -> pa.Table:
    """Text columns of all shards by `sample_id`; images stay on disk. Empty when there are no shards."""
    import pyarrow as pa

    from pipelines.records import read_shards

    if not any(directory.glob("*.parquet")):
        return pa.table({})
    return read_shards(directory, columns=["sample_id", "image_uri", *columns])


def _sample(row: dict[str, Any], reason: str, text: str) -> Sample:
    kind = reason.split(":")[0]
    if kind == "error":
        kind = f"error: {error_kind(reason.removeprefix('error: '))}"
    after = row["recaption"] if text == "recaption" else None
    return Sample(row["sample_id"], row["caption"] or "", after, reason, kind, Path(row["image_uri"] or "").name)


def _with_pictures(directory: Path, samples: list[Sample], thumbnails: Thumbnails) -> list[Sample]:
    """Read the images of these rows only; a dataset's images may be larger than memory."""
    import pyarrow.parquet as pq

    wanted = {sample.sample_id for sample in samples}
    found: dict[str, Picture] = {}
    for shard in sorted(directory.glob("*.parquet")) if wanted else []:
        columns = ["sample_id", "image", "image_uri"]
        for row in pq.read_table(shard, columns=columns, filters=[("sample_id", "in", wanted)]).to_pylist():
            if row["sample_id"] not in found:
                found[row["sample_id"]] = _picture(row, thumbnails)
    return [Sample(**{**vars(sample), "picture": found[sample.sample_id]}) for sample in samples]


def _picture(row: dict[str, Any], thumbnails: Thumbnails) -> Picture:
    if row["image"] is not None:
        return thumbnails.of_bytes(row["image"])
    return thumbnails.of_file(row["image_uri"] or "")
