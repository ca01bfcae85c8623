"""Operators that look at all rows at once: deduplicators and selectors of Data-Juicer, on the texts, stats and fields
of the rows that are still alive. No image is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.refine.apply import STATS, Outcome
from pipelines.refine.operators import Operator, missing_package

if TYPE_CHECKING:
    from datasets import Dataset

_NUMBER = "captune row"
"""Column by which the rows that are left are known; no field of anybody's dataset."""
Meta = Callable[[], dict[str, str]]
"""`records.text_id` of a row -> the JSON of its `meta`; asked only where an operator names a field."""


def apply_together(operator: Operator, outcomes: dict[str, Outcome], meta: Meta) -> None:
    """Let the rows go that the operator does not leave, as Data-Juicer does: of rows that are alike the first stays, in
    the dataset's order or the one in which a selector before it left them.

    Raises:
        UserError: its package is missing, a field that it names is in no row, or it cannot work with the values there.
    """
    alive = [key for key, outcome in outcomes.items() if outcome.step is None]
    if operator.name == "document_deduplicator":
        _drop_same_documents(operator, outcomes, alive)
        return
    left = _left(operator, [outcomes[key] for key in alive], lambda: [_parsed(text) for text in _of(meta(), alive)])
    for number in set(range(len(alive))) - set(left):
        outcomes[alive[number]].reject(operator.label, _reason(operator, outcomes[alive[number]]))
    for number in left:  # in its order, which decides what a drawing after it draws
        outcomes[alive[number]] = outcomes.pop(alive[number])


def _drop_same_documents(operator: Operator, outcomes: dict[str, Outcome], alive: list[str]) -> None:
    """Here the row that stays can be named."""
    from data_juicer.utils.constant import HashKeys

    first: dict[str, str] = {}
    for key in alive:
        digest = operator.op.compute_hash({"text": outcomes[key].text})[HashKeys.hash]
        original = first.setdefault(digest, key)
        if original != key:
            outcomes[key].reject(operator.label, f"duplicate_of={original}")


def _left(operator: Operator, outcomes: list[Outcome], meta: Callable[[], list[dict[str, Any]]]) -> list[int]:
    """Numbers of the rows that the operator leaves, in its order."""
    import datasets

    columns: dict[str, list[Any]] = {_NUMBER: list(range(len(outcomes))), "text": [each.text for each in outcomes]}
    if field := getattr(operator.op, "field_key", ""):
        columns |= _column(operator, field, outcomes, meta)
    try:
        if hasattr(operator.op, "compute_hash"):
            hashed = [operator.op.compute_hash({"text": outcome.text}) for outcome in outcomes]
            columns |= {key: [row[key] for row in hashed] for key in (hashed[0] if hashed else ()) if key != "text"}
        shown = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            found: Dataset | tuple[Dataset, Any] = operator.op.process(datasets.Dataset.from_dict(columns))
        finally:
            (datasets.disable_progress_bars if shown else datasets.enable_progress_bars)()
    except ImportError as error:
        raise missing_package(operator.label, error) from error
    except Exception as error:  # third-party code over strangers' values: no row is to blame, the recipe is
        text = " ".join(str(error).split())[:200]
        raise UserError(f"refine.recipe: {operator.label} cannot work here: {type(error).__name__}: {text}") from error
    dataset = found[0] if isinstance(found, tuple) else found
    return list(dataset[_NUMBER])


def _column(
    operator: Operator, field: str, outcomes: list[Outcome], meta: Callable[[], list[dict[str, Any]]]
) -> dict[str, list[Any]]:
    """The column that holds a field such as `__dj__stats__.num_words` or `similarity`, with that field alone: others
    need not be of one type in all rows.
    """
    root, *inside = field.split(".")
    values = [outcome.stats if root == STATS else fields.get(root) for outcome, fields in _paired(root, outcomes, meta)]
    for name in inside:
        values = [value.get(name) if isinstance(value, dict) else None for value in values]
    if values and all(value is None for value in values):
        known = sorted({name for outcome in outcomes for name in outcome.stats})
        stats = f"; the stats of the operators before it are {', '.join(known)}" if root == STATS and known else ""
        raise UserError(f"refine.recipe: {operator.label}.field_key: no row has '{field}'{stats}")
    for name in reversed(inside):
        values = [{name: value} for value in values]
    return {root: values}


def _paired(
    root: str, outcomes: list[Outcome], meta: Callable[[], list[dict[str, Any]]]
) -> list[tuple[Outcome, dict[str, Any]]]:
    fields: list[dict[str, Any]] = [{} for _ in outcomes] if root == STATS else meta()
    return list(zip(outcomes, fields, strict=True))


def _reason(operator: Operator, outcome: Outcome) -> str:
    if hasattr(operator.op, "compute_hash"):
        return "much the same as another row"
    root, _, name = getattr(operator.op, "field_key", "").partition(".")
    value = outcome.stats.get(name) if root == STATS else None
    return f"not selected, {name}={value}" if value is not None else "not selected"


def _of(found: dict[str, str], keys: list[str]) -> list[str]:
    return [found.get(key, "") for key in keys]


def _parsed(text: str) -> dict[str, Any]:
    value = json.loads(text or "{}")
    return value if isinstance(value, dict) else {}
