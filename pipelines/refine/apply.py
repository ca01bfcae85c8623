"""Running a recipe's operators over rows: which row stays, which operator let it go and why. No Ray here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import UserError, WorkFailed
from pipelines.images import BadImage, read_bytes
from pipelines.refine.operators import Operator, missing_package
from pipelines.text import has_unspaced, words_of

STATS, CONTEXT = "__dj__stats__", "__dj__context__"
_FAILED = "failed: "
"""How the reason begins when an operator raised an error on the row."""
_IMAGE_ROWS = 16
"""Rows whose decoded images are in memory at once: image operators share one decode, and a photograph is tens of
megabytes."""

Samples = dict[str, list[Any]]
"""Data-Juicer's batch: a list per key."""


@dataclass(slots=True)
class Row:
    """What operators may look at. `image` holds encoded bytes, or None when only `image_uri` (a local path) is
    known; `fields` is what else came with the row.
    """

    sample_id: str
    text: str
    image: bytes | None = None
    image_uri: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What became of a row. `step` is the label of the operator that rejected it, None while it is kept."""

    text: str
    stats: dict[str, Any] = field(default_factory=dict)
    step: str | None = None
    reason: str | None = None

    def reject(self, step: str, reason: str) -> None:
        """Let the row go at `step`."""
        self.step, self.reason = step, f"{step}: {reason}"

    @property
    def failed(self) -> bool:
        """Whether the row could not be judged, as against being judged unfit."""
        return self.step == "error" or (self.reason or "").startswith(f"{self.step}: {_FAILED}")


def run_operators(operators: Sequence[Operator], rows: Sequence[Row]) -> list[Outcome]:
    """Every row through the operators in order; a rejected row meets no further operator.

    Returns:
        One outcome per row, in the order of `rows`.

    Raises:
        UserError: an operator's package is missing, or it cannot be followed (it changes the number of rows).
        WorkFailed: an operator failed on every one of several rows, so it is the operator and not the rows.
    """
    size = _IMAGE_ROWS if any(operator.reads_images for operator in operators) else max(len(rows), 1)
    outcomes: list[Outcome] = []
    for start in range(0, len(rows), size):
        outcomes += _run_chunk(operators, rows[start : start + size])
    return outcomes


def _run_chunk(operators: Sequence[Operator], rows: Sequence[Row]) -> list[Outcome]:
    outcomes = [Outcome(row.text) for row in rows]
    images: list[bytes | None] = [None] * len(rows)
    if any(operator.reads_images for operator in operators):
        images = _read_images(rows, outcomes)
    contexts: list[dict[str, Any]] = [{} for _ in rows]
    for operator in operators:
        alive = [i for i, outcome in enumerate(outcomes) if outcome.step is None]
        if not alive:
            break
        tried = [outcomes[i] for i in alive]
        _try_one(operator, [rows[i] for i in alive], tried, [images[i] for i in alive], [contexts[i] for i in alive])
    return outcomes


def _try_one(
    operator: Operator,
    rows: Sequence[Row],
    outcomes: list[Outcome],
    images: Sequence[bytes | None],
    contexts: Sequence[dict[str, Any]],
) -> None:
    """One operator over rows whose texts are those of `outcomes`."""
    samples: Samples = {"text": [_text_for(operator, outcome.text) for outcome in outcomes]}
    if operator.reads_fields:
        names = dict.fromkeys(name for row in rows for name in row.fields if name not in samples)
        samples |= {name: [row.fields.get(name) for row in rows] for name in names}
    if operator.reads_images:
        samples["images"] = [[row.image_uri or row.sample_id] for row in rows]
        samples["image_bytes"] = [[image] for image in images]
    if operator.shares_images:
        samples[CONTEXT] = list(contexts)
    elif operator.takes_words:
        samples[CONTEXT] = [_words(outcome.text) for outcome in outcomes]
    apply = _filter if operator.kind == "filter" else _map
    _apply_or_blame_rows(apply, operator, samples, outcomes)


def measure(operators: Sequence[Operator], rows: Sequence[Row]) -> list[list[Outcome]]:
    """What every operator says of every row by itself: a row that one rejects still meets the others, with the text
    that the mappers before them left of it.

    Returns:
        For each row one outcome per operator; one outcome alone, of step `error`, for a row whose image is gone.

    Raises:
        UserError, WorkFailed: as `run_operators`.
    """
    size = _IMAGE_ROWS if any(operator.reads_images for operator in operators) else max(len(rows), 1)
    return [each for start in range(0, len(rows), size) for each in _measure(operators, rows[start : start + size])]


def _measure(operators: Sequence[Operator], rows: Sequence[Row]) -> list[list[Outcome]]:
    read = [Outcome(row.text) for row in rows]
    images: Sequence[bytes | None] = [None] * len(rows)
    if any(operator.reads_images for operator in operators):
        images = _read_images(rows, read)
    found: list[list[Outcome]] = [[outcome] if outcome.step else [] for outcome in read]
    alive = [i for i, outcome in enumerate(read) if outcome.step is None]
    texts, contexts = [rows[i].text for i in alive], [dict[str, Any]() for _ in alive]
    for operator in operators if alive else ():
        outcomes = [Outcome(text) for text in texts]
        _try_one(operator, [rows[i] for i in alive], outcomes, [images[i] for i in alive], contexts)
        texts = [outcome.text or text for outcome, text in zip(outcomes, texts, strict=True)]
        for i, outcome in zip(alive, outcomes, strict=True):
            found[i].append(outcome)
    return found


def _read_images(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> list[bytes | None]:
    """Encoded bytes of every row; a file that went away since captioning is an error of the row."""
    images: list[bytes | None] = []
    for row, outcome in zip(rows, outcomes, strict=True):
        data = row.image
        if data is None:
            try:
                data = read_bytes(row.image_uri or "")
            except BadImage as error:
                outcome.reject("error", str(error))
        images.append(data)
    return images


def _text_for(operator: Operator, text: str) -> str:
    if not operator.wants_token:
        return text
    from data_juicer.utils.mm_utils import SpecialTokens

    return f"{SpecialTokens.image}\n{text}"


def _words(text: str) -> dict[str, list[str]]:
    """The context that hands an operator the words of a text in which white space does not part them; Data-Juicer would
    call a Chinese caption one word. An operator whose recipe names a tokenizer looks under another key, and uses that.
    """
    if not has_unspaced(text):
        return {}
    from data_juicer.utils.constant import InterVars

    return {f"{InterVars.words}-None-text": words_of(text)}


def _apply_or_blame_rows(apply: Any, operator: Operator, samples: Samples, outcomes: list[Outcome]) -> None:
    """Batch first; when the batch fails, row by row, so that one odd row costs itself and not its neighbours."""
    try:
        apply(operator, _copy(samples), outcomes)
        return
    except ImportError as error:
        raise missing_package(operator.label, error) from error
    except UserError:
        raise
    # Operators are third-party code over strangers' data: whatever they raise is laid to the row that makes them raise
    # it.
    except Exception as error:
        if len(outcomes) == 1:
            outcomes[0].reject(operator.label, f"{_FAILED}{_short(error)}")
            return
    failed = []
    for i, outcome in enumerate(outcomes):
        try:
            apply(operator, {key: _copy_value(key, values[i : i + 1]) for key, values in samples.items()}, [outcome])
        except Exception as error:
            failed.append(error)
            outcome.reject(operator.label, f"{_FAILED}{_short(error)}")
    if len(failed) == len(outcomes):
        raise WorkFailed(
            f"{operator.label} failed on all of {len(failed)} rows; the last error: {_short(failed[-1])}"
        ) from failed[-1]


def _copy(samples: Samples) -> Samples:
    return {key: _copy_value(key, values) for key, values in samples.items()}


def _copy_value(key: str, values: list[Any]) -> list[Any]:
    """Operators write into what they get; only the context is theirs to keep."""
    return values if key == CONTEXT else [list(v) if isinstance(v, list) else v for v in values]


def _filter(operator: Operator, samples: Samples, outcomes: list[Outcome]) -> None:
    op, count = operator.op, len(outcomes)
    # A fresh dictionary per operator: Data-Juicer skips a stat that is there already, which would be stale after a
    # mapper.
    samples[STATS] = [{} for _ in range(count)]
    context = {"context": True} if CONTEXT in samples else {}
    if op.is_batched_op():
        samples = op.compute_stats_batched(samples, **context)
        kept = list(op.process_batched(samples))
    else:
        singles = [op.compute_stats_single({k: v[i] for k, v in samples.items()}, **context) for i in range(count)]
        kept = [op.process_single(single) for single in singles]
        samples[STATS] = [single[STATS] for single in singles]
    if len(kept) != count:
        raise UserError(
            f"refine.recipe: {operator.label} answered for {len(kept)} of {count} rows; captune cannot run it"
        )
    for outcome, found, keep in zip(outcomes, samples[STATS], kept, strict=True):
        values = {key: _plain(value) for key, value in found.items()}
        outcome.stats.update(values)
        if not keep:
            outcome.reject(operator.label, _readable(values) or "not kept")


def _map(operator: Operator, samples: Samples, outcomes: list[Outcome]) -> None:
    op, count = operator.op, len(outcomes)
    if op.is_batched_op():
        texts = list(op.process_batched(samples)["text"])
    else:
        texts = [op.process_single({k: v[i] for k, v in samples.items()})["text"] for i in range(count)]
    if len(texts) != count:
        raise UserError(
            f"refine.recipe: {operator.label} makes {len(texts)} rows of {count}; captune runs mappers that "
            f"change a row's text"
        )
    for outcome, text in zip(outcomes, texts, strict=True):
        outcome.text = _without_token(text) if operator.wants_token else text
        if not outcome.text.strip():
            outcome.reject(operator.label, "left no text")


def _without_token(text: str) -> str:
    from data_juicer.utils.mm_utils import remove_special_tokens

    return str(remove_special_tokens(text))


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays as JSON's own types; not-a-number becomes null, which every JSON reader accepts."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _readable(stats: dict[str, Any]) -> str:
    """`image_width=40, image_height=900`: a list of one (a stat per image) as its value, floats to four digits."""
    return ", ".join(f"{key}={_short_value(value)}" for key, value in stats.items())


def _short_value(value: Any) -> str:
    if isinstance(value, list):
        inside = ", ".join(_short_value(item) for item in value[:4]) + (", ..." if len(value) > 4 else "")
        return inside if len(value) == 1 else f"[{inside}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
