"""MMBench (Liu et al. 2023, arXiv:2307.06281): one letter of up to four options, asked with the options in every order.

Annotations: the TSV as published, whose rows carry their pictures (base64, or another row's `index` where the picture
is the same). Row 1000241 asks row 241 again with its options rotated by one, row 2000241 by two. A question counts when
all its rows are answered rightly (CircularEval). Prompts are LLaVA's and MGM's.

Answers: `predictions.jsonl`, captune's own, and `mmbench_submission.xlsx`, which the benchmark's site takes, with the
columns of LLaVA's `convert_mmbench_for_submission.py`.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.evaluate.answers import read_answers, write_answers
from pipelines.evaluate.benchmark import Prediction, Question
from pipelines.evaluate.sheet import write_sheet
from pipelines.files import read_text, replacing

if TYPE_CHECKING:
    from pipelines.evaluate.config import EvaluateConfig

TITLE = "MMBench"
SUBMISSION = "mmbench_submission.xlsx"
INSTRUCTION = "Answer with the option's letter from the given choices directly."
_IN_CHINESE = "请直接回答选项字母。"
_LETTERS = "ABCD"
_NEEDED = ("index", "question", "image", "A", "B")
_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
_ROTATION = 1_000_000
_SHORTEST_PICTURE = 65  # characters of base64; what is shorter names another row
_EMPTY = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA")
    + ("NULL", "n/a", "null")
)
"""What pandas reads as nothing, with which the published scripts read the file; with `nan` and `none` in any case."""

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_SAID = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


def questions(config: EvaluateConfig) -> list[Question]:
    """In the order of the file, rotated copies among them; of the test split, without answers.

    Raises:
        UserError: no such file, a column or a cell that is missing, a picture that is none, an answer that is no
            option, a copy without its question, or `ocr_tokens`.
    """
    if config.ocr_tokens:
        raise UserError("evaluate.ocr_tokens: MMBench has no OCR tokens")
    path = Path(config.annotations)
    rows = _rows(path)
    pictures = {index: _name(picture) for index, picture in _pictures(path, rows)}
    return [_question(row, rows, pictures, f"{path}: index {index}") for index, row in rows.items()]


def conditions(config: EvaluateConfig) -> str:
    """How it is scored."""
    return "circular: all orders of the options right; letters as VLMEvalKit finds them without a judge"


def image_path(images: Path, image_id: str) -> Path:
    """By the digest of its content, under which `unpack` writes it."""
    return images / image_id


def unpack(config: EvaluateConfig, folder: Path) -> None:
    """Write the pictures of the annotations, each once."""
    path = Path(config.annotations)
    folder.mkdir(parents=True, exist_ok=True)
    for _, picture in _pictures(path, _rows(path)):
        place = folder / _name(picture)
        if not place.is_file():
            with replacing(place) as part:
                part.write_bytes(picture)


def chosen(answer: str, options: Sequence[str]) -> str:
    """The letter that an answer chooses; `Z` where it refuses to, empty where none can be told.

    Equal to VLMEvalKit's `can_infer`. Its oddities: a letter counts only as a word among the last four, upper case, and
    alone of its kind, so that `A dog` chooses A; then `answer is B` anywhere, in any case; then the only option whose
    text stands in the answer, unless the answer is twice as long as all options together.
    """
    if "Failed to obtain answer via API" in answer:
        return _by_text(answer, options)
    if any(words in answer for words in _REFUSALS):
        return "Z"
    words, letters = answer.translate(_MARKS).split(), [chr(ord("A") + n) for n in range(len(options))]
    found = [letter for letter in letters if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - _LAST_WORDS:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    said = _SAID.search(answer)
    if said and said[1].upper() in letters:
        return said[1].upper()
    return _by_text(answer, options)


def score(questions: Sequence[Question], predictions: dict[str, Prediction]) -> list[float]:
    """1.0 for each question whose copies, and itself, are all answered rightly."""
    right: dict[str, bool] = {question.id: True for question in questions if not question.copy_of}
    for question in questions:
        said = predictions[question.id]
        letter = "" if said.error else chosen(said.text, question.options)
        right[question.copy_of or question.id] &= letter == question.answers[0]
    return [float(each) for each in right.values()]


def figures(questions: Sequence[Question], predictions: dict[str, Prediction]) -> dict[str, float]:
    """The score of each larger kind (`l2-category`)."""
    kinds: dict[str, list[float]] = {}
    counted = [question for question in questions if not question.copy_of]
    for question, value in zip(counted, score(questions, predictions), strict=True):
        if question.family:
            kinds.setdefault(question.family, []).append(value)
    return {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())}


def write_predictions(
    directory: Path,
    config: EvaluateConfig,
    questions: Sequence[Question],
    predictions: dict[str, Prediction],
    model: str,
) -> None:
    """Captune's file, and the sheet for the benchmark's site: a line for every row of the annotations."""
    write_answers(directory, questions, predictions)
    rows = _rows(Path(config.annotations))
    kept = [name for name in next(iter(rows.values())) if name not in _NOT_SUBMITTED]
    lines = [kept[:6] + ["prediction"] + kept[6:]]
    for question in questions:
        row = rows[int(question.id)]
        cells = ["" if _empty(row[name]) else row[name] for name in kept]
        lines.append(cells[:6] + [predictions[question.id].text] + cells[6:])
    write_sheet(directory / SUBMISSION, lines)


def read_predictions(path: Path, questions: Sequence[Question]) -> dict[str, Prediction]:
    """From captune's file, or the lines that LLaVA's `model_vqa_mmbench.py` writes."""
    return read_answers(path, questions)


def _by_text(answer: str, options: Sequence[str]) -> str:
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, options)):
        return ""
    found = [chr(ord("A") + n) for n, option in enumerate(options) if option.lower() in answer]
    return found[0] if len(found) == 1 else ""


def _question(row: Mapping[str, str], rows: Mapping[int, object], pictures: dict[int, str], where: str) -> Question:
    index = int(row["index"])
    first = index % _ROTATION
    if first not in rows:
        raise UserError(f"{where}: a rotated copy of question {first}, which the file does not hold; is it cut off?")
    options = _options(row)
    if len(options) < 2 or _empty(row["question"]):
        raise UserError(f"{where}: needs a question and at least the options A and B")
    answer = "" if _empty(row.get("answer", "")) else row["answer"]
    if answer and answer not in _LETTERS[: len(options)]:
        raise UserError(f"{where}: the answer is '{answer}', and the options are {', '.join(_LETTERS[: len(options)])}")
    asked = "\n".join(
        [row["question"], *(f"{letter}. {text}" for letter, text in zip(_LETTERS, options, strict=False))]
    )
    hint = "" if _empty(row.get("hint", "")) else f"{row['hint']}\n"
    instruction = _IN_CHINESE if re.search("[\u4e00-\u9fff]", row["question"]) else INSTRUCTION
    return Question(
        id=str(index),
        image_id=pictures[index],
        text=asked,
        prompt=f"{hint}{asked}\n{instruction}",
        answers=(answer,) if answer else (),
        kind=row.get("category", ""),
        family=row.get("l2-category", ""),
        options=options,
        copy_of="" if index == first else str(first),
    )


def _options(row: Mapping[str, str]) -> tuple[str, ...]:
    """Up to the first that is empty."""
    texts = [row.get(letter, "") for letter in _LETTERS]
    return tuple(texts[: next((n for n, text in enumerate(texts) if _empty(text)), len(texts))])


def _empty(text: str) -> bool:
    return text in _EMPTY or text.lower() in ("nan", "none")


def _rows(path: Path) -> dict[int, dict[str, str]]:
    """`index` -> row, in the order of the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of questions (MMBench's are .tsv)")
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    header = next(reader, [])
    if missing := [name for name in _NEEDED if name not in header]:
        raise UserError(f"{path}: lacks the column(s) {', '.join(missing)} of MMBench's TSV (index, question, A to D)")
    found: dict[int, dict[str, str]] = {}
    for number, cells in enumerate(reader, 1):
        where = f"{path}: row {number}"
        if len(cells) != len(header):
            raise UserError(f"{where}: has {len(cells)} of {len(header)} columns; is the file cut off?")
        row = dict(zip(header, cells, strict=True))
        if not row["index"].isdecimal():
            raise UserError(f"{where}: index is '{row['index'][:40]}', not a whole number")
        if int(row["index"]) in found:
            raise UserError(f"{where}: index {row['index']} occurs twice")
        found[int(row["index"])] = row
    if not found:
        raise UserError(f"{path}: holds no questions")
    return found


def _pictures(path: Path, rows: Mapping[int, Mapping[str, str]]) -> Iterator[tuple[int, bytes]]:
    """The encoded picture of every row."""
    for index, row in rows.items():
        where, text = f"{path}: index {index}", row["image"]
        if len(text) < _SHORTEST_PICTURE:
            if not text.isdecimal() or len(rows.get(int(text), {"image": ""})["image"]) < _SHORTEST_PICTURE:
                raise UserError(f"{where}: image is '{text}', neither a picture nor the index of a row with one")
            text = rows[int(text)]["image"]
        try:
            picture = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{where}: the picture is not valid base64 ({error})") from error
        if _suffix(picture) is None:
            raise UserError(f"{where}: the picture is of no format that captune sends (JPEG, PNG, WebP, GIF)")
        yield index, picture


def _name(picture: bytes) -> str:
    """The same for the same picture, so that questions about one picture are known as such."""
    return f"{hashlib.blake2b(picture, digest_size=8).hexdigest()}{_suffix(picture)}"


def _suffix(picture: bytes) -> str | None:
    """By its first bytes."""
    if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        return ".webp"
    starts = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif"}
    return next((suffix for start, suffix in starts.items() if picture.startswith(start)), None)
