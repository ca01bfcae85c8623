"""The engine says exactly what BLIP-2 says, and refuses a directory that is no complete BLIP-2."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.caption.config import CaptionConfig
from pipelines.caption.engine import BlipCaptioner
from pipelines.errors import UserError

from .conftest import make_blip2, picture


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    sizes = [(80, 60), (31, 97), (32, 32), (400, 20), (5, 5), (200, 300)]
    return [Image.open(io.BytesIO(picture(seed, size))).convert("RGB") for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("prompt", ["", "a red"])
def test_equals_plain_generate(blip2: Path, photos: list[Image.Image], prompt: str) -> None:
    """uint8 pixels, own normalization and batching change no token against processor + `generate`, with and without a prompt."""
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    engine = BlipCaptioner(blip2, CaptionConfig(prompt=prompt, max_new_tokens=12))
    processor = Blip2Processor.from_pretrained(blip2)
    model = Blip2ForConditionalGeneration.from_pretrained(blip2).eval()
    inputs = processor(images=photos, text=[prompt] * len(photos) if prompt else None, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)

    pixels = engine.preprocess(photos)
    assert pixels.dtype == np.uint8 and pixels.shape == (6, 3, 32, 32)
    torch.testing.assert_close(engine.normalize(torch.from_numpy(pixels)), inputs["pixel_values"], atol=1e-6, rtol=0)
    prefix = inputs["input_ids"].shape[1] if prompt else 5
    assert torch.equal(engine.generate(pixels), expected[:, prefix:])
    captions = [row.chosen for row in engine.caption(pixels)]
    assert captions == [text.strip() for text in processor.batch_decode(expected[:, prefix:], skip_special_tokens=True)]
    assert len(set(captions)) > 1, "a model that says the same of everything would prove nothing"
    assert captions == [engine.caption(pixels[i : i + 1])[0].chosen for i in range(6)]


def test_half_precision_and_no_images(blip2: Path, photos: list[Image.Image]) -> None:
    """bfloat16 loads and runs; an empty batch is no error."""
    engine = BlipCaptioner(blip2, CaptionConfig(dtype="bfloat16", max_new_tokens=4))
    assert len(engine.caption(engine.preprocess(photos))) == 6
    assert engine.caption(engine.preprocess([])) == []


def test_incomplete_directories_are_refused_by_name(blip2: Path, tmp_path: Path) -> None:
    """No weights, half the weights, no or the wrong image token, another kind of model, no room: each says so."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(blip2, tmp_path / name))

    def edit(path: Path, **changes: object) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    bare = copy("bare")
    (bare / "model.safetensors").unlink()
    half = copy("half")
    weights = load_file(half / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "qformer" not in k}, half / "model.safetensors", {"format": "pt"})
    other = copy("other")
    edit(other / "config.json", model_type="blip")
    moved = copy("moved")
    edit(moved / "config.json", image_token_index=1)
    nameless = copy("nameless")
    (nameless / "tokenizer.json").unlink()
    cases = [
        (bare, "bare: no weights"),
        (half, "half: its weights do not fit.*qformer"),
        (other, "other: .*'blip' model"),
        (moved, "moved: its tokenizer has '<image>' at id 2, but the model expects it at id 1"),
        (nameless, "nameless: no tokenizer"),
        (make_blip2(tmp_path / "mute", image_token=False), "mute: its tokenizer lacks the image token '<image>'"),
        (tmp_path, "config.json is missing"),
    ]
    for directory, message in cases:
        with pytest.raises(UserError, match=message):
            BlipCaptioner(directory)
    with pytest.raises(UserError, match=r"caption\.max_new_tokens: 60 new tokens do not fit"):
        BlipCaptioner(blip2, CaptionConfig(max_new_tokens=60))
    with pytest.raises(UserError, match=r"caption\.max_new_tokens: 54 new tokens do not fit"):
        BlipCaptioner(blip2, CaptionConfig(max_new_tokens=54, prompt="extraordinarily"))
