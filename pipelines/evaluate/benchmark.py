"""What every benchmark gives to the stage: questions to ask, and scores for what came back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.evaluate.config import EvaluateConfig


INSTRUCTION = "Answer the question using a single word or phrase."
"""LLaVA's words for benchmarks with short answers, with which their published scores were measured."""


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: the benchmark's own id, as text.
        image_id: the benchmark's own name of the picture.
        text: the question as annotated.
        prompt: what the model is asked, instructions included.
        answers: what humans answered; empty in a split whose answers are withheld.
        kind: the benchmark's own name of the kind of question; empty where it has none.
        family: its name of the larger kind that this kind belongs to.
        options: what can be chosen, in the order of their letters; empty where anything may be said.
        copy_of: id of the question that this one asks again in another form. Its answer counts with that one's.
    """

    id: str
    image_id: str
    text: str
    prompt: str
    answers: tuple[str, ...]
    kind: str = ""
    family: str = ""
    options: tuple[str, ...] = ()
    copy_of: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a model said to one question, or why it said nothing.

    Attributes:
        error: why there is no answer.
        truncated: the answer reached the token limit before its end.
        system_fingerprint: what the service called itself when it answered, where it does.
    """

    id: str
    text: str
    error: str | None = None
    truncated: bool = False
    system_fingerprint: str | None = None


class Benchmark(Protocol):
    """A benchmark is a module with these names, and a line in the registry; nothing else knows of it.

    A setting of `EvaluateConfig` that it cannot honour (`ocr_tokens` where there are none) it refuses with `UserError`.
    """

    TITLE: str
    """As its authors write it."""
    SUBMISSION: str
    """Of its files of answers the one that its own server takes; empty where all scoring is done at home."""

    def questions(self, config: EvaluateConfig) -> list[Question]:
        """Questions in the order of `config.annotations`.

        Raises:
            UserError: no such file, or not this benchmark's layout; file and question are named.
        """

    def conditions(self, config: EvaluateConfig) -> str:
        """Half a sentence on what a score must be read with, such as whether the prompt held reference OCR tokens."""

    def image_path(self, images: Path, image_id: str) -> Path:
        """Where a picture lies (see `picture_path`, which asks this)."""

    def score(self, questions: Sequence[Question], predictions: dict[str, Prediction]) -> list[float]:
        """Score of each question that is no copy in [0, 1], in their order; the benchmark's score is their mean. A
        failed request scores 0 whatever its text.
        """

    def figures(self, questions: Sequence[Question], predictions: dict[str, Prediction]) -> dict[str, float]:
        """What the benchmark's authors report besides the score (name -> share in [0, 1]); empty where nothing."""

    def write_predictions(
        self,
        directory: Path,
        config: EvaluateConfig,
        questions: Sequence[Question],
        predictions: dict[str, Prediction],
        model: str,
    ) -> None:
        """Write the answers in the benchmark's own formats, each file whole or not at all."""

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> dict[str, Prediction]:
        """Answers by question id, from any of those formats.

        Raises:
            UserError: not such a file, or not one answer to every question.
        """


@runtime_checkable
class CarriesPictures(Protocol):
    """What a benchmark has besides, whose annotations hold the pictures themselves."""

    def unpack(self, config: EvaluateConfig, folder: Path) -> None:
        """Write them there, each whole or not at all, where `image_path` looks for them."""


def picture_path(benchmark: Benchmark, images: Path | str, image_id: str) -> Path:
    """A question's picture, which must lie in `images`: whoever wrote the annotations shall not choose which other
    files of this machine are sent to an endpoint.

    Raises:
        UserError: the name leads out of `images`.
    """
    folder = Path(os.path.abspath(images))
    path = Path(os.path.abspath(benchmark.image_path(folder, image_id)))
    if folder not in path.parents:
        raise UserError(f"{images}: the annotations name picture '{image_id}', which lies outside of this directory")
    return path
