"""The `sample` section of a recipe: where the embedded sample world is drawn, and how large."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.errors import UserError


@dataclass
class SampleConfig:
    """The embedded dataset.

    Attributes:
        out: directory to draw it into before the first stage; None when the recipe brings its own data.
        pairs: image-text pairs with poor captions.
        instructions: instruction samples.
        questions: validation questions.
        seed: the same seed gives the same bytes.
    """

    out: str | None = None
    pairs: int = 1000
    instructions: int = 400
    questions: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("pairs", "instructions", "questions"):
            if getattr(self, key) < 1:
                raise UserError(f"sample.{key} must be at least 1, not {getattr(self, key)}")
