from __future__ import annotations

import io
from collections.abc import Callable

import pytest


@pytest.fixture
def jpeg() -> Callable[[int], bytes]:
    """A small real JPEG, different for every number."""
    from PIL import Image

    def make(seed: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (24 + seed, 20), (seed * 40 % 256, 90, 200)).save(stream, "JPEG")
        return stream.getvalue()

    return make
