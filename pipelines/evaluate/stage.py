"""The evaluate stage: a benchmark's questions through an HTTP endpoint, answers and scores into a directory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.errors import UserError, WorkFailed
from pipelines.evaluate.benchmark import Prediction, Question
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.registry import open_benchmark
from pipelines.manifest import identity, open_stage, read_json, write_json

JOURNAL = "journal.jsonl"
SCORES = "scores.json"
# Settings that decide how fast the answers come, not what they are.
_NOT_RESULTS = ("annotations", "images", "ocr", "concurrency", "request_timeout_s", "retries", "model")


def run(
    output: Path,
    config: EvaluateConfig,
    *,
    endpoint: str | Callable[[], AbstractContextManager[str]],
    model_identity: str,
    restart: bool = False,
) -> dict[str, Any]:
    """Ask all questions, write predictions and `scores.json`, return the manifest.

    A killed run continues from its journal. A question that the endpoint could not answer scores 0, is counted in
    `errors` and keeps the reason.

    Args:
        endpoint: base URL of an OpenAI-compatible service, with or without `/v1`; or what starts one and gives its URL,
            called only when there is something to ask.
        model_identity: of the model behind it (`model_identity` of its directory); it decides whether this directory
            is this run's.

    Raises:
        UserError: annotations, images or endpoint unusable (key, file or question named).
        WorkFailed: the endpoint went away, or answered no question at all.
    """
    benchmark = open_benchmark(config.benchmark)
    questions = read_questions(config)
    images = find_images(config, questions)
    wanted = inputs(config, images, model_identity)
    stage = open_stage(output, "evaluate", wanted, restart=restart)
    if stage.complete:
        return stage.manifest
    with nullcontext(endpoint) if isinstance(endpoint, str) else endpoint() as base:
        predictions, seconds, asked = _ask(stage.directory, questions, images, base, config)
    scores = {
        **_score(benchmark, config.benchmark, questions, predictions),
        "ocr_tokens": config.ocr_tokens,
        "max_new_tokens": config.max_new_tokens,
        "annotations": {"path": str(Path(config.annotations).resolve()), "identity": wanted["annotations"]},
        "images": str(Path(config.images).resolve()),
        "model": model_identity,
        "questions_per_second": round(asked / seconds, 3) if asked else None,
    }
    benchmark.write_predictions(stage.directory, questions, predictions, model_identity)
    write_json(stage.directory / SCORES, scores)
    keys = ("benchmark", "accuracy", "count", "errors", "ocr_tokens", "questions_per_second")
    return stage.finish(rows_in=len(questions), rows_out=len(predictions), **{key: scores[key] for key in keys})


def inputs(config: EvaluateConfig, images: dict[str, Path], model_identity: str) -> dict[str, Any]:
    """Everything that decides answers and scores."""
    return {
        "annotations": identity(config.annotations),
        "ocr": identity(config.ocr) if config.ocr and config.ocr_tokens else None,
        "images": _digest(images),
        "model": model_identity,
        **{key: value for key, value in asdict(config).items() if key not in _NOT_RESULTS},
    }


def score(benchmark: str, annotations: Path | str, predictions: Path | str) -> dict[str, Any]:
    """Score answers made elsewhere (any prediction file of the benchmark's module) without asking anything.

    Returns:
        `scores.json` without what only an evaluation knows: benchmark, accuracy in [0, 1], count, errors, questions.
    """
    module = open_benchmark(benchmark)
    questions = module.load(annotations)
    scores = _score(module, benchmark, questions, module.read_predictions(predictions, questions))
    return {**scores, "annotations": {"path": str(Path(annotations).resolve()), "identity": identity(annotations)}}


def read_scores(directory: Path | str) -> dict[str, Any]:
    """`scores.json` of a finished evaluation.

    Raises:
        UserError: there is none, or it is no such file.
    """
    path = Path(directory) / SCORES
    if not path.is_file():
        raise UserError(f"{directory}: no finished evaluation there ({SCORES} is missing)")
    scores = read_json(path)
    if not isinstance(scores, dict) or not isinstance(scores.get("questions"), list):
        raise UserError(f"{path}: not the scores of an evaluation")
    return scores


def _score(
    module: ModuleType, name: str, questions: Sequence[Question], predictions: dict[str, Prediction]
) -> dict[str, Any]:
    if len(predictions) != len(questions):
        raise WorkFailed(f"{len(predictions)} answers to {len(questions)} questions")
    rows = []
    for question in questions:
        said = predictions[question.id]
        rows.append(
            {
                "question_id": question.id,
                "image_id": question.image_id,
                "question": question.text,
                "prediction": said.text,
                "answers": list(question.answers),
                "score": module.score_question(question, said),
                "error": said.error,
            }
        )
    return {
        "benchmark": name,
        "accuracy": sum(row["score"] for row in rows) / len(rows),
        "count": len(rows),
        "errors": sum(row["error"] is not None for row in rows),
        "questions": rows,
    }


def read_questions(config: EvaluateConfig) -> list[Question]:
    """The questions that the benchmark asks, at most `config.limit`.

    Raises:
        UserError: no such benchmark, or annotations that cannot be asked and scored.
    """
    benchmark = open_benchmark(config.benchmark)
    if not config.annotations:
        raise UserError("evaluate.annotations: name the benchmark's annotation file")
    questions: list[Question] = benchmark.load(config.annotations, ocr_tokens=config.ocr_tokens, ocr=config.ocr or None)
    unanswered = [question.id for question in questions if not question.answers]
    if unanswered:
        raise UserError(
            f"{config.annotations}: question_id {unanswered[0]} has no answers; this split cannot be scored"
        )
    return questions[: config.limit]


def find_images(config: EvaluateConfig, questions: Sequence[Question]) -> dict[str, Path]:
    """Picture of every question. A missing one is refused up front: a score without it would look like the model's
    fault.
    """
    if not Path(config.images).is_dir() or not config.images:
        raise UserError(f"evaluate.images: '{config.images}' is no directory")
    benchmark = open_benchmark(config.benchmark)
    found = {question.id: benchmark.image_path(Path(config.images), question.image_id) for question in questions}
    missing = sorted({path.name for path in found.values() if not path.is_file()})
    if missing:
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise UserError(f"{config.images}: {len(missing)} picture(s) of the annotations are not there: {some}")
    return found


def _digest(images: dict[str, Path]) -> str:
    """Of the pictures that are asked about, and no others that lie beside them."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(set(images.values())):
        content = hashlib.blake2b(path.read_bytes(), digest_size=16)
        digest.update(path.name.encode() + b"\0" + content.digest())
    return digest.hexdigest()


def _ask(
    directory: Path, questions: Sequence[Question], images: dict[str, Path], endpoint: str, config: EvaluateConfig
) -> tuple[dict[str, Prediction], float, int]:
    """Predictions, seconds that the asking took, and how many were asked now rather than by an earlier, killed run."""
    from pipelines.evaluate.client import Ask, ask_all, read_journal

    asks = [Ask(question.id, question.prompt, images[question.id]) for question in questions]
    already = sum(said.error is None for said in read_journal(directory / JOURNAL).values())
    started = time.monotonic()
    predictions = ask_all(asks, endpoint, config, directory / JOURNAL, what=f"evaluate {config.benchmark}")
    seconds = time.monotonic() - started
    errors = [said.error for said in predictions.values() if said.error]
    if len(errors) == len(questions):
        raise WorkFailed(f"{endpoint} answered none of {len(questions)} questions; the first error: {errors[0]}")
    return predictions, max(seconds, 1e-9), len(questions) - already
