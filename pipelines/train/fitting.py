"""A step that does not fit the device, in smaller micro-batches: the same step. Torch only."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.errors import WorkFailed
from pipelines.files import write_text
from pipelines.train.data import IGNORE, Batch

NOTE = "micro_batch.json"


def split(batch: Batch, size: int, image_token_id: int, num_image_tokens: int) -> list[Batch]:
    """The batch in pieces of at most `size` rows, each with its rows' images and no longer than its longest row."""
    if batch.samples <= size:
        return [batch]
    shown = (batch.input_ids == image_token_id).sum(1) // num_image_tokens
    ends = [0, *shown.cumsum(0).tolist()]  # a row's images lie behind those of the rows before it
    return [_rows(batch, start, min(start + size, batch.samples), ends) for start in range(0, batch.samples, size)]


def _rows(batch: Batch, start: int, stop: int, ends: list[int]) -> Batch:
    rows, images = slice(start, stop), slice(ends[start], ends[stop])
    length = int(batch.attention_mask[rows].sum(1).max())
    labels = batch.labels[rows, :length]
    visible = images.stop > images.start
    return Batch(
        batch.input_ids[rows, :length],
        batch.attention_mask[rows, :length],
        labels,
        pixels=batch.pixels[images] if batch.pixels is not None and visible else None,
        features=(batch.features[0][images], batch.features[1][images]) if batch.features and visible else None,
        samples=stop - start,
        targets=int((labels[:, 1:] != IGNORE).sum()),
        seed=batch.seed + start,
    )


TOO_LARGE = (
    "out of memory: not even a micro-batch of one sample fits; captune train --dry-run says what takes how much, and "
    "which setting fits"
)


def halved(micro_batch: int) -> int:
    """Half of it, or the next smaller number that divides it. Raises `WorkFailed` for a single sample."""
    smaller = [size for size in range(1, micro_batch // 2 + 1) if micro_batch % size == 0]
    if not smaller:
        raise WorkFailed(TOO_LARGE)
    return smaller[-1]


def note(output: Path, phase: str, micro_batch: int) -> None:
    """Remember the micro-batch that a phase goes on with, for whoever continues; 0: not even one sample fits."""
    write_text(output / NOTE, json.dumps({**noted(output), phase: micro_batch}))


def try_again(output: Path) -> None:
    """Forget what did not fit at all: a person who starts again may have brought another card."""
    if noted(output):
        write_text(output / NOTE, json.dumps({phase: size for phase, size in noted(output).items() if size}))


def noted(output: Path) -> dict[str, int]:
    """Phase -> micro-batch that it was cut down to."""
    path = output / NOTE
    return json.loads(path.read_text()) if path.exists() else {}
