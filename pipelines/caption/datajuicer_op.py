"""captune's captioner as a Data-Juicer operator: in a recipe, `captune_image_captioning_mapper` takes
`image_captioning_mapper`'s place.

    custom_operator_paths: [/path/to/pipelines/caption/datajuicer_op.py]
    process:
      - captune_image_captioning_mapper:      # the one name that changes
          hf_img2seq: Salesforce/blip2-opt-2.7b
          caption_num: 4
          keep_candidate_mode: similar_one_simhash

The path is what `python -c "import pipelines.caption, os; print(os.path.dirname(pipelines.caption.__file__) +
'/datajuicer_op.py')"` prints; in a Python program, importing this module registers the operator just as well.

Rows come out as Data-Juicer's operator makes them: the sample as it was (`keep_original_sample`), then one row (`all`:
one per candidate) whose text keeps its special tokens in their order, a caption behind every image token. What differs
is stated in the class.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_juicer.ops.base_op import OPERATORS, Mapper
from data_juicer.utils.mm_utils import (
    SpecialTokens,
    load_mm_bytes_from_sample,
    remove_non_special_tokens,
    remove_special_tokens,
)
from loguru import logger
from pydantic import PositiveInt

from pipelines.blip2 import checkpoint
from pipelines.blip2.config import CandidateConfig, DecodingConfig
from pipelines.blip2.engine import BlipCaptioner, Captioned, Request
from pipelines.caption.config import CaptionConfig
from pipelines.images import BadImage, decode, read_bytes
from pipelines.manifest import read_json

OP_NAME = "captune_image_captioning_mapper"
_MOST_NEW_TOKENS = 128  # as Data-Juicer has it

Sample = dict[str, Any]
_ENGINES: dict[tuple[str, str], BlipCaptioner] = {}
"""One per model and process: Ray's tasks unpickle an operator of their own, which would load a model of its own."""

Place = tuple[int, int, int]
"""Row of the batch, chunk of its text, image of the chunk."""


@OPERATORS.register_module(OP_NAME, force=True)  # by path and by import: the last one stands
class CaptuneImageCaptioningMapper(Mapper):
    """Generates image captions with a BLIP-2 model and appends them to samples, as `image_captioning_mapper` does, only
    faster.

    Differences: an image goes through the vision tower once however many captions it gets; sampling is seeded by `seed`
        and the
    image, so a rerun says the same; a caption stands behind its own image token also where a chunk has several images;
    a sample with a broken image loses its new rows, not its whole batch; image bytes (`image_bytes_key`) are used where
    a sample has them.
    """

    _accelerator = "cuda"
    _batched_op = True

    def __init__(
        self,
        hf_img2seq: str = "Salesforce/blip2-opt-2.7b",
        trust_remote_code: bool = False,
        caption_num: PositiveInt = 1,
        keep_candidate_mode: str = "random_any",
        keep_original_sample: bool = True,
        prompt: str | None = None,
        prompt_key: str | None = None,
        gpu_batch_size: PositiveInt = 64,
        max_new_tokens: PositiveInt | None = None,
        method: str = "sample",
        beams: PositiveInt = 5,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int = 0,
        dtype: str = "float32",
        clip_model: str = "",
        repeat_prompt: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """
        Initialization method.

        :param hf_img2seq: Hugging Face directory or hub id of a BLIP-2 model.
        :param trust_remote_code: only there so that recipes need no change; BLIP-2 has no remote code.
        :param caption_num: how many candidate captions to generate for each image.
        :param keep_candidate_mode: which candidates stay: 'random_any', 'similar_one_simhash' and 'all' as in
            Data-Juicer, or 'first', 'clip_best', 'longest_clean', 'most_informative'.
        :param keep_original_sample: whether the original sample stays beside the new ones.
        :param prompt: a prompt for all samples.
        :param prompt_key: the field of a sample that holds a prompt of its own; it goes before `prompt`.
        :param gpu_batch_size: captions decoded at once.
        :param max_new_tokens: longest caption in tokens; by default Data-Juicer's 128, or what the model has room for.
        :param method: 'sample' as Data-Juicer, 'greedy' or 'beam'.
        :param beams: beams of 'beam'.
        :param temperature: of 'sample'.
        :param top_k: of 'sample'; 50 is what Data-Juicer's call of `generate` has.
        :param top_p: of 'sample'.
        :param seed: of 'sample' and 'random_any'.
        :param dtype: float32 as Data-Juicer, bfloat16 or float16.
        :param clip_model: CLIP directory or hub id for 'clip_best'.
        :param repeat_prompt: whether captions begin with their prompt, as Data-Juicer's do with OPT models.
        :param args: extra args
        :param kwargs: extra args
        """
        kwargs["memory"] = kwargs.get("memory") or "16GB"
        super().__init__(*args, **kwargs)
        self.hf_img2seq, self.keep_candidate_mode, self.caption_num = hf_img2seq, keep_candidate_mode, caption_num
        self.keep_original_sample, self.repeat_prompt = keep_original_sample, repeat_prompt
        self.prompt, self.prompt_key = prompt, prompt_key
        directory = checkpoint.resolve(hf_img2seq, f"{OP_NAME}.hf_img2seq")
        self.config = CaptionConfig(
            model=str(directory),
            prompt=prompt or "",
            batch_size=gpu_batch_size,
            max_new_tokens=max_new_tokens or _room(directory, prompt or ""),
            dtype=dtype,
            resize="pillow",  # as Data-Juicer
            decoding=DecodingConfig(method, beams=beams, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
            candidates=CandidateConfig(caption_num, keep_candidate_mode, clip_model=clip_model),
        )
        checkpoint.check(directory, self.config.prompt, self.config.max_new_tokens)

    def process_batched(self, samples: dict[str, list[Any]], rank: int | None = None) -> dict[str, list[Any]]:
        """Columns of samples -> columns of samples with their captioned copies."""
        rows = [dict(zip(samples, values, strict=True)) for values in zip(*samples.values(), strict=True)]
        places: list[Place] = []
        broken: set[int] = set()
        engine = self._engine_on(rank)
        found = dict(engine.captions(self._requests(engine, rows, places, broken)))
        captions: dict[int, dict[tuple[int, int], Captioned]] = defaultdict(dict)
        for number, (owner, chunk, image) in enumerate(places):
            captions[owner][chunk, image] = found[number]
        repeats = self.repeat_prompt and engine.model.config.use_decoder_only_language_model
        new_rows: list[Sample] = []
        for number, row in enumerate(rows):
            new_rows += [row] if self.keep_original_sample else []
            if self._images(row) and number not in broken:
                new_rows += self._captioned(row, captions[number], repeats)
        return {key: [row[key] for row in new_rows] for key in samples}

    def _requests(
        self, engine: BlipCaptioner, rows: list[Sample], places: list[Place], broken: set[int]
    ) -> Iterator[Request]:
        """One request per image token, decoded when the engine asks for it; notes where each belongs and which rows
        cannot be read.
        """
        for number, row in enumerate(rows):
            found: list[tuple[Place, Request]] = []
            try:
                taken = 0
                for index, chunk in enumerate(row[self.text_key].split(SpecialTokens.eoc)) if self._images(row) else ():
                    for image in range(chunk.count(SpecialTokens.image)):
                        pixels = engine.preprocess([self._picture(row, taken + image, engine.spec.draft_side)])[0]
                        request = Request(pixels, prompt=self._prompt(row), original=remove_special_tokens(chunk))
                        found.append(((number, index, image), request))
                    taken += chunk.count(SpecialTokens.image)
            except BadImage as problem:
                logger.warning(f"{OP_NAME}: no captions for a sample: {problem}")
                broken.add(number)
                continue
            for place, request in found:
                places.append(place)
                yield request

    def _captioned(self, row: Sample, captions: dict[tuple[int, int], Captioned], repeats: bool) -> list[Sample]:
        """Copies of a sample with new text: one, or one per candidate."""
        count = self.caption_num if self.keep_candidate_mode == "all" else 1
        texts = [""] * count
        for index, chunk in enumerate(row[self.text_key].split(SpecialTokens.eoc)):
            if not chunk.strip():
                continue
            bare = remove_non_special_tokens(chunk)
            own = [captions[index, image] for image in range(chunk.count(SpecialTokens.image))]
            for number in range(count):
                new = [self._text(row, caption, number, repeats) for caption in own]
                texts[number] += _insert(bare, new) + SpecialTokens.eoc
        return [copy.deepcopy(row) | {self.text_key: text} for text in texts]

    def _text(self, row: Sample, caption: Captioned, number: int, repeats: bool) -> str:
        if caption.error is not None:
            logger.warning(f"{OP_NAME}: an empty caption: {caption.error}")
            return ""
        text = caption.candidates[number] if self.keep_candidate_mode == "all" else caption.chosen or ""
        prompt = self._prompt(row)
        return f"{prompt.rstrip()} {text}" if prompt and repeats else text

    def _images(self, row: Sample) -> list[str]:
        return row.get(self.image_key) or []

    def _picture(self, row: Sample, index: int, side: int) -> Any:
        names = self._images(row)
        if index >= len(names):
            raise BadImage(f"its text has more image tokens than the {len(names)} images it names")
        data = load_mm_bytes_from_sample(row, index, self.image_bytes_key) or read_bytes(names[index])
        return decode(data, max_side=side)

    def _prompt(self, row: Sample) -> str | None:
        own = row.get(self.prompt_key) if self.prompt_key else None
        return own if isinstance(own, str) else None if self.prompt is None else self.prompt

    def _engine_on(self, rank: int | None) -> BlipCaptioner:
        import torch

        device = f"cuda:{(rank or 0) % torch.cuda.device_count()}" if self.use_cuda() else "cpu"
        key = (repr(self.config), device)
        if key not in _ENGINES:
            _ENGINES[key] = BlipCaptioner(self.config.model, self.config, device)
        return _ENGINES[key]


def _insert(special: str, captions: list[str]) -> str:
    """Each caption behind its own image token, between spaces."""
    texts = iter(captions)
    return re.sub(re.escape(SpecialTokens.image), lambda token: f"{token[0]} {next(texts)} ", special)


def _room(directory: Path, prompt: str) -> int:
    """Data-Juicer's limit, or what a small model's positions leave beside the image and the prompt (at most a token a
    byte).
    """
    config = read_json(directory / "config.json")
    positions = config.get("text_config", {}).get("max_position_embeddings")
    if positions is None or config.get("text_config", {}).get("model_type", "opt") != "opt":
        return _MOST_NEW_TOKENS
    return max(1, min(_MOST_NEW_TOKENS, positions - config.get("num_query_tokens", 32) - 1 - len(prompt.encode())))
