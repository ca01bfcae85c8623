"""Which of an image's candidates becomes its caption.

`random_any`, `similar_one_simhash` and `all` mean what they mean in Data-Juicer's `image_captioning_mapper` (1.6.1),
except that chance here belongs to the sample: a rerun picks the same. Under `all` a record's caption is its first
candidate, and refining makes a row of each. The others are better reasons:

    first             the likeliest: greedy's, beam search's best, the first one sampled
    clip_best         CLIP (Radford et al. 2021, arXiv:2103.00020) finds it most similar to the image
    longest_clean     the most words, among captions that came to their end, repeat nothing and hold nothing but text
    most_informative  the most different content words; between equals, the one whose words other candidates use too
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.blip2 import checkpoint
from pipelines.blip2.config import CandidateConfig
from pipelines.blip2.sampling import uniforms
from pipelines.modelfiles import load_complete

_FUNCTION_WORDS = (
    "a an the this that these those some any each and or but nor of in on at by to from for with without into "
    "onto over under above "
    "below between behind beside near next as is are was were be been being am has have had do does did there "
    "here it its he she they "
    "them his her their which who whom whose what where when while than then so very also just not no"
)
_NOT_TEXT = re.compile(r"[^\w\s.,;:!?'\"()&%/-]|_")
_WORD = re.compile(r"\w+(?:'\w+)?")


@dataclass(frozen=True)
class Generated:
    """An image's candidates, and what choices look at.

    Attributes:
        texts: the candidates.
        ended: they came to an end token, so they were not cut off.
        original: the caption as found.
        pixels: uint8 (3, H, W).
    """

    sample_id: str
    texts: list[str]
    ended: list[bool]
    original: str | None
    pixels: np.ndarray


class Chooser:
    """Chooses as the recipe's `candidates` section says.

    Args:
        config: the section.
        seed: of random choices.
        device: where CLIP runs.

    Raises:
        UserError: the CLIP model is not there.
    """

    def __init__(self, config: CandidateConfig, seed: int, device: torch.device) -> None:
        self._config, self._seed = config, seed
        self._clip = Clip(config.clip_model, device) if config.choose == "clip_best" else None
        self.group = 32 if self._clip else 1
        """Images that are best looked at together."""

    def choose(self, images: list[Generated]) -> list[tuple[list[float] | None, str]]:
        """Scores of the candidates (None where nothing was measured; more is better) and the caption that stays, for
        each image.
        """
        scores = self._scores(images)
        return [(found, self._pick(image, found)) for image, found in zip(images, scores, strict=True)]

    def _scores(self, images: list[Generated]) -> list[list[float] | None]:
        if self._clip:
            return self._clip.similarity([image.pixels for image in images], [image.texts for image in images])
        measure = _MEASURES.get(self._config.choose)
        return [measure(image) if measure else None for image in images]

    def _pick(self, image: Generated, scores: list[float] | None) -> str:
        if scores is not None:
            return image.texts[max(range(len(scores)), key=scores.__getitem__)]  # the first of equals
        if self._config.choose == "random_any":
            # a stream of its own, beside those of the candidates 0, 1, ...
            chance = uniforms(self._seed, image.sample_id, -1, 1)[0]
            return image.texts[int(chance * len(image.texts))]
        return image.texts[0]


def likeness(image: Generated) -> list[float]:
    """Share of SimHash bits (0 to 1) that a candidate has in common with the caption as found: Data-Juicer's
    measure.
    """
    found = simhash(image.original or "")
    return [1 - (simhash(text) ^ found).bit_count() / 64 for text in image.texts]


def simhash(text: str) -> int:
    """64-bit SimHash (Charikar 2002) of pairs of words, bit for bit that of Data-Juicer with simhash-pybind 0.0.3."""
    words = [word for word in text.lower().split(" ") if word]
    balance = [0] * 64
    for pair in zip(words, words[1:], strict=False):
        digest = int.from_bytes(hashlib.md5(" ".join(pair).encode(), usedforsecurity=False).digest()[:8], "big")
        for bit in range(64):
            balance[bit] += 1 if digest >> bit & 1 else -1
    return sum(1 << bit for bit, count in enumerate(balance) if count > 0)


def clean_length(image: Generated) -> list[float]:
    """Words of a clean candidate; of another, minus the number of its faults."""
    return [
        float(len(words) if not (bad := faults(text, ended)) else -bad)
        for text, ended in zip(image.texts, image.ended, strict=True)
        for words in [_WORD.findall(text)]
    ]


def faults(text: str, ended: bool) -> int:
    """Cut off; a word twice in a row, or three words again; characters that no sentence has; nothing said at all."""
    words = [word.lower() for word in _WORD.findall(text)]
    triples = list(zip(words, words[1:], words[2:], strict=False))
    repeated = sum(map(str.__eq__, words, words[1:])) + len(triples) - len(set(triples))
    return (not ended) + repeated + len(_NOT_TEXT.findall(text)) + (not words)


def information(image: Generated) -> list[float]:
    """Different content words of a candidate, plus (below 1) the share of the other candidates that say these words
    too.
    """
    common = set(_FUNCTION_WORDS.split())
    contents = [{word.lower() for word in _WORD.findall(text)} - common for text in image.texts]
    others = max(len(contents) - 1, 1)
    scores = []
    for own in contents:
        agreeing = sum(word in other for word in own for other in contents) - len(own)
        scores.append(len(own) + 0.999 * agreeing / (others * max(len(own), 1)))
    return scores


_MEASURES: dict[str, Callable[[Generated], list[float]]] = {
    "similar_one_simhash": likeness,
    "longest_clean": clean_length,
    "most_informative": information,
}


class Clip:
    """Image-text similarity by a CLIP checkpoint; images come as BLIP-2's own pixels, resized once more where CLIP's
    are of another size.

    Args:
        model: Hugging Face directory or hub id.
        device: torch device.

    Raises:
        UserError: no such model, or its directory is not complete.
    """

    def __init__(self, model: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        directory = checkpoint.resolve(model, "caption.candidates.clip_model")
        checkpoint.check_clip(directory)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = load_complete(CLIPModel, directory).to(device).eval()
        processor: Any = AutoImageProcessor.from_pretrained(directory)
        self._device, self._size = device, self._model.config.vision_config.image_size
        self._mean = torch.tensor(processor.image_mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(processor.image_std, device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def similarity(self, pixels: list[np.ndarray], texts: list[list[str]]) -> list[list[float] | None]:
        """uint8 images (3, H, W) and their candidates -> the candidates' cosines with their own image."""
        if not pixels:
            return []
        images_Bd = F.normalize(
            self._model.get_image_features(pixel_values=self._normalize(pixels)).pooler_output, dim=-1
        )
        flat = [text for candidates in texts for text in candidates]
        limit = self._model.config.text_config.max_position_embeddings
        inputs = self._tokenizer(flat, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(
            self._device
        )
        texts_Gd = F.normalize(
            self._model.get_text_features(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask
            ).pooler_output,
            dim=-1,
        )
        owner_G = torch.tensor([row for row, candidates in enumerate(texts) for _ in candidates], device=self._device)
        cosines = iter((texts_Gd * images_Bd[owner_G]).sum(dim=-1).tolist())
        return [[next(cosines) for _ in candidates] for candidates in texts]

    def _normalize(self, pixels: list[np.ndarray]) -> Tensor:
        images_BCHW = torch.from_numpy(np.stack(pixels)).to(self._device).float() / 255
        if images_BCHW.shape[-2:] != (self._size, self._size):
            images_BCHW = F.interpolate(images_BCHW, (self._size, self._size), mode="bicubic", antialias=True)
        return (images_BCHW - self._mean) / self._std
