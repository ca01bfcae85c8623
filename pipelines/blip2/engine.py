"""BLIP-2 as a captioner: images in, captions out. torch only, no Ray.

    uint8 pixels ──► vision tower, Q-Former ──► slots (`slots.py`) over OPT or T5 ──► candidates ──► the one that stays
                     once per image             greedy, sampling: refilled as they end             `candidates.py`
                                                beam search (`beams.py`): batch by batch

Shape legend: B images, Q query tokens, d hidden size of the language model.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

from pipelines.blip2 import beams, checkpoint
from pipelines.blip2.candidates import Chooser, Generated
from pipelines.blip2.config import BlipConfig
from pipelines.blip2.opt import OptDecoder
from pipelines.blip2.pixels import PixelSpec
from pipelines.blip2.slots import Decoder, Job, Prefix, Slots, round_up
from pipelines.blip2.t5 import T5Decoder
from pipelines.blip2.uploads import Uploads
from pipelines.blip2.vision import VisionTower
from pipelines.errors import UserError, WorkFailed
from pipelines.modelfiles import load_complete
from pipelines.progress import say

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Request:
    """One image to caption.

    Attributes:
        pixels: uint8 (3, H, W).
        sample_id: seeds sampling; a digest of the pixels where there is none.
        prompt: a prompt of its own, "" for none; None stands for the recipe's.
        original: the caption as found, for choices that compare with it or keep it.
        max_new_tokens: a limit of its own, at most the recipe's.
    """

    pixels: np.ndarray
    sample_id: str | None = None
    prompt: str | None = None
    original: str | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Captioned:
    """What the engine has to say of one image.

    Attributes:
        candidates: every caption generated, without the prompt and without special tokens.
        scores: of the candidates, by the measure that chose among them; None where none was needed.
        chosen: the caption that stays; None when the row failed.
        error: why it failed, as a record's `error` says it.
    """

    candidates: list[str]
    scores: list[float] | None
    chosen: str | None
    error: str | None = None


@dataclass
class _Open:
    """A request in the works: tokens by candidate, as they come."""

    request: Request
    sample_id: str
    tokens: dict[int, list[int]] = field(default_factory=dict)
    error: str | None = None


class BlipCaptioner:
    """A BLIP-2 checkpoint ready to caption images.

    Args:
        model_dir: Hugging Face directory.
        config: prompt, decoding, candidates, dtype and batch size; in float16 transformers keeps the Q-Former in
            float32.
        device: torch device.

    Raises:
        UserError: the directory is no complete BLIP-2 checkpoint (what is missing is named), or the prompt leaves no
            room.
    """

    def __init__(
        self,
        model_dir: Path | str,
        config: BlipConfig | None = None,
        device: str = "cpu",
    ) -> None:
        directory, config = Path(model_dir), config or BlipConfig()
        checkpoint.check(directory, config.prompt, config.max_new_tokens)
        spec, tokenizer = checkpoint.pixel_spec(directory, config.resize), AutoTokenizer.from_pretrained(directory)
        model = load_complete(
            Blip2ForConditionalGeneration, directory, dtype=getattr(torch, config.dtype_on(torch.device(device).type))
        )
        model = model.to(device).eval()
        checkpoint.refuse_other_image_token(
            directory, tokenizer.get_vocab().get(checkpoint.IMAGE_TOKEN), model.config.image_token_id
        )
        self._assemble(model, tokenizer, spec, config, str(directory))

    @classmethod
    def of(cls, model: Any, tokenizer: Any, spec: PixelSpec, config: BlipConfig) -> BlipCaptioner:
        """A captioner around a `Blip2ForConditionalGeneration` that is in memory already, on its device and in its
        dtype.
        """
        captioner = cls.__new__(cls)
        captioner._assemble(model.eval(), tokenizer, spec, config, "the model")
        return captioner

    def _assemble(self, model: Any, tokenizer: Any, spec: PixelSpec, config: BlipConfig, name: str) -> None:
        self.model, self.tokenizer, self.spec, self.config = model, tokenizer, spec, config
        self.device, self.dtype = model.device, model.vision_model.embeddings.patch_embedding.weight.dtype
        self.batch_size = config.slots_on(self.device.type)
        language_model = model.language_model
        self._slots: Slots | None = None
        fp8 = config.products == "fp8"
        if fp8:
            _refuse_fp8(model)
        self._tower = VisionTower(model.vision_model, fp8)
        self._decoder: Decoder = (
            OptDecoder(language_model, fp8)
            if model.config.use_decoder_only_language_model
            else T5Decoder(language_model)
        )
        self._uploads = Uploads(self.device)
        self._ends = _as_list(language_model.generation_config.eos_token_id)
        deviation_311 = torch.tensor(spec.std, device=self.device).view(3, 1, 1)
        self._slope_311 = spec.scale / deviation_311
        self._shift_311 = -torch.tensor(spec.mean, device=self.device).view(3, 1, 1) / deviation_311
        self._chooser = Chooser(config.candidates, config.decoding.seed, self.device)
        prefix = model.config.num_query_tokens + len(self._prompt_ids([config.prompt])[0])
        if self._room(prefix) < config.max_new_tokens:
            raise UserError(
                f"caption.max_new_tokens: {config.max_new_tokens} new tokens do not fit; {name} has "
                f"{self._decoder.max_length} "
                f"positions and the image and prompt take {prefix}"
            )

    def preprocess(self, images: Sequence[Image]) -> np.ndarray:
        """RGB pictures of any size -> uint8 (B, 3, H, W): all that needs to travel to the engine."""
        return self.spec.batch(images)

    def caption(
        self,
        pixels: np.ndarray,
        ids: Sequence[str] | None = None,
        prompts: Sequence[str | None] | None = None,
        originals: Sequence[str | None] | None = None,
    ) -> list[Captioned]:
        """Caption images; the more there are in a call, the fuller the slots (several times `batch_size` is good).

        Args:
            pixels: uint8 (B, 3, H, W).
            ids: sample ids, which seed sampling; a digest of the pixels where there are none.
            prompts: a prompt for each image; None stands for the recipe's.
            originals: captions as found, for choices that compare with them.
        """
        columns = (ids, prompts, originals)
        others = zip(*(column if column is not None else [None] * len(pixels) for column in columns), strict=True)
        found = dict(self.captions(Request(image, *rest) for image, rest in zip(pixels, others, strict=True)))
        return [found[row] for row in range(len(pixels))]

    @torch.inference_mode()
    def captions(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Captioned]]:
        """Caption a stream: `(position in the stream, result)` as each is finished, which is not the stream's order.

        Slots stay full as long as the stream has more; at most `batch_size` requests are read ahead of those being
        decoded. A stream that has nothing at the moment gives None: what is in the slots goes on, and the stream is
        asked again while anything does.

        Raises:
            WorkFailed: not even one image fits into the device's memory.
        """
        finished = self._finished(requests)
        while group := list(islice(finished, self._chooser.group)):
            good = [self._generated(opened) for _, opened in group if opened.error is None]
            choices = iter(self._chooser.choose(good))
            texts = iter(generated.texts for generated in good)
            for row, opened in group:
                if opened.error is None:
                    scores, chosen = next(choices)
                    yield row, Captioned(next(texts), scores, chosen)
                else:
                    yield row, Captioned([], None, None, opened.error)

    @torch.inference_mode()
    def generate(self, requests: Iterable[Request]) -> list[list[list[int]]]:
        """Tokens of every candidate of every image, the end token among them, as
        `Blip2ForConditionalGeneration.generate` has them.
        """
        found = dict(self._finished(requests))
        return [[found[row].tokens[candidate] for candidate in sorted(found[row].tokens)] for row in sorted(found)]

    def normalize(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 -> the image processor's floats, on the device, so that only bytes cross the bus."""
        floats_BCHW = pixels_BCHW.to(self.device).float()
        return torch.addcmul(self._shift_311, floats_BCHW, self._slope_311).to(self.dtype)

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 -> the image as the language model reads it (B, Q, d): vision tower, Q-Former, projection."""
        model = self.model
        states = self._tower(self.normalize(pixels_BCHW))
        with _tensor_cores_for_float32(self.device.type == "cuda" and self.dtype == torch.float16):
            # without the mask of ones that transformers makes: the device would be waited for to learn that it masks
            # nothing
            queries = model.qformer(
                query_embeds=model.query_tokens.expand(len(states), -1, -1), encoder_hidden_states=states
            ).last_hidden_state
        return model.language_projection(queries.to(states.dtype))

    def _finished(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, _Open]]:
        """Every request with all its candidates' tokens, or with an error; on out-of-memory, what is unfinished is
        taken up again.
        """
        opened: dict[int, _Open] = {}
        source = enumerate(requests)
        while True:
            try:
                yield from self._attempt(opened, source)
                return
            except torch.OutOfMemoryError as error:
                if self.batch_size == 1:
                    raise WorkFailed("caption: out of memory with a single image at once") from error
            self._halve()  # after the handler, whose exception keeps tensors alive

    def _attempt(
        self, opened: dict[int, _Open], source: Iterator[tuple[int, Request | None]]
    ) -> Iterator[tuple[int, _Open]]:
        refused: list[int] = []
        rows = chain(list(opened), self._open(opened, source))
        batches = self._prefixes(opened, rows, refused)
        decode = self._search if self.config.decoding.method == "beam" else self._decode
        for job, tokens in decode(batches, opened):
            row = job.prefix.row
            opened[row].tokens[job.candidate] = tokens
            if len(opened[row].tokens) == self.config.candidates.count:
                yield row, opened.pop(row)
            while refused:
                yield (row := refused.pop()), opened.pop(row)
        for row in refused:
            yield row, opened.pop(row)

    @staticmethod
    def _open(opened: dict[int, _Open], source: Iterator[tuple[int, Request | None]]) -> Iterator[int | None]:
        for row, request in source:
            if request is None:
                yield None
                continue
            identity = request.sample_id
            if identity is None:
                identity = hashlib.blake2b(request.pixels.tobytes(), digest_size=16).hexdigest()
            opened[row] = _Open(request, identity)
            yield row

    def _prefixes(
        self, opened: dict[int, _Open], rows: Iterator[int | None], refused: list[int]
    ) -> Iterator[list[Prefix]]:
        """Batches of images through the towers, empty ones where the stream has none; a prompt that leaves no room for
        a caption is refused instead.
        """
        queries = self.model.config.num_query_tokens
        for batch in _batches(rows, self.batch_size):
            if not batch:
                yield []
                continue
            requests = [opened[row].request for row in batch]
            prompts = self._prompt_ids(
                [self.config.prompt if each.prompt is None else each.prompt for each in requests]
            )
            limits = [min(each.max_new_tokens or self._new, self._new) for each in requests]
            rooms = [self._room(queries + len(ids)) for ids in prompts]
            fitting = []
            for row, ids, limit, room in zip(batch, prompts, limits, rooms, strict=True):
                if room >= limit:
                    fitting.append((row, ids, limit))
                    continue
                opened[
                    row
                ].error = f"prompt too long: {len(ids)} tokens leave {max(room, 0)} of {limit} for the caption"
                refused.append(row)
            if fitting:
                images = self.features(self._uploads.stack([opened[row].request.pixels for row, _, _ in fitting]))
                plans = zip(fitting, images, strict=True)
                yield [Prefix(row, opened[row].sample_id, image, ids, limit) for (row, ids, limit), image in plans]

    def _decode(self, batches: Iterator[list[Prefix]], opened: dict[int, _Open]) -> Iterator[tuple[Job, list[int]]]:
        """Greedy decoding and sampling in slots; they are emptied and made longer when a longer prompt comes."""
        ahead = _Ahead(batches)
        meanwhile = ahead.fill if self.device.type == "cuda" else None
        batch = next(ahead, None)
        while batch:
            slots = self._slots_for(max(prefix.length for prefix in batch))
            jobs = _Jobs(batch, ahead, slots.prefix, self.config.candidates.count, opened)
            yield from slots.run(jobs, meanwhile)
            batch = jobs.left

    def _search(self, batches: Iterator[list[Prefix]], opened: dict[int, _Open]) -> Iterator[tuple[Job, list[int]]]:
        for batch in takewhile(bool, batches):
            yield from beams.search(self.model, batch, self.config.decoding, self.config.candidates.count, self._ends)

    def _slots_for(self, prefix: int) -> Slots:
        if self._slots is None or self._slots.prefix < prefix:
            self._slots = None
            self._decoder.release()  # before the new cache is there
            self._slots = Slots(
                self._decoder,
                self.batch_size,
                round_up(prefix),
                self._new,
                self.config.decoding,
                self._ends,
                self.device,
            )
        return self._slots

    def _halve(self) -> None:
        say(f"caption: out of memory with {self.batch_size} at once; going on with {self.batch_size // 2}")
        self.batch_size //= 2
        self._slots = None
        self._decoder.release()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _generated(self, opened: _Open) -> Generated:
        tokens = [opened.tokens[candidate] for candidate in range(len(opened.tokens))]
        texts = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        ended = [bool(ids) and ids[-1] in self._ends for ids in tokens]
        return Generated(opened.sample_id, texts, ended, opened.request.original, opened.request.pixels)

    @property
    def _new(self) -> int:
        return self.config.max_new_tokens

    def _prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        """Token ids that follow the image: the prompt's, or the start token where there is none."""
        start = [self.model.config.text_config.bos_token_id]
        different = sorted(set(prompts) - {""})
        ids = dict(zip(different, self.tokenizer(different).input_ids, strict=True)) if different else {}
        return [ids.get(prompt, start) for prompt in prompts]

    def _room(self, prefix: int) -> int:
        """New tokens that fit behind so many."""
        limit = self._decoder.max_length
        return limit - prefix if limit is not None else self._new


class _Ahead:
    """Batches of prefixes, of which one may be made before it is asked for."""

    def __init__(self, batches: Iterator[list[Prefix]]) -> None:
        self._batches = batches
        self._made: list[Prefix] = []

    def fill(self) -> None:
        """Make the next one, where none is made yet. An empty one, of a stream that pauses, is not kept."""
        if not self._made:
            self._made = next(self._batches, [])

    def __iter__(self) -> Iterator[list[Prefix]]:
        return self

    def __next__(self) -> list[Prefix]:
        made, self._made = self._made, []
        return made or next(self._batches)


class _Jobs:
    """Candidates of image after image; ends before a batch whose prompts are longer than the slots, which it leaves in
    `left`.
    """

    def __init__(
        self, batch: list[Prefix], more: Iterator[list[Prefix]], longest: int, count: int, opened: dict[int, _Open]
    ) -> None:
        self.left: list[Prefix] | None = None
        self._jobs = self._walk(batch, more, longest, count, opened)

    def __iter__(self) -> Iterator[Job | None]:
        return self._jobs

    def _walk(
        self, batch: list[Prefix], more: Iterator[list[Prefix]], longest: int, count: int, opened: dict[int, _Open]
    ) -> Iterator[Job | None]:
        for prefixes in chain([batch], more):
            if max((prefix.length for prefix in prefixes), default=0) > longest:
                self.left = prefixes
                return
            if not prefixes:
                yield None
            for prefix in prefixes:
                done = opened[prefix.row].tokens  # of an attempt that ran out of memory
                yield from (Job(prefix, candidate) for candidate in range(count) if candidate not in done)


def _batches(rows: Iterator[int | None], size: int) -> Iterator[list[int]]:
    """Rows in lists of `size`; shorter, even empty, where a None among them says that there are no more at the
    moment.
    """
    batch: list[int] = []
    for row in rows:
        if row is not None:
            batch.append(row)
        if row is None or len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def _tensor_cores_for_float32(wanted: bool) -> Iterator[None]:
    """TF32 for the Q-Former of a float16 model: its mantissa is as long as that of the towers around it, its range is
    float32's.
    """
    if not wanted:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _refuse_fp8(model: Any) -> None:
    if not model.config.use_decoder_only_language_model or model.dtype != torch.bfloat16:
        raise UserError("caption.products: fp8 is for a BLIP-2 with OPT, and for caption.dtype: bfloat16")
    if model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < (8, 9):
        raise UserError(f"caption.products: {torch.cuda.get_device_name(model.device)} has no products in float8")


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
