"""POPE (Li et al. 2023, arXiv:2305.10355): is this object in the picture? Yes or no, for objects drawn at random,
popular ones, and those that often stand beside what is there.

Annotations: a file of lines `{"question_id", "image", "text", "label"}` such as `coco_pope_popular.json`, or a folder
with several, whose kinds are the last word of their names. Pictures are COCO's, by their file names.

Answers: `predictions.jsonl`, captune's own; for each file of questions `answers_KIND.json`, lines of `{"question",
"answer"}` in its order, which the authors' `evaluate.py` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.evaluate.answers import read_answers, read_lines, write_answers, write_lines
from pipelines.evaluate.benchmark import INSTRUCTION, Prediction, Question

if TYPE_CHECKING:
    from pipelines.evaluate.config import EvaluateConfig

TITLE = "POPE"
SUBMISSION = ""
_KEYS = ("question_id", "image", "text", "label")


def questions(config: EvaluateConfig) -> list[Question]:
    """Of the file, or of all files in the folder.

    Raises:
        UserError: nothing there, not this layout, or `ocr_tokens`, which POPE does not have.
    """
    if config.ocr_tokens:
        raise UserError("evaluate.ocr_tokens: POPE has no OCR tokens")
    place = Path(config.annotations)
    files = sorted(place.glob("*pope*.json")) if place.is_dir() else [place] if place.is_file() else []
    if not files:
        raise UserError(f"{place}: no file of POPE questions (such as coco_pope_popular.json), and no folder with some")
    return [question for file in files for question in _of_file(file, several=len(files) > 1)]


def conditions(config: EvaluateConfig) -> str:
    """What `yes` is."""
    return "an answer is no when its first sentence holds the word no, No or not, else yes"


def image_path(images: Path, image_id: str) -> Path:
    """By file name."""
    return images / image_id


def says_yes(answer: str) -> bool:
    """How the authors' `evaluate.py` reads an answer."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def score(questions: Sequence[Question], predictions: dict[str, Prediction]) -> list[float]:
    """1.0 for the right one of yes and no."""
    return [float(_right(question, predictions[question.id])) for question in questions]


def figures(questions: Sequence[Question], predictions: dict[str, Prediction]) -> dict[str, float]:
    """Precision, recall and F1 of yes, and the share of yes, as the authors report them: over all questions, and F1 of
    each kind. A failed request counts as the wrong answer.
    """
    found = _figures(questions, predictions)
    kinds = dict.fromkeys(question.kind for question in questions)
    for kind in kinds if len(kinds) > 1 else ():
        of_kind = [question for question in questions if question.kind == kind]
        found[f"F1 of {kind}"] = _figures(of_kind, predictions)["F1"]
    return found


def write_predictions(
    directory: Path,
    config: EvaluateConfig,
    questions: Sequence[Question],
    predictions: dict[str, Prediction],
    model: str,
) -> None:
    """Captune's file, and one for each kind."""
    write_answers(directory, questions, predictions)
    for kind in dict.fromkeys(question.kind for question in questions):
        rows = [{"question": q.text, "answer": predictions[q.id].text} for q in questions if q.kind == kind]
        write_lines(directory / f"answers_{kind}.json", rows)


def read_predictions(path: Path, questions: Sequence[Question]) -> dict[str, Prediction]:
    """From captune's file, or from the authors' answers to one kind: in the order of its questions, without ids."""
    given = iter(questions)

    def resolve(row: dict[str, object], found: dict[str, Prediction]) -> str | None:
        return next(given, questions[-1]).id if "question_id" not in row else None

    return read_answers(path, questions, resolve)


def _figures(questions: Sequence[Question], predictions: dict[str, Prediction]) -> dict[str, float]:
    pairs = []
    for question in questions:
        is_yes = question.answers[0] == "yes"
        pairs.append((is_yes, is_yes == _right(question, predictions[question.id])))
    said, true = sum(yes for _, yes in pairs), sum(is_yes for is_yes, _ in pairs)
    both = sum(is_yes and yes for is_yes, yes in pairs)
    precision, recall = both / said if said else 0.0, both / true if true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"precision": precision, "recall": recall, "F1": f1, "yes": said / len(pairs)}


def _right(question: Question, said: Prediction) -> bool:
    return not said.error and says_yes(said.text) == (question.answers[0] == "yes")


def _of_file(path: Path, several: bool) -> list[Question]:
    kind = path.stem.rpartition("_")[2]
    found: dict[str, Question] = {}
    for row, entry in enumerate(read_lines(path)):
        _require(entry, f"{path}: line {row + 1}")
        key = f"{kind}/{entry['question_id']}" if several else str(entry["question_id"])
        if key in found:
            raise UserError(f"{path}: question_id {key} occurs twice")
        prompt = f"{entry['text']}\n{INSTRUCTION}"
        found[key] = Question(key, entry["image"], entry["text"], prompt, (entry["label"],), kind)
    if not found:
        raise UserError(f"{path}: holds no questions")
    return list(found.values())


def _require(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not an object")
    for key in _KEYS:
        if key not in entry:
            raise UserError(f"{where}: lacks '{key}'")
    if entry["label"] not in ("yes", "no"):
        raise UserError(f"{where}: label is '{entry['label']}', not yes or no")
