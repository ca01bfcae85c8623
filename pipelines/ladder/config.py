"""The `forecast` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.errors import UserError


@dataclass
class ForecastConfig:
    """How a recipe is tried in small.

    Attributes:
        rungs: parts of the rows: 16 is a sixteenth of them. The largest part of the rows is drawn and captioned once,
            the others are parts of it.
        confidence: of the interval, which is for what one run of the whole recipe will measure.
        seed: of the choice of rows, and of the drawings behind the interval.
    """

    rungs: list[int] = field(default_factory=lambda: [16, 8, 4])
    confidence: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if len(set(self.rungs)) < 3 or min(self.rungs) < 2:
            raise UserError(f"forecast.rungs: three different parts or more, each 2 or more, not {self.rungs}")
        if not 0.5 <= self.confidence < 1:
            raise UserError("forecast.confidence lies between 0.5 and 1")
