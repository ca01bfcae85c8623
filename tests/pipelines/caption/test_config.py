"""What `auto` comes to, and that a run's identity knows it."""

from __future__ import annotations

import pytest

from pipelines.caption.config import CaptionConfig
from pipelines.caption.sizing import rows_per_batch
from pipelines.errors import UserError


def test_auto_is_what_the_device_is_good_at() -> None:
    """Without a card as ever; with one bfloat16, which decides captions, and more at once, which decides none."""
    alone, card = CaptionConfig(), CaptionConfig(gpus_per_actor=1)
    assert (alone.slots_on("cpu"), alone.dtype_on("cpu")) == (32, "float32")
    assert (card.slots_on("cuda"), card.dtype_on("cuda")) == (256, "bfloat16")
    assert alone.decides() == CaptionConfig(dtype="float32", batch_size=7).decides()
    assert card.decides() == CaptionConfig(gpus_per_actor=1, dtype="bfloat16").decides() != alone.decides()
    assert CaptionConfig(gpus_per_actor=1, products="fp8").decides()["dtype"] == "bfloat16"


def test_what_is_said_stands() -> None:
    card = CaptionConfig(gpus_per_actor=1, batch_size=48, dtype="float16")
    assert (card.slots_on("cuda"), card.dtype_on("cuda")) == (48, "float16")
    assert rows_per_batch(card, 1, 1e12) == 96 and rows_per_batch(CaptionConfig(), 1, 1e12) == 64
    with pytest.raises(UserError, match=r"caption\.dtype must be auto, float32, bfloat16 or float16, not 'int8'"):
        CaptionConfig(dtype="int8")
    with pytest.raises(UserError, match=r"caption\.batch_size must be at least 1, not 0"):
        CaptionConfig(batch_size=0)
