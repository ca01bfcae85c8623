"""TextVQA v0.5.1 (Singh et al., 2019): its files, the prompt that published scores were measured with, and its score.

Annotations: `TextVQA_0.5.1_*.json`, `{"data": [{"question_id", "question", "image_id", "answers": [ten], ...}]}`;
    pictures are
`<image_id>.jpg`. OCR tokens come with the entries (`ocr_tokens`) or from `TextVQA_Rosetta_OCR_v0.2_*.json`.

Predictions, three files with the same answers, each of which `read_predictions` reads back:

- `predictions.jsonl`: captune's own.
- `predictions_llava.jsonl`: the lines that the `eval_textvqa.py` of LLaVA and MGM reads; there `question_id` is the
  picture's id.
- `predictions_official.json`: the challenge's submission, `[{"question_id", "answer"}]`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.evaluate.answers import number, read_answers, write_answers, write_lines
from pipelines.evaluate.benchmark import INSTRUCTION, Prediction, Question
from pipelines.evaluate.metrics import ANSWERS, soft_score
from pipelines.manifest import read_json, write_json

if TYPE_CHECKING:
    from pipelines.evaluate.config import EvaluateConfig

TITLE = "TextVQA"
SUBMISSION = "predictions_official.json"
OCR_HINT = "Reference OCR token: "


def questions(config: EvaluateConfig) -> list[Question]:
    """`load`, as a recipe says it."""
    return load(config.annotations, ocr_tokens=config.ocr_tokens, ocr=config.ocr or None)


def conditions(config: EvaluateConfig) -> str:
    """OCR tokens alone move the published scores by about 13 points."""
    return f"reference OCR tokens {'were' if config.ocr_tokens else 'were not'} in the prompt"


def load(annotations: Path | str, *, ocr_tokens: bool = False, ocr: Path | str | None = None) -> list[Question]:
    """Questions in the order of the annotation file.

    Args:
        ocr_tokens: put them into the prompt.
        ocr: the Rosetta file, when the entries themselves hold no `ocr_tokens`.

    Raises:
        UserError: no such file, not this layout, a question without its ten answers, an id twice; the question is
            named.
    """
    path = Path(annotations)
    entries = entries_of(path)
    rosetta = rosetta_of(Path(ocr)) if ocr and ocr_tokens else {}
    questions: dict[str, Question] = {}
    for row, entry in enumerate(entries):
        question = _question(entry, f"{path}: data[{row}]")
        if question.id in questions:
            raise UserError(f"{path}: data[{row}]: question_id {question.id} occurs twice")
        tokens = _tokens(entry, rosetta, path, question) if ocr_tokens else None
        questions[question.id] = Question(**{**vars(question), "prompt": prompt(question.text, tokens)})
    return list(questions.values())


def prompt(question: str, ocr_tokens: Sequence[str] | None = None) -> str:
    """What is asked, as in `llava_textvqa_val_v051_ocr.jsonl`, which published scores come from: the question begins
    with a capital, which the annotations lack, and with OCR tokens there is a line for them even when the picture has
    none.
    """
    hint = "" if ocr_tokens is None else f"\n{OCR_HINT}{', '.join(ocr_tokens)}"
    return f"{question[:1].upper()}{question[1:]}{hint}\n{INSTRUCTION}"


def image_path(images: Path, image_id: str) -> Path:
    """`<image_id>.jpg`."""
    return images / f"{image_id}.jpg"


def figures(questions: Sequence[Question], predictions: dict[str, Prediction]) -> dict[str, float]:
    """None but the score."""
    return {}


def score(questions: Sequence[Question], predictions: dict[str, Prediction]) -> list[float]:
    """Soft score of every question, in [0, 1].

    Raises:
        UserError: a question without its ten answers, as in a split whose answers are withheld.
    """
    scores = []
    for question in questions:
        if len(question.answers) != ANSWERS:
            raise UserError(
                f"question_id {question.id}: {len(question.answers)} answers where TextVQA's score needs {ANSWERS}"
            )
        said = predictions[question.id]
        scores.append(0.0 if said.error else soft_score(said.text, question.answers))
    return scores


def write_predictions(
    directory: Path,
    config: EvaluateConfig,
    questions: Sequence[Question],
    predictions: dict[str, Prediction],
    model: str,
) -> None:
    """Write the three files; each appears whole or not at all."""
    llava, official = [], []
    for question in questions:
        said = predictions[question.id]
        failing = {"error": said.error, "truncated": said.truncated}
        llava.append(
            {
                "question_id": question.image_id,
                "prompt": question.prompt,
                "text": said.text,
                "answer_id": question.id,
                "model_id": model,
                "metadata": {key: value for key, value in failing.items() if value},
            }
        )
        official.append({"question_id": number(question.id), "answer": said.text})
    write_answers(directory, questions, predictions)
    write_lines(directory / "predictions_llava.jsonl", llava)
    write_json(directory / SUBMISSION, official)


def read_predictions(path: Path | str, questions: Sequence[Question]) -> dict[str, Prediction]:
    """Answers by question id, from any of the three files.

    Raises:
        UserError: not such a file, an answer to no question, a question answered twice or not at all (the ids are
            named).
    """
    by_image: dict[tuple[str, str], list[str]] = defaultdict(list)
    for question in questions:
        by_image[question.image_id, question.text.lower()].append(question.id)
    return read_answers(path, questions, lambda row, found: _resolve(row, by_image, found))


def _resolve(
    entry: dict[str, Any], by_image: dict[tuple[str, str], list[str]], found: dict[str, Prediction]
) -> str | None:
    """Question id of a LLaVA line, which names the picture and carries the question inside its prompt; None for other
    lines. Questions annotated twice for one picture are taken in their order.
    """
    if "prompt" not in entry or "image_id" in entry:
        return None
    lines = str(entry["prompt"]).split("\n")
    question = lines[1] if len(lines) == 3 and lines[0].startswith(OCR_HINT.rstrip()) else lines[0]
    ids = by_image.get((str(entry["question_id"]), question.lower()), [])
    return next((key for key in ids if key not in found), ids[0] if ids else None)


def entries_of(path: Path) -> list[Any]:
    """The list `data` of a file of TextVQA, its OCR tokens or TextCaps.

    Raises:
        UserError: no such file, or not this layout.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such annotation file")
    content = read_json(path)
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: not in the TextVQA_0.5.1 layout (an object with a non-empty list 'data')")
    return entries


def _question(entry: Any, where: str) -> Question:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not an object")
    for key in ("question_id", "question", "image_id"):
        if key not in entry:
            raise UserError(f"{where}: lacks '{key}'")
    answers = entry.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: 'answers' of question_id {entry['question_id']} must be a list of texts")
    if answers and len(answers) != ANSWERS:
        raise UserError(f"{where}: question_id {entry['question_id']} has {len(answers)} answers, not {ANSWERS}")
    return Question(str(entry["question_id"]), str(entry["image_id"]), str(entry["question"]), "", tuple(answers))


def rosetta_of(path: Path) -> dict[str, list[str]]:
    """Picture -> OCR tokens."""
    return {str(entry["image_id"]): entry["ocr_tokens"] for entry in entries_of(path) if "ocr_tokens" in entry}


def _tokens(entry: dict[str, Any], rosetta: dict[str, list[str]], path: Path, question: Question) -> list[str]:
    tokens = entry.get("ocr_tokens", rosetta.get(question.image_id))
    if tokens is None:
        raise UserError(
            f"{path}: question_id {question.id} has no 'ocr_tokens'; name the Rosetta file with evaluate.ocr, "
            "or set evaluate.ocr_tokens to false"
        )
    return [str(token) for token in tokens]
