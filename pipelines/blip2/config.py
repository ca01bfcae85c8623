"""How BLIP-2 captions one image: prompt, decoding, candidates, dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.blip2.pixels import RESIZES
from pipelines.errors import UserError

METHODS = ("greedy", "beam", "sample")
AUTO: Literal["auto"] = "auto"
_SLOTS = {"cuda": 256}
"""On an H100 512 caption no faster. A card with less memory halves them by itself."""
_FEW_SLOTS = 32


CHOICES = (
    "first",
    "random_any",
    "similar_one_simhash",
    "all",
    "clip_best",
    "longest_clean",
    "most_informative",
)


@dataclass
class DecodingConfig:
    """How tokens are picked.

    Attributes:
        method: greedy, beam (beam search) or sample (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
        min_new_tokens: no caption ends before it has so many tokens.
        beams: beams of beam search.
        length_penalty: of beam search; above 0 it favours long captions.
        temperature: sampling divides logits by it.
        top_k: sampling keeps the k likeliest tokens; 0 keeps all.
        top_p: sampling keeps the likeliest tokens that together have this probability; 1 keeps all.
        seed: with a sample's id it decides what is sampled for that sample, whatever the batch around it.
    """

    method: str = "greedy"
    min_new_tokens: int = 0
    beams: int = 5
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        name = "caption.decoding"
        if self.method not in METHODS:
            raise UserError(f"{name}.method must be one of {', '.join(METHODS)}, not '{self.method}'")
        for key in ("min_new_tokens", "top_k", "seed"):
            if getattr(self, key) < 0:
                raise UserError(f"{name}.{key} cannot be negative")
        if self.beams < 1:
            raise UserError(f"{name}.beams must be at least 1, not {self.beams}")
        if self.temperature <= 0:
            raise UserError(
                f"{name}.temperature must be positive, not {self.temperature:g}; greedy is a method of its own"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"{name}.top_p is a probability above 0 and at most 1, not {self.top_p:g}")


@dataclass
class CandidateConfig:
    """Several captions for one image, and which of them becomes its caption.

    Attributes:
        count: captions per image; more than one needs `sample` or `beam`. The image is encoded once.
        choose: first, Data-Juicer's random_any, similar_one_simhash or all (refining makes a row of each), or
            clip_best, longest_clean, most_informative; see `pipelines/blip2/candidates.py`.
        keep_original: refining makes a row of the caption as found, too, beside those of the new ones (Data-Juicer's
            keep_original_sample).
        clip_model: Hugging Face directory (or hub id) of the CLIP model that clip_best asks.
    """

    count: int = 1
    choose: str = "first"
    keep_original: bool = False
    clip_model: str = ""

    def __post_init__(self) -> None:
        name = "caption.candidates"
        if self.count < 1:
            raise UserError(f"{name}.count must be at least 1, not {self.count}")
        if self.choose not in CHOICES:
            raise UserError(f"{name}.choose must be one of {', '.join(CHOICES)}, not '{self.choose}'")
        if self.choose == "clip_best" and not self.clip_model:
            raise UserError(f"{name}.clip_model is not set: clip_best needs a CLIP directory or hub id")
        if self.clip_model and self.choose != "clip_best":
            raise UserError(f"{name}.clip_model is set, but only choose: clip_best uses it, not '{self.choose}'")


@dataclass
class BlipConfig:
    """How a BLIP-2 captions: what an engine needs to know, whoever feeds it.

    Attributes:
        model: Hugging Face directory (or hub id) of a BLIP-2 checkpoint.
        prompt: text that every caption continues; empty for none.
        batch_size: captions decoded at once; auto is 256 on a card and 32 without one. What a card has no memory for is
            halved.
        max_new_tokens: longest caption, in tokens.
        decoding: how tokens are picked.
        candidates: how many captions an image gets, and which becomes its caption.
        dtype: weights and activations of the model: float32, bfloat16 or float16; auto is bfloat16 on a card and
            float32 without one.
        products: dtype, or fp8: the large products of vision tower and language model in float8 (e4m3, a scale for
            every row), on GPUs that have it. Faster, with captions that differ in some words.
        resize: torch, or pillow: who makes a decoded picture as small as the model wants it. Torch is faster; Pillow
            gives the very pixels of the model's own processor.
    """

    model: str = ""
    prompt: str = ""
    batch_size: int | Literal["auto"] = AUTO
    max_new_tokens: int = 32
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    candidates: CandidateConfig = field(default_factory=CandidateConfig)
    dtype: str = AUTO
    products: str = "dtype"
    resize: str = RESIZES[0]

    def __post_init__(self) -> None:
        for key in ("batch_size", "max_new_tokens"):
            if getattr(self, key) != AUTO and getattr(self, key) < 1:
                raise UserError(f"caption.{key} must be at least 1, not {getattr(self, key)}")
        if self.dtype not in (AUTO, "float32", "bfloat16", "float16"):
            raise UserError(f"caption.dtype must be auto, float32, bfloat16 or float16, not '{self.dtype}'")
        if self.resize not in RESIZES:
            raise UserError(f"caption.resize must be {' or '.join(RESIZES)}, not '{self.resize}'")
        if self.products not in ("dtype", "fp8"):
            raise UserError(f"caption.products must be dtype or fp8, not '{self.products}'")
        if self.products == "fp8" and self.dtype not in (AUTO, "bfloat16"):
            raise UserError(f"caption.products: fp8 needs caption.dtype: bfloat16, not {self.dtype}")
        count, decoding = self.candidates.count, self.decoding
        if decoding.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"caption.decoding.min_new_tokens: {decoding.min_new_tokens} is more than max_new_tokens, "
                f"{self.max_new_tokens}"
            )
        if count > 1 and decoding.method == "greedy":
            raise UserError(
                f"caption.candidates.count: greedy decoding has one caption, not {count}; use sample or beam"
            )
        if decoding.method == "beam" and count > decoding.beams:
            raise UserError(f"caption.candidates.count: {count} captions do not come out of {decoding.beams} beams")

    def slots_on(self, device: str) -> int:
        """`batch_size` on `cuda` or `cpu`."""
        return _SLOTS.get(device, _FEW_SLOTS) if self.batch_size == AUTO else self.batch_size

    def dtype_on(self, device: str) -> str:
        """`dtype` there."""
        if self.dtype != AUTO:
            return self.dtype
        return "bfloat16" if device == "cuda" else "float32"
