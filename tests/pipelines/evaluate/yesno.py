"""A benchmark in one file, as small as one can be: a line per question, `id|picture|question|yes or no`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import UserError
from pipelines.evaluate.benchmark import Prediction, Question
from pipelines.evaluate.config import EvaluateConfig
from pipelines.files import read_text
from pipelines.manifest import read_json, write_json

TITLE = "Yes & No"
SUBMISSION = ""


def questions(config: EvaluateConfig) -> list[Question]:
    if config.ocr_tokens:
        raise UserError("evaluate.ocr_tokens: there are none in this benchmark")
    rows = [line.split("|") for line in read_text(Path(config.annotations)).splitlines()]
    return [Question(key, picture, text, f"{text}\nYes or no?", (answer,)) for key, picture, text, answer in rows]


def conditions(config: EvaluateConfig) -> str:
    return "only the first word counts"


def image_path(images: Path, image_id: str) -> Path:
    return images / image_id


def score(questions: Sequence[Question], predictions: dict[str, Prediction]) -> list[float]:
    said = [predictions[question.id] for question in questions]
    pairs = zip(questions, said, strict=True)
    return [float(not it.error and it.text.lower().split(" ")[0] == question.answers[0]) for question, it in pairs]


def figures(questions: Sequence[Question], predictions: dict[str, Prediction]) -> dict[str, float]:
    return {}


def write_predictions(
    directory: Path,
    config: EvaluateConfig,
    questions: Sequence[Question],
    predictions: dict[str, Prediction],
    model: str,
) -> None:
    write_json(directory / "predictions.json", {key: said.text for key, said in predictions.items()})


def read_predictions(path: Path, questions: Sequence[Question]) -> dict[str, Prediction]:
    return {key: Prediction(key, text) for key, text in dict(read_json(path)).items()}


def write_files(directory: Path, count: int) -> tuple[Path, Path]:
    """Annotations and pictures, for the tests; the right answer is always yes."""
    images = directory / "pictures"
    images.mkdir()
    for number in range(count):
        (images / f"{number}.png").write_bytes(json.dumps(number).encode())
    lines = "".join(f"q{number}|{number}.png|Is this {number}?|yes\n" for number in range(count))
    (directory / "questions.txt").write_text(lines)
    return directory / "questions.txt", images
