"""VQA v2 (Goyal et al. 2017, arXiv:1612.00837): its files, LLaVA's prompt, and the official score.

Annotations: the file of questions, `v2_OpenEnded_mscoco_val2014_questions.json`; the answers of ten people lie beside
it in `v2_mscoco_val2014_annotations.json`. Pictures: `COCO_val2014_000000000042.jpg`, after the split that the file of
questions names (`data_subtype`).

Answers: `predictions.jsonl`, captune's own, and `vqav2_results.json`, `[{"question_id", "answer"}]`, which the official
evaluation and its server take.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.evaluate.answers import number, read_answers, write_answers
from pipelines.evaluate.benchmark import INSTRUCTION, Prediction, Question
from pipelines.evaluate.metrics import vqa_score
from pipelines.manifest import read_json, write_json

if TYPE_CHECKING:
    from pipelines.evaluate.config import EvaluateConfig

TITLE = "VQAv2"


def questions(config: EvaluateConfig) -> list[Question]:
    """In the order of the file of questions; those of a split whose answers are withheld have none.

    Raises:
        UserError: no such files, not this layout, a question without its answers, an id twice, or `ocr_tokens`.
    """
    if config.ocr_tokens:
        raise UserError("evaluate.ocr_tokens: VQAv2 has no OCR tokens")
    path = Path(config.annotations)
    if not path.is_file():
        raise UserError(f"{path}: no such file of questions")
    content = read_json(path)
    split = content.get("data_subtype") if isinstance(content, dict) else None
    entries = content.get("questions") if isinstance(content, dict) else None
    if isinstance(content, dict) and "annotations" in content and entries is None:
        raise UserError(f"{path}: holds answers; name the file of questions beside it (v2_OpenEnded_...)")
    if not isinstance(entries, list) or not entries or not isinstance(split, str):
        raise UserError(f"{path}: not in VQA's layout (an object with 'data_subtype' and a list 'questions')")
    answers, found = _answers(answers_of(path)), {}
    for row, entry in enumerate(entries):
        where = f"{path}: questions[{row}]"
        if not isinstance(entry, dict) or not entry.keys() >= {"question_id", "image_id", "question"}:
            raise UserError(f"{where}: needs 'question_id', 'image_id' and 'question'")
        if not isinstance(entry["image_id"], int):
            raise UserError(f"{where}: image_id is {entry['image_id']!r}, and COCO's are whole numbers")
        key, text = str(entry["question_id"]), str(entry["question"])
        if key in found:
            raise UserError(f"{where}: question_id {key} occurs twice")
        if answers and key not in answers:
            raise UserError(f"{answers_of(path)}: question_id {key} has no answers")
        kind, said = answers.get(key, ("", ()))
        picture = f"COCO_{split}_{entry['image_id']:012d}.jpg"
        found[key] = Question(key, picture, text, f"{text}\n{INSTRUCTION}", said, kind)
    return list(found.values())


def answers_of(path: Path) -> Path:
    """The file of answers that belongs to a file of questions, by the names that both are published under."""
    return path.with_name(path.name.replace("OpenEnded_", "").replace("_questions", "_annotations"))


def conditions(config: EvaluateConfig) -> str:
    """How it is scored."""
    return "scored as by VQA's own evaluator"


def image_path(images: Path, image_id: str) -> Path:
    """By file name."""
    return images / image_id


def score(questions: Sequence[Question], predictions: dict[str, Prediction]) -> list[float]:
    """The official score of every question, in [0, 1].

    Raises:
        UserError: a question without answers: the split withholds them, or their file is not there.
    """
    if bare := next((question.id for question in questions if not question.answers), None):
        raise UserError(
            f"question_id {bare} has no answers: the split withholds them, or v2_mscoco_..._annotations.json is not "
            "beside the file of questions"
        )
    said = [predictions[question.id] for question in questions]
    return [0.0 if it.error else vqa_score(it.text, q.answers) for q, it in zip(questions, said, strict=True)]


def figures(questions: Sequence[Question], predictions: dict[str, Prediction]) -> dict[str, float]:
    """None but the score; the kinds of answers (yes/no, number, other) are kinds of questions here."""
    return {}


def write_predictions(
    directory: Path, questions: Sequence[Question], predictions: dict[str, Prediction], model: str
) -> None:
    """Captune's file, and the official one."""
    write_answers(directory, questions, predictions)
    results = [{"question_id": number(q.id), "answer": predictions[q.id].text} for q in questions]
    write_json(directory / "vqav2_results.json", results)


def read_predictions(path: Path, questions: Sequence[Question]) -> dict[str, Prediction]:
    """From either file."""
    return read_answers(path, questions)


def _answers(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Question id -> its kind, and what people answered; empty where there is no such file."""
    if not path.is_file():
        return {}
    content: Any = read_json(path)
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path}: not in VQA's layout (an object with a list 'annotations')")
    found = {}
    for row, entry in enumerate(entries):
        try:
            said = tuple(str(answer["answer"]) for answer in entry["answers"])
            found[str(entry["question_id"])] = (str(entry["answer_type"]), said)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: annotations[{row}]: needs question_id, answer_type, answers ({error})") from error
    return found
