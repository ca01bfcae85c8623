"""Rows as tokens and loss masks, batches of them, and an order that a restart finds again.

Nothing here depends on Ray. In the place of a row that turns out broken comes the next one, so that every step sees the
same number of samples whatever was broken.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch

from pipelines.errors import UserError
from pipelines.formats.llava import REQUEST, conversation
from pipelines.images import BadImage, decode
from pipelines.mgm.conversation import IGNORE_INDEX, BadConversation, encode_conversation, template_of
from pipelines.mgm.templates import ALIASES, ALIGNMENT, TEMPLATES, get_template
from pipelines.train.rows import BadRow, Image, Row, Rows

IGNORE = IGNORE_INDEX
"""Label of a token that the loss does not see."""

T = TypeVar("T")


@dataclass
class Example:
    """One row as tokens, int32: `input_ids` with the image's tokens in place, and `labels` of equal length."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class Templates:
    """Rows to tokens and loss masks, those that `pipelines.mgm.conversation` gives.

    Args:
        processor: an `MGMProcessor`; its chat template says which language model this is.
        max_length: longest sequence, visual tokens included. What is longer loses its end, as in the original. No more
            than the model's context.
        align, instruct: the phases' templates, names of `pipelines.mgm.templates.TEMPLATES`; `auto`: as the original
            trains this language model.

    Raises:
        UserError: `auto` for a chat template that is none of the original's, or a tokenizer of another kind of model.
    """

    def __init__(self, processor: Any, max_length: int, align: str = "auto", instruct: str = "auto") -> None:
        self.tokenizer = processor.tokenizer
        self.image_token_id = int(processor.image_token_id)
        self.num_image_tokens = int(processor.num_image_tokens)
        self.max_length = max_length
        family = template_of(processor.tokenizer, processor.chat_template)
        self.names = {
            "align": _name("align", align, family and ALIGNMENT.get(family, family)),
            "instruct": _name("instruct", instruct, family),
        }
        for name in self.names.values():
            begins = self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id
            if name != "plain" and get_template(name).bos and not begins:
                raise UserError(f"train: template {name} needs a tokenizer that puts BOS in front; no row had a loss")
        self.cut: set[str] = set()

    def align(self, row: Row) -> Example:
        """Tokens of a row for the alignment of the projector. Raises `BadRow`."""
        return self._encode(row, self.names["align"])

    def instruct(self, row: Row) -> Example:
        """Tokens of a row for instruction. Raises `BadRow`."""
        return self._encode(row, self.names["instruct"])

    def _encode(self, row: Row, template: str) -> Example:
        is_caption = len(row.turns) == 1
        turns = (("user", row.request or REQUEST), *row.turns) if is_caption else row.turns
        try:
            ids, labels = encode_conversation(
                self.tokenizer,
                conversation(turns),
                template,
                self.num_image_tokens,
                num_images=len(row.images),
                max_length=self.max_length,
                captions=is_caption,
            )
        except BadConversation as reason:
            raise BadRow(f"bad conversation: {reason}") from None
        if self.image_token_id in ids[self.max_length :]:
            raise BadRow(f"too long: the image's tokens end after the {self.max_length} that a row may have")
        if not any(label != IGNORE for label in labels[1 : self.max_length]):
            if len(ids) > self.max_length:
                raise BadRow(f"too long: nothing to learn within the {self.max_length} tokens that a row may have")
            raise BadRow("nothing to learn: a turn is empty or spells a separator, and the original gives it no loss")
        if len(ids) > self.max_length:
            self.cut.add(row.name)
        as_tensor = partial(torch.tensor, dtype=torch.int32)  # half the memory of the loader's cache
        return Example(as_tensor(ids[: self.max_length]), as_tensor(labels[: self.max_length]))


def _name(phase: str, wanted: str, of_model: str | None) -> str:
    if wanted == "auto" and of_model is None:
        raise UserError(
            f"train.{phase}.template: the model directory's chat template is none of the original's; name one of "
            f"{', '.join(TEMPLATES)}"
        )
    return ALIASES.get(wanted, wanted) if wanted != "auto" else str(of_model)


@dataclass
class Batch:
    """One micro-batch, padded on the right.

    Attributes:
        input_ids, attention_mask, labels: (rows, length) int64.
        pixels: (images, 3, S, S) uint8, in reading order; None when `features` are given or no row has an image.
        features: frozen tower outputs of the images (see features.py), first dimension: images.
        samples: number of rows.
        targets: number of tokens that the loss sees.
        seed: of its dropout, by its place in the stream: whichever worker computes it, and when.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor | None
    features: tuple[torch.Tensor, torch.Tensor] | None
    samples: int
    targets: int
    seed: int = 0

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""

        def move(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            attention_mask=move(self.attention_mask),
            labels=move(self.labels),
            pixels=move(self.pixels),
            features=None if self.features is None else (move(self.features[0]), move(self.features[1])),
        )


class Sampler:
    """An endless shuffle, epoch after epoch: position p of the stream is a pure function of (seed, phase, p)."""

    def __init__(self, rows: int, seed: int, phase: str) -> None:
        self.rows, self.seed, self.phase = rows, seed, phase
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> list[int]:
        import numpy as np

        key = [self.seed, *self.phase.encode(), epoch]
        return np.random.default_rng(key).permutation(self.rows).tolist()

    def at(self, position: int, count: int) -> list[int]:
        """Row numbers of `count` consecutive positions."""
        return [self._order(p // self.rows)[p % self.rows] for p in range(position, position + count)]

    def seed_at(self, position: int) -> int:
        """A seed for what is drawn at random at this position."""
        name = repr((self.seed, self.phase, position)).encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest(), "big")


@dataclass(frozen=True)
class Share:
    """Which positions of the stream a worker takes at a step: micro-batches are dealt out in turn, so that accumulating
    on one worker and spreading over several see the same samples in the same step.
    """

    worker: int
    workers: int
    micro_batch: int
    accumulation: int

    @property
    def per_step(self) -> int:
        """Samples of one optimizer step, all workers together."""
        return self.workers * self.micro_batch * self.accumulation

    def starts(self, position: int) -> list[int]:
        """First position of each of this worker's micro-batches in the step that begins at `position`."""
        return [position + (m * self.workers + self.worker) * self.micro_batch for m in range(self.accumulation)]


class Loader:
    """Micro-batches of one phase for one worker.

    Args:
        rows: the training set; rows found broken on the way are entered in `rows.broken`.
        encode: `Templates.align` or `Templates.instruct`.
        resize: PIL images -> (N, 3, S, S) uint8, `MGMImageProcessor.resize`.
        pad_token_id: what fills short rows.
        threads: how many rows are read, decoded and resized at a time; Pillow leaves the interpreter alone meanwhile.
    """

    def __init__(
        self,
        rows: Rows,
        encode: Callable[[Row], Example],
        resize: Callable[[list[Any]], torch.Tensor],
        sampler: Sampler,
        share: Share,
        pad_token_id: int,
        threads: int = 1,
    ) -> None:
        self.rows, self.resize, self.sampler, self.share, self.pad = rows, resize, sampler, share, pad_token_id
        self.encode = lru_cache(maxsize=1 << 16)(encode)
        self.features: Any = None  # a FeatureCache once it is filled
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="rows")

    def step(self, position: int) -> list[Batch]:
        """This worker's micro-batches of the step that begins at `position`."""
        drawn = self.drawn(position)
        loaded = self._threads.map(self._usable, [index for indices in drawn for index in indices])
        seeds = map(self.sampler.seed_at, self.share.starts(position))
        return [
            self._collate([next(loaded) for _ in indices], seed) for indices, seed in zip(drawn, seeds, strict=True)
        ]

    def drawn(self, position: int) -> list[list[int]]:
        """Rows of this worker's micro-batches of the step that begins at `position`. The step's rows are dealt out by
        falling length, for little padding and the largest micro-batch first; which rows a step has stays the same.
        """
        rows = self.sampler.at(position, self.share.per_step)
        rows.sort(key=lambda index: -self.rows.rows[index].size)
        size = self.share.micro_batch
        return [rows[start - position : start - position + size] for start in self.share.starts(position)]

    def steps(self, position: int, count: int, depth: int = 2) -> Iterator[list[Batch]]:
        """Micro-batches of `count` steps, made ahead in a thread."""
        size = self.share.per_step
        return prefetch((self.step(position + step * size) for step in range(count)), depth)

    def every_row(self) -> list[Batch]:
        """Each usable row once, in order: this worker's micro-batches of them. All workers have equally many, for which
        some may get one in which there is nothing to learn.
        """
        size, share = self.share.micro_batch, self.share
        starts = list(range(0, len(self.rows), size))
        batches = []
        for turn in range(0, len(starts), share.workers):
            mine = starts[turn + share.worker : turn + share.worker + 1]
            found = [self._load(row) for start in mine for row in self.rows.rows[start : start + size]]
            batches.append(self._collate([loaded for loaded in found if loaded is not None] or [self._nothing()]))
        return batches

    def images(self, position: int, count: int, cache: Any = None) -> list[Image]:
        """Distinct images that `count` steps of this worker show, in a fixed order.

        Args:
            cache: a `FeatureCache`: of the rows that are left when what is broken by its knowledge is replaced, the
                images that it lacks. Without it every row counts as usable.
        """
        needed: set[Image] = set()
        for index in self.indices(position, count):
            row = self.rows.rows[index] if cache is None else self._stand_in(index, cache)
            needed.update(row.images if row is not None else ())
        return _in_order(needed, cache)

    def every_image(self, cache: Any = None) -> list[Image]:
        """`images` of `every_row`: no row stands in for a broken one."""
        usable = (row for row in self.rows.rows if cache is None or cache.reason(row) is None)
        return _in_order({image for row in usable for image in row.images}, cache)

    def indices(self, position: int, count: int) -> list[int]:
        """Distinct rows of this worker's `count` steps, by their place in the stream."""
        steps = (self.drawn(position + step * self.share.per_step) for step in range(count))
        return list(dict.fromkeys(index for drawn in steps for indices in drawn for index in indices))

    def _stand_in(self, index: int, cache: Any) -> Row | None:
        """The row, or the next one that is not known to be broken by its text, or by an image that `cache` has tried:
        what a restart knows besides must not change the groups in which images are encoded.
        """
        for row in self._from(index):
            if cache.reason(row) is None and (row.name not in self.rows.broken or self._encodes(row)):
                return row
        return None

    def _encodes(self, row: Row) -> bool:
        try:
            self.encode(row)
        except BadRow:
            return False
        return True

    def _from(self, index: int) -> Iterator[Row]:
        """All rows, from this one on."""
        return (self.rows.rows[(index + step) % len(self.rows)] for step in range(len(self.rows)))

    def examine(self, indices: Iterable[int]) -> None:
        """Tokenize rows before any of them trains: those that cannot be are entered in `rows.broken`."""
        for index in indices:
            row = self.rows.rows[index]
            if row.name not in self.rows.broken:
                try:
                    self.encode(row)
                except BadRow as reason:
                    self.rows.broken[row.name] = str(reason)

    def pixels(self, image: Image) -> torch.Tensor:
        """(3, S, S) uint8 of an image. Raises `BadRow`."""
        try:
            return self.resize([decode(self.rows.image_bytes(image))])[0]
        except BadImage as reason:
            raise BadRow(str(reason)) from None

    def many_pixels(self, images: list[Image]) -> list[torch.Tensor | BadRow]:
        """`pixels` of several images at a time, in their order; of one that cannot be used, the reason."""

        def prepare(image: Image) -> torch.Tensor | BadRow:
            try:
                return self.pixels(image)
            except BadRow as reason:
                return reason

        return list(self._threads.map(prepare, images))

    def _collate(self, loaded: list[tuple[Example, list[Any]]], seed: int = 0) -> Batch:
        examples, visuals = [example for example, _ in loaded], [visual for _, shown in loaded for visual in shown]
        length = max(len(example.input_ids) for example in examples)
        input_ids = torch.full((len(examples), length), self.pad)
        labels = torch.full((len(examples), length), IGNORE)
        attention_mask = torch.zeros((len(examples), length), dtype=torch.long)
        for n, example in enumerate(examples):
            size = len(example.input_ids)
            input_ids[n, :size], labels[n, :size], attention_mask[n, :size] = example.input_ids, example.labels, 1
        cached = self.features is not None and visuals
        return Batch(
            input_ids,
            attention_mask,
            labels,
            pixels=torch.stack(visuals) if visuals and not cached else None,
            features=self.features.gather(visuals) if cached else None,
            samples=len(examples),
            targets=int((labels[:, 1:] != IGNORE).sum()),
            seed=seed,
        )

    def _usable(self, index: int) -> tuple[Example, list[Any]]:
        """The row, or the next one that is usable."""
        for row in self._from(index):
            loaded = self._load(row)
            if loaded is not None:
                return loaded
        self.rows.require_usable()
        raise AssertionError("unreachable: rows are left, but none was usable")

    def _load(self, row: Row) -> tuple[Example, list[Any]] | None:
        """A row's tokens, and the pixels or places in the feature cache of its images; None when it is not usable."""
        if row.name in self.rows.broken:
            return None
        try:
            example = self.encode(row)
            if self.features is None:
                return example, [self.pixels(image) for image in row.images]
            # An image that was not encoded: another worker could not read what this one could.
            if all(image in self.features.slots for image in row.images):
                return example, [self.features.slots[image] for image in row.images]
        except BadRow as reason:
            self.rows.broken[row.name] = str(reason)
        return None

    def _nothing(self) -> tuple[Example, list[Any]]:
        """Two tokens of padding, of which none is learned."""
        return Example(torch.full((2,), self.pad, dtype=torch.int32), torch.full((2,), IGNORE, dtype=torch.int32)), []


def _in_order(images: set[Image], cache: Any) -> list[Image]:
    return sorted(images - set(cache.slots if cache is not None else ()), key=lambda image: str(image).zfill(24))


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, made up to `depth` ahead in a thread; its exceptions come out here."""
    done = object()
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((done, None))
        except BaseException as error:
            put((done, error))

    threading.Thread(target=fill, daemon=True, name="prefetch").start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stop.set()
