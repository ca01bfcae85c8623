"""The `explain` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.errors import UserError

EACH, TOGETHER = "each", "together"


@dataclass
class ExplainConfig:
    """How a gain is split over its causes.

    Attributes:
        arms: that `captune run` explains before it draws the report; `captune explain RUN` asks for the arm itself.
        filters: `each` operator is a cause of its own, or all of them `together` are one: then a run that has an arm
            with captions alone and one with filters alone is explained without training anything.
        budget: coalitions of causes that may be trained, each once for every seed; those that are arms of the run do
            not count. Where it is too small for all coalitions, orders are drawn, and the intervals hold that, too.
        seed: of the drawing.
    """

    arms: list[str] = field(default_factory=list)
    filters: str = EACH
    budget: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.filters not in (EACH, TOGETHER):
            raise UserError(f"explain.filters must be {EACH} or {TOGETHER}, not '{self.filters}'")
        if self.budget < 0:
            raise UserError(f"explain.budget is a number of coalitions to train, not {self.budget}")
