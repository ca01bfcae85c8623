"""A tiny random MGM that answers different things to different questions, and one Ray cluster for the module that
needs it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random MGM (0.1M parameters) with a byte-level tokenizer and the Gemma chat template."""
    import torch

    from tests.pipelines.tiny_mgm import write_model

    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("tiny") / "mgm", spread=0.6)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA and projector, trained for three steps on that model."""
    from tests.pipelines.tiny_mgm import train_adapter, write_instructions

    root = tmp_path_factory.mktemp("adapter")
    return train_adapter(tiny_model, write_instructions(root / "instruct.json"), root / "adapter")


@pytest.fixture(scope="session")
def picture() -> Callable[[int], bytes]:
    """JPEG bytes of a seeded noise picture; sizes and colours differ from seed to seed."""

    def make(seed: int) -> bytes:
        import numpy as np
        from PIL import Image

        random = np.random.default_rng(seed)
        height, width = random.integers(40, 90, size=2)
        pixels = random.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((int(width), int(height))).save(stream, "JPEG", quality=95)
        return stream.getvalue()

    return make


@pytest.fixture(scope="session")
def data_url() -> Callable[[bytes], str]:
    """`data:` URL of encoded picture bytes."""
    return lambda data: "data:image/jpeg;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="session")
def chat_body(data_url: Callable[[bytes], str]) -> Callable[..., dict[str, Any]]:
    """A valid request body; keyword arguments replace or add fields."""

    def make(text: str = "What is this?", *images: bytes, **fields: Any) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        return {"model": "captune", "messages": [message], "temperature": 0, "max_tokens": 8} | fields

    return make
