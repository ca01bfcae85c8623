"""The evaluate stage: a benchmark's questions through an HTTP endpoint, answers and scores into a directory."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError, WorkFailed
from pipelines.evaluate.benchmark import Benchmark, CarriesPictures, Prediction, Question, picture_path
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.registry import open_benchmark, title
from pipelines.manifest import CLAIM, MANIFEST, fingerprint, identity, open_stage, read_json, write_json
from pipelines.modelfiles import model_identity
from pipelines.rundir import arm_of

if TYPE_CHECKING:
    from pipelines.evaluate.answerer import Answerer

JOURNAL = "journal.jsonl"
SCORES = "scores.json"
PICTURES = "pictures"
"""Where those lie that a benchmark's annotations carry."""
_NOT_RESULTS = (  # where things lie, how fast the answers come and when to give up; not what the answers are
    "annotations",
    "images",
    "ocr",
    "model",
    "concurrency",
    "request_timeout_s",
    "retries",
    "max_error_share",
    "also",
)
_SAID_KINDS = 8
"""A benchmark of more kinds of questions has them in `scores.json` alone."""
NOT_FACTS = ("questions", "prompts", "annotations", "images")
"""Of the scores, what their manifest does without."""


@dataclass(frozen=True)
class Served:
    """A model directory, and what serves it for the time of a `with` block and gives the base URL."""

    model: Path
    service: AbstractContextManager[str]


@contextmanager
def kept(service: AbstractContextManager[str]) -> Iterator[AbstractContextManager[str]]:
    """For several evaluations: a service that starts when it is first needed, if ever, and ends with this block."""
    with ExitStack() as stack:
        yield _Kept(service, stack)


class _Kept(AbstractContextManager[str]):
    def __init__(self, service: AbstractContextManager[str], stack: ExitStack) -> None:
        self.service, self.stack, self.base = service, stack, ""

    def __enter__(self) -> str:
        self.base = self.base or self.stack.enter_context(self.service)
        return self.base

    def __exit__(self, *_: object) -> None:
        return None


def run(output: Path, config: EvaluateConfig, endpoint: str | Served, *, restart: bool = False) -> dict[str, Any]:
    """Ask all questions, write predictions and `scores.json`, return the manifest.

    A killed run continues from its journal. A question without an answer scores 0, is counted in `errors` and keeps the
    reason; the same call asks it again, after the evaluation was finished, too.

    Args:
        endpoint: base URL of an OpenAI-compatible service, with or without `/v1`; or a model to serve, which happens
            only when there is something to ask. Which model answers decides whether this directory is this run's.

    Raises:
        UserError: annotations, images or endpoint unusable (key, file or question named), or another run's directory.
        WorkFailed: the endpoint went away or changed its model, or too many questions have no answer.
    """
    from pipelines.evaluate.answerer import who_answers

    benchmark = open_benchmark(config.benchmark)
    questions = read_questions(config)
    images = find_images(config, questions)
    carried = isinstance(benchmark, CarriesPictures)
    model = who_answers(endpoint, config).model() if isinstance(endpoint, str) else model_identity(endpoint.model)
    decides = inputs(config, questions, images, model)
    stage = open_stage(output, "evaluate", decides, restart=restart)
    if stage.complete and not stage.manifest["errors"]:
        return stage.manifest
    if stage.complete:
        stage.accept()  # unfinished again, until the questions without an answer have been asked once more
    if isinstance(benchmark, CarriesPictures):
        benchmark.unpack(config, stage.directory / PICTURES)
        images = _paths(benchmark, stage.directory / PICTURES, questions)
    with nullcontext(endpoint) if isinstance(endpoint, str) else endpoint.service as base:
        answerer = who_answers(base, config)
        if answerer.identity not in (None, model):
            raise WorkFailed(f"{answerer.endpoint}: serves model {answerer.identity}, not {model}, which was asked for")
        predictions, seconds, asked = _ask(stage.directory, questions, images, base, answerer, config)
    _refuse_failures(predictions, config)
    scores = {
        **_score(benchmark, config.benchmark, questions, predictions),
        "conditions": benchmark.conditions(config),
        "drawn": _drawn(Path(config.annotations)),
        "ocr_tokens": config.ocr_tokens,
        "max_new_tokens": config.max_new_tokens,
        "prompts": decides["prompts"],
        "annotations": {"path": str(Path(config.annotations).resolve()), "identity": decides["annotations"]},
        "images": str((stage.directory / PICTURES if carried else Path(config.images)).resolve()),
        "model": model if isinstance(model, str) else fingerprint(model),
        "answered_by": _answered_by(endpoint, answerer, model, predictions),
        "questions_per_second": round(asked / seconds, 3) if asked else None,
    }
    benchmark.write_predictions(stage.directory, config, questions, predictions, scores["model"])
    write_json(stage.directory / SCORES, scores)
    facts = {key: value for key, value in scores.items() if key not in NOT_FACTS}
    return stage.finish(rows_in=len(questions), rows_out=len(predictions), **facts)


def wanted(config: EvaluateConfig, model: Path) -> dict[str, Any]:
    """The inputs of an evaluation of a model directory."""
    questions = read_questions(config)
    return inputs(config, questions, find_images(config, questions), model_identity(model))


def inputs(
    config: EvaluateConfig, questions: Sequence[Question], images: dict[str, Path], model: str | dict[str, Any]
) -> dict[str, Any]:
    """Everything that decides answers and scores.

    Args:
        model: its identity, or what an endpoint that publishes none says of it (`Answerer.model`).
    """
    return {
        "annotations": identity(config.annotations),
        "prompts": fingerprint([[question.id, question.prompt] for question in questions]),
        "images": _digest(images),
        "model": model,
        **{key: value for key, value in asdict(config).items() if key not in _NOT_RESULTS},
    }


def score(benchmark: str, annotations: Path | str, predictions: Path | str) -> dict[str, Any]:
    """Score answers made elsewhere (any prediction file of the benchmark's module) without asking anything.

    Returns:
        `scores.json` without what only an evaluation knows: benchmark, accuracy in [0, 1], count, errors, truncated,
        questions.

    Raises:
        UserError: annotations or answers unusable, or the split's answers are withheld.
    """
    module = open_benchmark(benchmark)
    questions = module.questions(EvaluateConfig(benchmark=benchmark, annotations=str(annotations)))
    if withheld(questions):
        raise UserError(f"{annotations}: {_no_score(module)}")
    scores = _score(module, benchmark, questions, module.read_predictions(Path(predictions), questions))
    return {**scores, "annotations": {"path": str(Path(annotations).resolve()), "identity": identity(annotations)}}


def sentence(scores: dict[str, Any]) -> str:
    """Scores, or the manifest of an evaluation, in words."""
    if scores["accuracy"] is None:
        return f"{title(scores['benchmark'])}: {scores['count']} questions asked; {scores['withheld']}"
    text = f"{title(scores['benchmark'])}: {100 * scores['accuracy']:.2f} % of {scores['count']} questions"
    if "conditions" in scores:
        text += f" ({scores['conditions']})"
    kinds = scores.get("kinds", {}) if len(scores.get("kinds", {})) <= _SAID_KINDS else {}
    told = {kind: found["accuracy"] for kind, found in kinds.items()} | scores.get("figures", {})
    if told:
        text += "; " + ", ".join(f"{name} {100 * share:.2f} %" for name, share in told.items())
    if scores["errors"]:
        text += f"; without an answer, and counted as wrong: {scores['errors']}"
    if scores["truncated"]:
        limit = f" of {scores['max_new_tokens']} tokens" if "max_new_tokens" in scores else ""
        text += f"; cut off at the limit{limit}: {scores['truncated']}"
    return text


def read_scores(directory: Path | str) -> dict[str, Any]:
    """`scores.json` of a finished evaluation.

    Raises:
        UserError: there is none, or it is no such file.
    """
    path = Path(directory) / SCORES
    unfinished = (path.parent / CLAIM).exists() and not (path.parent / MANIFEST).exists()
    if not path.is_file() or unfinished:
        lacks = MANIFEST if path.is_file() else SCORES
        raise UserError(f"{directory}: no finished evaluation there ({lacks} is missing)")
    scores = read_json(path)
    if not isinstance(scores, dict) or not scores.keys() >= {"benchmark", "accuracy", "count", "errors", "annotations"}:
        raise UserError(f"{path}: not the scores of an evaluation")
    if scores["accuracy"] is None:
        raise UserError(f"{path}: holds no scores: {scores.get('withheld')}")
    rows = scores.get("questions")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: holds no questions")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not row.keys() >= {"question_id", "score", "error"}:
            raise UserError(f"{path}: questions[{number}] lacks its id, its score or its error")
        if not (isinstance(row["score"], int | float) and 0 <= row["score"] <= 1):
            raise UserError(f"{path}: questions[{number}] has score {row['score']}, which is none between 0 and 1")
    return scores


def read_questions(config: EvaluateConfig) -> list[Question]:
    """The questions that `config` asks.

    Raises:
        UserError: no such annotations; or some questions have answers and others none.
    """
    if not config.annotations:
        raise UserError("evaluate.annotations: name the benchmark's annotation file")
    questions = open_benchmark(config.benchmark).questions(config)
    unanswered = [question.id for question in questions if not question.answers]
    if unanswered and len(unanswered) < len(questions):
        raise UserError(f"{config.annotations}: question_id {unanswered[0]} has no answers, and others have some")
    first = {question.id for question in [each for each in questions if not each.copy_of][: config.limit]}
    return [question for question in questions if (question.copy_of or question.id) in first]


def withheld(questions: Sequence[Question]) -> bool:
    """The split's answers are its authors' secret: it can be asked, and not scored here."""
    return not any(question.answers for question in questions)


def find_images(config: EvaluateConfig, questions: Sequence[Question]) -> dict[str, Path]:
    """Picture of every question, by the question's id; none where the annotations carry them.

    Raises:
        UserError: no such directory, or a picture that is not there (a score without it would look like the model's
            fault) or not in it.
    """
    benchmark = open_benchmark(config.benchmark)
    if isinstance(benchmark, CarriesPictures):
        return {}
    if not Path(config.images).is_dir() or not config.images:
        raise UserError(f"evaluate.images: '{config.images}' is no directory")
    found = _paths(benchmark, Path(config.images), questions)
    missing = sorted({path.name for path in found.values() if not path.is_file()})
    if missing:
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise UserError(f"{config.images}: {len(missing)} picture(s) of the annotations are not there: {some}")
    return found


def _paths(benchmark: Benchmark, folder: Path, questions: Sequence[Question]) -> dict[str, Path]:
    return {question.id: picture_path(benchmark, folder, question.image_id) for question in questions}


def _score(
    benchmark: Benchmark, name: str, questions: Sequence[Question], predictions: dict[str, Prediction]
) -> dict[str, Any]:
    if len(predictions) != len(questions):
        raise WorkFailed(f"{len(predictions)} answers to {len(questions)} questions")
    counted = [question for question in questions if not question.copy_of]
    secret = withheld(questions)
    values = [None] * len(counted) if secret else benchmark.score(questions, predictions)
    scored = [value for value in values if value is not None]
    return {
        "benchmark": name,
        "accuracy": None if secret else sum(scored) / len(scored),
        **({"withheld": _no_score(benchmark)} if secret else {}),
        "figures": {} if secret else benchmark.figures(questions, predictions),
        "kinds": {} if secret else _by_kind(counted, scored),
        "count": len(counted),
        "errors": sum(said.error is not None for said in predictions.values()),
        "truncated": sum(said.truncated for said in predictions.values()),
        "questions": _rows(questions, predictions, values),
    }


def _rows(
    questions: Sequence[Question], predictions: dict[str, Prediction], values: Sequence[float | None]
) -> list[dict[str, Any]]:
    """One for each question that is no copy; what was said to its copies stands beside its own answer."""
    copies: dict[str, list[Prediction]] = {}
    for question in questions:
        copies.setdefault(question.copy_of or question.id, []).append(predictions[question.id])
    counted = [question for question in questions if not question.copy_of]
    return [
        {
            "question_id": question.id,
            "image_id": question.image_id,
            "question": question.text,
            "kind": question.kind,
            "prediction": " | ".join(said.text for said in copies[question.id]),
            "answers": list(question.answers),
            "score": value,
            "error": next((said.error for said in copies[question.id] if said.error is not None), None),
            "truncated": any(said.truncated for said in copies[question.id]),
        }
        for question, value in zip(counted, values, strict=True)
    ]


def _no_score(benchmark: Benchmark) -> str:
    """Why there is none, and what to do."""
    todo = f"; {benchmark.SUBMISSION} is for the benchmark's own server" if benchmark.SUBMISSION else ""
    return f"no score: the answers of this split are withheld{todo}"


def _by_kind(questions: Sequence[Question], values: Sequence[float]) -> dict[str, dict[str, float]]:
    """Kind of question -> `accuracy` and `count`; empty where the benchmark knows one kind."""
    kinds: dict[str, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        kinds.setdefault(question.kind, []).append(value)
    found = {kind: {"accuracy": sum(each) / len(each), "count": len(each)} for kind, each in sorted(kinds.items())}
    return found if len(found) > 1 else {}


def _drawn(annotations: Path) -> bool:
    """The questions are the sample world's, and only in the benchmark's layout."""
    manifests = [folder / MANIFEST for folder in list(annotations.resolve().parents)[:2]]
    return any(path.is_file() and read_json(path).get("stage") == "sample" for path in manifests)


def _digest(images: dict[str, Path]) -> str:
    """Of the pictures that are asked about, and no others that lie beside them."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(set(images.values())):
        content = hashlib.blake2b(path.read_bytes(), digest_size=16)
        digest.update(path.name.encode() + b"\0" + content.digest())
    return digest.hexdigest()


def _ask(
    directory: Path,
    questions: Sequence[Question],
    images: dict[str, Path],
    endpoint: str,
    answerer: Answerer,
    config: EvaluateConfig,
) -> tuple[dict[str, Prediction], float, int]:
    """Predictions, seconds that the asking took, and how many were asked now rather than by an earlier, killed run."""
    from pipelines.evaluate.client import Ask, answered, ask_all

    asks = [Ask(question.id, question.prompt, images[question.id]) for question in questions]
    already = len(answered(directory / JOURNAL))
    started = time.monotonic()
    what = f"evaluate {arm_of(directory)}, {config.benchmark}"
    predictions = ask_all(asks, endpoint, answerer, config, directory / JOURNAL, what=what)
    return predictions, max(time.monotonic() - started, 1e-9), len(questions) - already


def _refuse_failures(predictions: dict[str, Prediction], config: EvaluateConfig) -> None:
    """A score in which failed requests count as wrong answers says little of the model."""
    errors = [said.error for said in predictions.values() if said.error is not None]
    share = len(errors) / len(predictions)
    if share <= config.max_error_share:
        return
    kinds = "; ".join(f"{error} ({count} times)" for error, count in Counter(errors).most_common(3))
    raise WorkFailed(
        f"{len(errors)} of {len(predictions)} questions have no answer ({100 * share:.3g} %, and "
        f"evaluate.max_error_share is {config.max_error_share:g}): {kinds}. The same command asks them again"
    )


def _answered_by(
    endpoint: str | Served, answerer: Answerer, model: str | dict[str, Any], predictions: dict[str, Prediction]
) -> dict[str, str | None]:
    """Who it was, for those who read the scores."""
    names = (said.system_fingerprint for said in predictions.values() if said.error is None)
    return {
        "name": answerer.name if isinstance(endpoint, str) else str(endpoint.model.resolve()),
        "endpoint": answerer.endpoint if isinstance(endpoint, str) else None,
        "identity": model if isinstance(model, str) else None,
        "system_fingerprint": next(names, None),
    }
