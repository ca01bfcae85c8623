"""What a training will take, and whether it fits: `captune train --dry-run`, and `micro_batch: auto`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.load import load_processor, quiet
from pipelines.train.activations import Micro
from pipelines.train.config import AUTO, DDP_ONLY, PhaseConfig, TrainConfig
from pipelines.train.data import IGNORE, Templates
from pipelines.train.memory import CARD_24GB, GIB, Phase, Prediction, read_config
from pipelines.train.rows import BadRow, Row, read_rows

MARGIN = 0.05
"""Share of a card that `auto` leaves free: rows that were not looked at may be longer."""
_LOOKED_AT = 1000
_MOST = 1 << 16


@dataclass(frozen=True)
class Longest:
    """The largest row of a phase.

    Attributes:
        tokens, targets, images: of it; targets and images are the most that any row has.
        distinct: images of all rows; 0: not known.
        of: how many rows were looked at; 0: none is known, and it is the longest that the settings allow.
    """

    tokens: int
    targets: int
    images: int = 1
    distinct: int = 0
    of: int = 0

    def micro(self, rows: int, encoded: bool = True) -> Micro:
        """So many of them."""
        return Micro(rows, self.tokens, rows * self.targets, rows * self.images, encoded, padded=rows > 1)


def longest_possible(model: MGMConfig, config: TrainConfig) -> Longest:
    """A row with one image that has all the text that there is room for, every word of it a target."""
    room = min(config.max_length, int(getattr(model.text_config, "max_position_embeddings", config.max_length)))
    return Longest(room, max(1, room - model.num_image_tokens))


def longest_of(rows: list[Row], encode: Any, num_image_tokens: int, image_token_id: int) -> Longest | None:
    """The largest of rows that are looked at, evenly spread; None if none of them can be used."""
    lengths, targets, images = [], [], []
    for row in rows[:: max(1, len(rows) // _LOOKED_AT)]:
        try:
            example = encode(row)
        except BadRow:
            continue
        lengths.append(len(example.input_ids))
        targets.append(int((example.labels != IGNORE).sum()))
        images.append(int((example.input_ids == image_token_id).sum()) // num_image_tokens)
    if not lengths:
        return None
    distinct = len({image for row in rows for image in row.images})
    return Longest(max(lengths), max(targets), max(images), distinct, len(lengths))


@dataclass
class Forecast:
    """One phase on one card.

    Attributes:
        phase: its name.
        settings: as they stand, or with the micro-batch that `auto` comes to.
        prediction: of a worker's memory.
        row: the largest.
        capacity: bytes of the card.
        nearest: what to set so that it fits; empty if it does, or if nothing was found.
    """

    phase: str
    settings: PhaseConfig
    prediction: Prediction
    row: Longest
    capacity: int
    nearest: str = ""

    @property
    def fits(self) -> bool:
        """On the card, the allocator's gaps and the CUDA context included."""
        return self.prediction.card <= self.capacity

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        settings = {key: getattr(self.settings, key) for key in ("micro_batch", "accumulation", "batch")}
        row = {"tokens": self.row.tokens, "targets": self.row.targets, "rows_looked_at": self.row.of}
        return {**settings, "longest_row": row, "memory_gib": self.prediction.as_json(), "fits": self.fits,
                "nearest": self.nearest}  # fmt: skip


def card() -> tuple[str, int]:
    """The name and the bytes of the card in this machine, or of one with 24 GB where there is none."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return found.name, int(found.total_memory)
    return "a card of 24 GB (none is here)", CARD_24GB


def forecast(config: TrainConfig, model: Path | str, data: dict[str, str]) -> list[Forecast]:
    """What each phase takes of a worker's card.

    Args:
        model: directory of the base; `config.json` is enough, and with it a tokenizer to look at rows.
        data: phase -> its rows, of the phases that run; where they are not there yet, the longest possible row counts.

    Raises:
        UserError: no configuration of an MGM there, or settings that cannot be.
    """
    quiet()
    shape, (_, capacity) = read_config(model), card()
    found = []
    for name, path in data.items():
        row = _look(config, model, name, path) or longest_possible(shape, config)
        found.append(foresee(Phase(shape, config, name), row, capacity))
    return found


def _look(config: TrainConfig, model: Path | str, name: str, path: str) -> Longest | None:
    """The longest row of a phase's data, if data and tokenizer are there."""
    try:
        processor = load_processor(model)
        rows = read_rows(path, images=False).rows
    except UserError:
        return None
    templates = Templates(processor, config.max_length, config.align.template, config.instruct.template)
    return longest_of(rows, getattr(templates, name), templates.num_image_tokens, templates.image_token_id)


def foresee(phase: Phase, row: Longest, capacity: int) -> Forecast:
    """A phase with rows like this one, and what to change if it does not fit."""
    settings = phase.settings
    if settings.micro_batch == AUTO:
        settings = settings.settled(phase.name, phase.config.workers, fitting(phase, row, capacity) or 1)
    else:
        settings = settings.settled(phase.name, phase.config.workers)
    made = Forecast(phase.name, settings, predict(phase, row, settings), row, capacity)
    return made if made.fits else replace(made, nearest=_nearest(phase, row, settings, capacity))


def predict(phase: Phase, row: Longest, settings: PhaseConfig) -> Prediction:
    """Of so many such rows."""
    encoded = not row.distinct or not phase.cache(row.distinct)
    micro = row.micro(int(settings.micro_batch), encoded)
    return phase.predict(micro, accumulating=settings.accumulation > 1, images=row.distinct)


def fitting(phase: Phase, row: Longest, capacity: int) -> int:
    """The largest power of two as micro-batch that divides the batch and leaves a margin of the card; 0: none does."""
    room = int(capacity * (1 - MARGIN))
    for settings in _smaller(phase, _MOST):
        size = int(settings.micro_batch)
        if size & (size - 1) == 0 and predict(phase, row, settings).card <= room:
            return size
    return 0


def _smaller(phase: Phase, below: int) -> Iterator[PhaseConfig]:
    """The same steps with smaller micro-batches, the largest first."""
    workers = phase.config.workers
    share = phase.settings.per_step(workers) // workers
    for size in range(min(share, below - 1), 0, -1):
        if share % size == 0:
            yield phase.settings.settled(phase.name, workers, size)


def _nearest(phase: Phase, row: Longest, settings: PhaseConfig, capacity: int) -> str:
    """The first of: a smaller micro-batch, checkpointing as well, ZeRO-3 on more workers as well."""
    config, where = phase.config, f"train.{phase.name}"
    asked = int(settings.micro_batch)
    attempts: list[tuple[str, TrainConfig, int]] = [("", config, asked)]
    if not config.gradient_checkpointing:
        config = replace(config, gradient_checkpointing=True)
        attempts.append(("train.gradient_checkpointing true, ", config, asked + 1))
    for more in (2, 4, 8, 16):
        workers = config.workers * more
        if config.method not in DDP_ONLY and settings.per_step(config.workers) % workers == 0:
            batches = {name: replace(getattr(config, name), batch=None, micro_batch=1, accumulation=1)
                       for name in ("align", "instruct")}  # fmt: skip
            batches[phase.name] = replace(settings, micro_batch=1)
            shared = replace(config, strategy="zero3", workers=workers, **batches)
            attempts.append((f"train.strategy zero3, train.workers {workers}, ", shared, 2))
    for words, changed, below in attempts:
        tried = Phase(phase.model_config, changed, phase.name) if words else phase
        for smaller in _smaller(tried, below):
            if predict(tried, row, smaller).card <= capacity:
                return f"{words}{where}.micro_batch {smaller.micro_batch} with accumulation {smaller.accumulation}"
    return ""


def brief(found: list[Forecast]) -> list[str]:
    """In a line, and one for what does not fit."""
    sizes = " and ".join(f"{each.prediction.card / GIB:.1f}" for each in found)
    return [f"{sizes} GiB of {card()[1] / GIB:.1f}", *(_unfit(each) for each in found if not each.fits)]


def describe(found: list[Forecast], config: TrainConfig) -> str:
    """As a table for people, GiB."""
    name, capacity = card()
    lines = [f"{config.strategy}, {config.workers} worker(s), held against {name}: {capacity / GIB:.1f} GiB"]
    cells = [("GiB of a worker", *(each.phase for each in found))]
    cells += [("micro-batch x accumulation", *(f"{f.settings.micro_batch} x {f.settings.accumulation}" for f in found))]
    cells += [("longest row, tokens", *(str(each.row.tokens) for each in found))]
    for key, words in _PARTS.items():
        cells.append((words, *(f"{getattr(each.prediction, key) / GIB:.2f}" for each in found)))
    cells.append(("peak of all tensors", *(f"{each.prediction.tensors / GIB:.2f}" for each in found)))
    cells.append(("  reached in", *(each.prediction.moment for each in found)))
    cells.append(("a card must have", *(f"{each.prediction.card / GIB:.2f}" for each in found)))
    cells.append(("fits", *("yes" if each.fits else "no" for each in found)))
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    lines += ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
              for row in cells]  # fmt: skip
    for each in found:
        if not each.row.of:
            lines.append(f"{each.phase}: no rows to look at, so all are as long as train.max_length allows")
        if not each.fits:
            lines.append(_unfit(each))
    return "\n".join(lines)


def _unfit(found: Forecast) -> str:
    way = f"this does: {found.nearest}" if found.nearest else _NOTHING
    return f"{found.phase} does not fit; {way}"


_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "buffers": "buffers of ZeRO",
    "towers": "towers at work",
    "activations": "activations kept",
    "layer": "a layer in its backward pass",
    "logits": "logits and their gradients",
    "host_cache": "feature cache (host memory)",
}
_NOTHING = "nor does a smaller micro-batch, checkpointing, or ZeRO-3 on up to sixteen times the workers"
