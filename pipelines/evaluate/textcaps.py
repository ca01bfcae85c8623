"""TextCaps v0.1 (Sidorov et al. 2020, arXiv:2003.12462): a caption of a picture in which text matters, scored by
CIDEr-D against five people's.

Annotations: `TextCaps_0.1_val.json`, `{"data": [{"image_id", "caption_str" or "reference_strs", ...}]}`, several
entries a picture; pictures are `<image_id>.jpg`. OCR tokens come from the Rosetta file, as TextVQA's. A caption
takes more tokens than an answer: `max_new_tokens: 64`.

Answers: `predictions.jsonl`, captune's own, and `textcaps_results.json`, `[{"image_id", "caption"}]`, which the
challenge's server takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.evaluate.answers import read_answers, write_answers
from pipelines.evaluate.benchmark import Prediction, Question
from pipelines.evaluate.cider import LARGEST, cider
from pipelines.evaluate.textvqa import OCR_HINT, entries_of, rosetta_of
from pipelines.manifest import write_json

if TYPE_CHECKING:
    from pipelines.evaluate.config import EvaluateConfig

TITLE = "TextCaps"
SUBMISSION = "textcaps_results.json"
PROMPT = "Provide a one-sentence caption for the provided image."
"""LLaVA's words for this data set."""


def questions(config: EvaluateConfig) -> list[Question]:
    """One a picture, in the order in which the file names them first; of a test split, without captions.

    Raises:
        UserError: no such files, not this layout, or a picture without OCR tokens where they are asked for.
    """
    path = Path(config.annotations)
    told: dict[str, list[str]] = {}
    for row, entry in enumerate(entries_of(path)):
        where = f"{path}: data[{row}]"
        if not isinstance(entry, dict) or "image_id" not in entry:
            raise UserError(f"{where}: needs 'image_id'")
        texts = entry.get("reference_strs") or [entry[key] for key in ("caption_str",) if entry.get(key)]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: the captions of picture {entry['image_id']} must be texts")
        key = str(entry["image_id"])
        told[key] = texts if entry.get("reference_strs") else [*told.get(key, []), *texts]
    hints = _hints(config, path, list(told)) if config.ocr_tokens else {}
    return [Question(key, key, PROMPT, f"{PROMPT}{hints.get(key, '')}", tuple(texts)) for key, texts in told.items()]


def conditions(config: EvaluateConfig) -> str:
    """What the score is."""
    ocr = f"reference OCR tokens {'were' if config.ocr_tokens else 'were not'} in the prompt"
    return f"the score is CIDEr-D through its largest value, {LARGEST:g}; {ocr}"


def image_path(images: Path, image_id: str) -> Path:
    """`<image_id>.jpg`."""
    return images / f"{image_id}.jpg"


def score(questions: Sequence[Question], predictions: dict[str, Prediction]) -> list[float]:
    """CIDEr-D of every caption through 10, in [0, 1]."""
    said = [predictions[question.id] for question in questions]
    found = cider(["" if it.error else it.text for it in said], [question.answers for question in questions])
    return [min(value / LARGEST, 1.0) for value in found]


def figures(questions: Sequence[Question], predictions: dict[str, Prediction]) -> dict[str, float]:
    """CIDEr as papers report it, per cent of 1."""
    values = score(questions, predictions)
    return {"CIDEr": LARGEST * sum(values) / len(values)}


def write_predictions(
    directory: Path,
    config: EvaluateConfig,
    questions: Sequence[Question],
    predictions: dict[str, Prediction],
    model: str,
) -> None:
    """Captune's file, and the challenge's."""
    write_answers(directory, questions, predictions)
    write_json(directory / SUBMISSION, [{"image_id": q.image_id, "caption": predictions[q.id].text} for q in questions])


def read_predictions(path: Path, questions: Sequence[Question]) -> dict[str, Prediction]:
    """From captune's file, or the challenge's."""

    def resolve(row: dict[str, Any], found: dict[str, Prediction]) -> str | None:
        return str(row["image_id"]) if "question_id" not in row and "image_id" in row else None

    return read_answers(path, questions, resolve)


def _hints(config: EvaluateConfig, path: Path, pictures: Sequence[str]) -> dict[str, str]:
    if not config.ocr:
        raise UserError("evaluate.ocr: TextCaps' OCR tokens stand in the Rosetta file; name it")
    tokens = rosetta_of(Path(config.ocr))
    if missing := next((key for key in pictures if key not in tokens), None):
        raise UserError(f"{config.ocr}: has no OCR tokens of picture {missing}, which {path} names")
    return {key: f"\n{OCR_HINT}{', '.join(map(str, tokens[key]))}" for key in pictures}
