"""Files of answers: the one that captune writes for every benchmark, and reading any with a row for each question."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.evaluate.benchmark import Prediction, Question
from pipelines.files import read_text, write_text
from pipelines.manifest import read_json

PREDICTIONS = "predictions.jsonl"

_TEXTS = ("text", "answer", "caption")

Resolve = Callable[[dict[str, Any], dict[str, Prediction]], str | None]
"""A row, and what has been read before it -> the id of the question that it answers; None: its `question_id`."""


def write_answers(directory: Path, questions: Sequence[Question], predictions: dict[str, Prediction]) -> None:
    """`predictions.jsonl`: a line a question, `{"question_id", "image_id", "prompt", "text", "error", "truncated"}`."""
    rows = []
    for question in questions:
        said = predictions[question.id]
        row: dict[str, Any] = {"question_id": number(question.id), "image_id": question.image_id}
        rows.append(
            row | {"prompt": question.prompt, "text": said.text, "error": said.error, "truncated": said.truncated}
        )
    write_lines(directory / PREDICTIONS, rows)


def read_answers(
    path: Path | str, questions: Sequence[Question], resolve: Resolve = lambda row, found: None
) -> dict[str, Prediction]:
    """Answers by question id, from a JSON list or lines of objects: `question_id`, and `text`, `answer` or `caption`.

    Raises:
        UserError: not such a file, an answer to no question, a question answered twice or not at all (the ids are
            named).
    """
    path = Path(path)
    known = {question.id for question in questions}
    found: dict[str, Prediction] = {}
    for row, entry in enumerate(_rows(path)):
        where = f"{path}: answer {row + 1}"
        if not isinstance(entry, dict) or not entry.keys() & set(_TEXTS):
            raise UserError(f"{where}: needs 'question_id' and 'text' (or 'answer')")
        text = next(entry[key] for key in _TEXTS if key in entry)
        error, truncated = (_said_of(entry, key) for key in ("error", "truncated"))
        if not isinstance(text, str):
            raise UserError(f"{where}: the answer must be text, not {'null' if text is None else type(text).__name__}")
        named = entry.get("question_id")
        key = resolve(entry, found) or ("" if named is None else str(named))
        if not key:
            raise UserError(f"{where}: needs 'question_id' and 'text' (or 'answer')")
        if key not in known:
            raise UserError(f"{where}: question_id {named} is no question of these annotations")
        if key in found:
            raise UserError(f"{where}: question_id {named or key} is answered twice")
        found[key] = Prediction(key, text, str(error) if error else None, bool(truncated))
    missing = [question.id for question in questions if question.id not in found]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(questions)} questions have no answer: {_some(missing)}")
    return found


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line; the file is whole or not there."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def number(key: str) -> int | str:
    """The benchmarks' ids are numbers; an id that is none stays text."""
    return int(key) if key.isdecimal() and str(int(key)) == key else key


def read_lines(path: Path) -> list[Any]:
    """One JSON value a line; empty lines are left out.

    Raises:
        UserError: a line is no JSON.
    """
    rows = []
    for line_number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: an answer may hold U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {line_number} is not valid JSON ({error})") from error
    return rows


def _rows(path: Path) -> Iterable[Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such prediction file")
    return list(read_json(path)) if read_text(path).lstrip().startswith("[") else read_lines(path)


def _said_of(entry: dict[str, Any], key: str) -> Any:
    """`error` or `truncated`: in a line of ours as it is, in a LLaVA line among its metadata."""
    metadata = entry.get("metadata")
    return entry.get(key) or (metadata.get(key) if isinstance(metadata, dict) else None)


def _some(ids: Sequence[str], limit: int = 10) -> str:
    return ", ".join(ids[:limit]) + (f" and {len(ids) - limit} more" if len(ids) > limit else "")
