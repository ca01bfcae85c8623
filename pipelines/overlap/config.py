"""The `overlap` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.errors import UserError
from pipelines.overlap.fingerprint import BITS


@dataclass
class OverlapConfig:
    """When a row's picture counts as a benchmark's, and its text as a question's.

    Attributes:
        distance: of `fingerprint.BITS` bits of the perceptual hash so many may differ; the hash alone is fooled by
            pictures of like brightness, so it only chooses what is looked at closer.
        correlation: least correlation of both pictures at 32 by 32 pixels, colours included. Rescaled and recompressed
            copies have 0.97 and more; of the sample world's drawn scenes no two different ones have 0.90.
        words: words in a row that a text must share with a question; a question of fewer counts as a whole from five.
    """

    distance: int = 12
    correlation: float = 0.95
    words: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.distance < BITS // 2:
            raise UserError(f"overlap.distance is a number of bits from 0 to {BITS // 2 - 1}, not {self.distance}")
        if not 0 < self.correlation <= 1:
            raise UserError(f"overlap.correlation is a number above 0 and up to 1, not {self.correlation:g}")
        if self.words < 1:
            raise UserError(f"overlap.words must be at least 1, not {self.words}")
