"""Torch resizes as Pillow does, but for the last bits."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipelines.blip2.pixels import PixelSpec
from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError

from ..tiny_blip2 import picture

PILLOW = PixelSpec(112, 96, Image.Resampling.BICUBIC, 1 / 255, (0.5,) * 3, (0.5,) * 3, "pillow")
TORCH = replace(PILLOW, resize="torch")


@pytest.mark.parametrize("filter", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("size", [(40, 30), (96, 112), (300, 200), (1600, 900), (700, 50)])
def test_torch_differs_in_few_bytes_by_little(size: tuple[int, int], filter: int) -> None:
    """Smaller, larger, of another shape; noise is the hardest, and a picture of one colour stays one."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    for shown in (noise, drawn(size)):
        torch, pillow = (replace(spec, resample=filter).pixels(shown).astype(int) for spec in (TORCH, PILLOW))
        assert torch.shape == pillow.shape == (3, 112, 96) and pillow.std() > 0
        assert np.abs(torch - pillow).max() <= 2
        assert (torch != pillow).mean() < 0.02
    assert (TORCH.pixels(Image.new("RGB", size, (10, 200, 30))) == np.array([10, 200, 30]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("size", [(300, 400), (480, 640), (150, 900)])
def test_tall_pictures_differ_in_more_bytes_by_as_little(size: tuple[int, int]) -> None:
    """Where Pillow begins with the columns, roundings between the passes are others."""
    torch, pillow = (spec.pixels(drawn(size)).astype(int) for spec in (TORCH, PILLOW))
    assert np.abs(torch - pillow).max() <= 2
    assert np.abs(torch - pillow).mean() < 0.25


def drawn(size: tuple[int, int]) -> Image.Image:
    return Image.open(io.BytesIO(picture(7, size))).convert("RGB")


def test_filters_that_torch_lacks_are_pillows() -> None:
    torch, pillow = (
        replace(spec, resample=Image.Resampling.LANCZOS).pixels(drawn((80, 60))) for spec in (TORCH, PILLOW)
    )
    assert (torch == pillow).all()


def test_who_resizes_decides_captions() -> None:
    """It stands in the fingerprint; what earlier versions did is what a run with Pillow does."""
    assert CaptionConfig().decides()["resize"] == "torch"
    assert "resize" not in CaptionConfig(resize="pillow").decides()
    with pytest.raises(UserError, match=r"caption\.resize must be torch or pillow, not 'cv2'"):
        CaptionConfig(resize="cv2")
