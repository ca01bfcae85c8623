"""VQA v2 (Goyal et al. 2017, arXiv:1612.00837): its files, LLaVA's prompt, and the official score.

Annotations: the file of questions, `v2_OpenEnded_mscoco_val2014_questions.json`; the answers of ten people lie beside
it in `v2_mscoco_val2014_annotations.json`. Pictures: `COCO_val2014_000000000042.jpg`, after the split that the file of
questions names (`data_subtype`); those of test-dev are of test2015.

Answers: `predictions.jsonl`, captune's own; `vqav2_results.json`, `[{"question_id", "answer"}]`, which the official
evaluation takes; and of a split whose answers are withheld `vqav2_submission.json`, made as LLaVA's
`convert_vqav2_for_submission.py` makes it for the server: answers normalized, and where the file of questions of
test2015 lies beside that of test-dev, its other questions answered with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.evaluate.answers import number, read_answers, write_answers
from pipelines.evaluate.benchmark import INSTRUCTION, Prediction, Question
from pipelines.evaluate.metrics import normalize, vqa_score
from pipelines.manifest import read_json, write_json

if TYPE_CHECKING:
    from pipelines.evaluate.config import EvaluateConfig

TITLE = "VQAv2"
SUBMISSION = "vqav2_submission.json"
_TEST, _TEST_DEV = "test2015", "test-dev2015"


def questions(config: EvaluateConfig) -> list[Question]:
    """In the order of the file of questions; those of a split whose answers are withheld have none.

    Raises:
        UserError: no such files, not this layout, a question without its answers (but of a test split, where all are
            withheld), an id twice, or `ocr_tokens`.
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
    if not answers and not split.startswith("test"):
        raise UserError(f"{answers_of(path)}: the answers to the questions of {split} belong there, beside {path.name}")
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
        picture = f"COCO_{_TEST if split == _TEST_DEV else split}_{entry['image_id']:012d}.jpg"
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
    """The official score of every question, in [0, 1]."""
    said = [predictions[question.id] for question in questions]
    return [0.0 if it.error else vqa_score(it.text, q.answers) for q, it in zip(questions, said, strict=True)]


def figures(questions: Sequence[Question], predictions: dict[str, Prediction]) -> dict[str, float]:
    """None but the score; the kinds of answers (yes/no, number, other) are kinds of questions here."""
    return {}


def write_predictions(
    directory: Path,
    config: EvaluateConfig,
    questions: Sequence[Question],
    predictions: dict[str, Prediction],
    model: str,
) -> None:
    """Captune's file, and the official one or two."""
    write_answers(directory, questions, predictions)
    results = [{"question_id": number(q.id), "answer": predictions[q.id].text} for q in questions]
    write_json(directory / "vqav2_results.json", results)
    if not any(question.answers for question in questions):
        said = {str(entry["question_id"]): normalize(str(entry["answer"])) for entry in results}
        ids = dict.fromkeys([*_whole_test(Path(config.annotations)), *said])
        write_json(directory / SUBMISSION, [{"question_id": number(key), "answer": said.get(key, "")} for key in ids])


def read_predictions(path: Path, questions: Sequence[Question]) -> dict[str, Prediction]:
    """From either file."""
    return read_answers(path, questions)


def _whole_test(path: Path) -> list[str]:
    """Ids of all questions of test2015, where `path` is of test-dev and theirs lies beside it: the server wants all."""
    whole = path.with_name(path.name.replace(_TEST_DEV, _TEST))
    if whole == path or not whole.is_file():
        return []
    return [str(entry["question_id"]) for entry in read_json(whole)["questions"]]


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
