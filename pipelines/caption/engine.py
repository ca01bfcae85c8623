"""BLIP-2 as a captioner: images in, captions out. torch only, no Ray.

Shape legend: B images, Q query tokens, P prompt tokens, T new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

from pipelines.caption import checkpoint
from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


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


class BlipCaptioner:
    """A BLIP-2 checkpoint ready to caption batches of images.

    Args:
        model_dir: Hugging Face directory.
        config: prompt, decoding, candidates, dtype and batch size; the Q-Former stays in float32, as its authors want.
        device: torch device.

    Raises:
        UserError: the directory is no complete BLIP-2 checkpoint (what is missing is named), or the prompt leaves no room.
    """

    def __init__(
        self,
        model_dir: Path | str,
        config: CaptionConfig | None = None,
        device: str = "cpu",
    ) -> None:
        directory, config = Path(model_dir), config or CaptionConfig()
        prompt, dtype, max_new_tokens = config.prompt, config.dtype, config.max_new_tokens
        checkpoint.check(directory, prompt, max_new_tokens)
        self.spec = checkpoint.pixel_spec(directory)
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.max_new_tokens = max_new_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = _load_model(directory, self.dtype).to(self.device).eval()
        image_id = self.model.config.image_token_id
        checkpoint.refuse_other_image_token(directory, self.tokenizer.get_vocab().get(checkpoint.IMAGE_TOKEN), image_id)
        self.prompt_ids_P = self._encode_prompt(prompt, image_id) if prompt else None
        self._mean = torch.tensor(self.spec.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(self.spec.std, device=self.device).view(1, 3, 1, 1)
        self._check_room(directory)

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
        """Caption images.

        Args:
            pixels: uint8 (B, 3, H, W).
            ids: sample ids, which seed sampling; a digest of the pixels where there are none.
            prompts: a prompt for each image; None stands for the recipe's.
            originals: captions as found, for choices that compare with them.
        """
        if not len(pixels):
            return []
        texts = self.tokenizer.batch_decode(self.generate(pixels), skip_special_tokens=True)
        return [Captioned([text.strip()], None, text.strip()) for text in texts]

    @torch.inference_mode()
    def generate(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, 3, H, W) -> new token ids (B, T), token for token what plain `generate` gives for the processor's output."""
        inputs = {"pixel_values": self.normalize(torch.from_numpy(pixels))}
        skip = 0
        if self.prompt_ids_P is not None:
            inputs["input_ids"] = self.prompt_ids_P.expand(len(pixels), -1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        if self.model.config.use_decoder_only_language_model:  # a decoder repeats its input before it goes on
            skip = self._prompt_length()
        return tokens[:, skip:]

    def normalize(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 -> the image processor's floats, on the device, so that only bytes cross the bus."""
        scaled = pixels_BCHW.to(self.device).to(torch.float32) * self.spec.scale
        return ((scaled - self._mean) / self._std).to(self.dtype)

    def _encode_prompt(self, prompt: str, image_id: int) -> Tensor:
        text = self.tokenizer(prompt).input_ids
        ids = [image_id] * self.model.config.num_query_tokens + text
        return torch.tensor([ids], dtype=torch.long, device=self.device)

    def _prompt_length(self) -> int:
        queries = self.model.config.num_query_tokens
        return self.prompt_ids_P.shape[1] if self.prompt_ids_P is not None else queries + 1  # +1: the start token

    def _check_room(self, directory: Path) -> None:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and self._prompt_length() + self.max_new_tokens > limit:
            raise UserError(
                f"caption.max_new_tokens: {self.max_new_tokens} new tokens do not fit; {directory} has {limit} positions and "
                f"the image and prompt take {self._prompt_length()}"
            )


def _load_model(directory: Path, dtype: torch.dtype) -> Any:
    """Transformers fills weights it does not find with random numbers and only prints a report; here that is an error."""
    loaded: Any = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    model, info = loaded
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UserError(f"{directory}: its weights do not fit its configuration; missing {', '.join(lost[:3])}{more}")
    return model
