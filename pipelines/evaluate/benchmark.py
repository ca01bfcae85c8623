"""What every benchmark gives to the stage: questions to ask, and scores for what came back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: the benchmark's own id, as text.
        image_id: the benchmark's own name of the picture.
        text: the question as annotated.
        prompt: what the model is asked, instructions included.
        answers: what humans answered; empty in a split whose answers are withheld.
    """

    id: str
    image_id: str
    text: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """What a model said to one question, or why it said nothing."""

    id: str
    text: str
    error: str | None = None
