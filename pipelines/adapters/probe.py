"""One small batch with and without an image, on which two models are compared or a model is looked at."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.mgm.load import load_processor

__all__ = ["QUESTION", "batch", "load_processor", "logits", "noise_image"]

QUESTION = "What does the sign say?"


def noise_image(seed: int, side: int = 96) -> Any:
    """A picture of coloured noise, wider than high."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch(processor: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs of two rows: a question about an image, and a question alone."""
    image = {"type": "image", "image": noise_image(seed)}
    question = {"type": "text", "text": QUESTION}
    return dict(
        processor.apply_chat_template(
            [[{"role": "user", "content": [image, question]}], [{"role": "user", "content": [question]}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    )


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Float32 logits of the tokens that are no padding: (tokens, vocabulary)."""
    model.eval()
    result: torch.Tensor = model(**inputs, use_cache=False).logits.float()
    return result[inputs["attention_mask"].bool()]
