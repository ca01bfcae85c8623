"""`captune analyze`: what a recipe's filters measure in a dataset, and bounds for them that are not guesses.

Every filter looks at every drawn row, whatever the others say of it, so that each distribution is that of the dataset
and it shows which filter alone costs which rows.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.formats import DEFAULT, Reading, error_kind, open_dataset
from pipelines.progress import Progress
from pipelines.records import holds_records, shard_paths
from pipelines.refine.apply import Outcome, Row, measure
from pipelines.refine.bounds import Bound, bounds_of, kept, propose, single
from pipelines.refine.config import AnalyzeConfig, RefineConfig
from pipelines.refine.operators import Operator, Process, build, read_recipe

if TYPE_CHECKING:
    import numpy as np

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
EXAMPLES = 3
"""Rows shown on either side of a bound, those that lie nearest to it."""
_BARS = 40
_CHUNK = 64


@dataclass
class Looked:
    """One drawn row: its place in the dataset, what its format calls it, and what every operator said of it.

    Attributes:
        refused: why no operator saw it; empty otherwise.
    """

    number: int
    where: str
    text: str
    refused: str = ""
    outcomes: list[Outcome] = field(default_factory=list)


@dataclass
class Analysis:
    """What was found, for the page and for `analysis.json`.

    Attributes:
        facts: the JSON.
        proposal: the recipe's operators with the proposed bounds.
        pictures: number of a row that is shown as an example -> its encoded image, or the path of it.
    """

    facts: dict[str, Any]
    proposal: Process
    pictures: dict[int, bytes | str] = field(default_factory=dict)


def analyze(
    input: str, recipe: str, config: AnalyzeConfig, refine: RefineConfig, reading: Reading = DEFAULT
) -> Analysis:
    """Measure up to `config.rows` rows of a dataset with the filters of a Data-Juicer recipe.

    Returns:
        Facts: `input`, `recipe`, `text`, `rows`, `looked_at`, `unusable` (kind -> rows), `kept` (share by the recipe as
        it is), `proposed` (`by`, `value`, `kept`), `operators`: for each `label`, `kind`, `kept`, `alone` (share that
        it alone rejects), `failed`, and `stats`: `name`, `mean`, `sd`, `percentiles`, `histogram` (`edges`, `counts`),
        `bounds` (`parameter`, `low`, `value`, `proposed`, `cuts`, `proposed_cuts`, and `examples` of rows at each of
        both that cuts something); `not_measured`; `correlations` (`stats`, Spearman's `matrix`).

    Raises:
        UserError: no dataset, no row with a text and a picture, or a recipe that cannot be run.
    """
    process = read_recipe(recipe)
    every = build(process)
    operators = [operator for operator in every if operator.kind != "global"]
    parameters = {operator.label: next(iter(entry.values())) for operator, entry in zip(every, process, strict=True)}
    text, total, looked = _look(input, config, refine.text, operators, reading)
    judged = [row for row in looked if not row.refused]
    if not judged:
        reasons = ", ".join(f"{count} {kind}" for kind, count in _unusable(looked).items())
        raise UserError(f"{input}: none of {len(looked)} rows has a text and a picture: {reasons or 'it is empty'}")
    columns = [[row.outcomes[at] for row in judged] for at in range(len(operators))]
    bounds = [
        bounds_of(operator, parameters[operator.label], column)
        for operator, column in zip(operators, columns, strict=True)
    ]
    values = _values(operators, columns)
    passes = _passes(columns)
    others_F = _others(passes, bounds)
    flat = [bound for each in bounds for bound in each]
    proposed = propose(flat, values, others_F, config, len(looked))
    facts = {
        "input": input,
        "recipe": recipe,
        "text": text,
        "rows": total,
        "looked_at": len(looked),
        "unusable": _unusable(looked),
        "kept": float(passes.all(axis=0).sum()) / len(looked),
        "proposed": {
            "by": config.by,
            "value": getattr(config, config.by),
            "kept": float(kept(proposed, values, others_F).sum()) / len(looked),
        },
        "operators": [
            _operator_facts(operator, column, alone, values, list(zip(flat, proposed, strict=True)), judged)
            for operator, column, alone in zip(operators, columns, _alone(passes), strict=True)
        ],
        "not_measured": [operator.label for operator in every if operator.kind == "global"],
        "correlations": _correlations(values),
    }
    shown = {example["row"] for example in _examples(facts)}
    return Analysis(facts, _with(process, every, proposed), _pictures(input, shown, reading))


def _look(
    input: str, config: AnalyzeConfig, text: str, operators: Sequence[Operator], reading: Reading
) -> tuple[str, int, list[Looked]]:
    """The text column, how many rows there are, and the drawn ones, measured."""
    text, rows = _open(input, text, reading)
    total = _count(input, reading)
    drawn = _draw(total, config)
    looked: list[Looked] = []
    wanted = iter(row for number, row in enumerate(rows) if drawn is None or number in drawn)
    with Progress(total if drawn is None else len(drawn), "analyze", "rows") as progress:
        numbers = iter(range(total) if drawn is None else sorted(drawn))
        while chunk := list(islice(wanted, _CHUNK)):
            places = [next(numbers) for _ in chunk]
            made = [
                Looked(number, row.sample_id, row.text, error)
                for number, (row, error) in zip(places, chunk, strict=True)
            ]
            usable = [(found, row) for found, (row, error) in zip(made, chunk, strict=True) if not error]
            outcomes = measure(operators, [row for _, row in usable])
            for (found, _), said in zip(usable, outcomes, strict=True):
                if len(said) == 1 and said[0].step == "error":
                    found.refused = (said[0].reason or "").removeprefix("error: ")
                else:
                    found.outcomes = said
            looked += made
            progress.update(len(chunk))
    return text, total, looked


def _open(input: str, text: str, reading: Reading) -> tuple[str, Iterator[tuple[Row, str]]]:
    """Which text is looked at, and all rows, each with the reason why it cannot be used."""
    directory = Path(input)
    if directory.is_dir() and holds_records(directory):
        return text, _of_records(directory, text)
    return "caption", _of_dataset(input, reading)


def _of_records(directory: Path, text: str) -> Iterator[tuple[Row, str]]:
    import pyarrow.parquet as pq

    for shard in shard_paths(directory):
        columns = ["sample_id", "image", "image_uri", text, "error", "meta"]
        for batch in pq.ParquetFile(shard).iter_batches(_CHUNK, columns=columns):
            for row in batch.to_pylist():
                words = row[text] or ""
                found = Row(row["sample_id"], words, row["image"], row["image_uri"], json.loads(row["meta"] or "{}"))
                yield found, row["error"] or ("" if words.strip() else f"no text: {text} is empty")


def _of_dataset(input: str, reading: Reading) -> Iterator[tuple[Row, str]]:
    for row in open_dataset(input, reading).rows():
        reason = row.error or ("" if row.caption.strip() else "no text: its caption is empty")
        if not reason and row.image is None and row.image_uri is None:
            reason = f"bad row: it has {len(row.pictures) or 'no'} image(s)"
        yield Row(row.where, row.caption, row.image, row.image_uri, row.meta), reason


def _count(input: str, reading: Reading) -> int:
    """How many rows there are; no image of records is read for that."""
    import pyarrow.parquet as pq

    directory = Path(input)
    if directory.is_dir() and holds_records(directory):
        return sum(pq.read_metadata(shard).num_rows for shard in shard_paths(directory))
    return sum(1 for _ in open_dataset(input, reading).rows())


def _draw(total: int, config: AnalyzeConfig) -> set[int] | None:
    """The numbers of the rows that are drawn; None: all of them."""
    if not total > config.rows > 0:
        return None

    def chance(number: int) -> bytes:
        return hashlib.blake2b(f"{config.seed}/{number}".encode(), digest_size=8).digest()

    return set(heapq.nsmallest(config.rows, range(total), key=chance))


def _unusable(looked: Sequence[Looked]) -> dict[str, int]:
    return dict(Counter(error_kind(row.refused) for row in looked if row.refused).most_common())


def _values(operators: Sequence[Operator], columns: Sequence[Sequence[Outcome]]) -> dict[tuple[str, str], np.ndarray]:
    """(operator, stat) -> float [F], NaN where a row has no such number."""
    import numpy as np

    found = {}
    for operator, column in zip(operators, columns, strict=True):
        names = dict.fromkeys(name for outcome in column for name in outcome.stats)
        for name in names:
            numbers = [single(outcome.stats.get(name)) for outcome in column]
            if any(number is not None for number in numbers):
                found[operator.label, name] = np.array([np.nan if n is None else n for n in numbers])
    return found


def _passes(columns: Sequence[Sequence[Outcome]]) -> np.ndarray:
    """bool [operators, F]."""
    import numpy as np

    return np.array([[outcome.step is None for outcome in column] for column in columns])


def _others(passes: np.ndarray, bounds: Sequence[Sequence[Bound]]) -> np.ndarray:
    """bool [F]: rows that the operators without a bound of their own keep."""
    import numpy as np

    left_F = np.ones(passes.shape[1], dtype=bool)
    for row, own in zip(passes, bounds, strict=True):
        if not own:
            left_F &= row
    return left_F


def _alone(passes: np.ndarray) -> list[float]:
    """For each operator the share of rows that it rejects and all others keep."""
    once_F = (~passes).sum(axis=0) == 1
    return [float((~row & once_F).mean()) for row in passes]


def _operator_facts(
    operator: Operator,
    column: Sequence[Outcome],
    alone: float,
    values: dict[tuple[str, str], np.ndarray],
    bounds: Sequence[tuple[Bound, Bound]],
    rows: Sequence[Looked],
) -> dict[str, Any]:
    stats = [
        _stat_facts(name, found, [pair for pair in bounds if (pair[0].operator, pair[0].stat) == (label, name)], rows)
        for (label, name), found in values.items()
        if label == operator.label
    ]
    return {
        "label": operator.label,
        "kind": operator.kind,
        "kept": sum(outcome.step is None for outcome in column) / len(column),
        "alone": alone,
        "failed": sum(outcome.failed for outcome in column),
        "stats": stats,
    }


def _stat_facts(
    name: str, values_F: np.ndarray, bounds: Sequence[tuple[Bound, Bound]], rows: Sequence[Looked]
) -> dict[str, Any]:
    import numpy as np

    finite = values_F[np.isfinite(values_F)]
    counts, edges = np.histogram(finite, bins=_bins(finite))
    return {
        "name": name,
        "mean": float(finite.mean()),
        "sd": float(finite.std()),
        "percentiles": dict(zip(map(str, PERCENTILES), np.percentile(finite, PERCENTILES).tolist(), strict=True)),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "bounds": [
            {
                "parameter": bound.parameter,
                "low": bound.low,
                "value": bound.value if np.isfinite(bound.value) else None,
                "proposed": new.written(),
                "cuts": float((~bound.keeps(finite)).mean()),
                "proposed_cuts": float((~new.keeps(finite)).mean()),
                "examples": [
                    {"at": name, "value": each.value, **_nearest(each, values_F, rows)}
                    for name, each in (("now", bound), ("proposed", new))
                    if not each.keeps(finite).all()
                ],
            }
            for bound, new in bounds
        ],
    }


def _bins(values: np.ndarray) -> np.ndarray:
    """Edges of the histogram's bars: over the middle 99.8 %, one bar a number where there are few whole ones. What lies
    farther out is in no bar.
    """
    import numpy as np

    low, high = np.quantile(values, (0.001, 0.999))
    if low == high:
        return np.array([low - 0.5, high + 0.5])
    if bool((values == np.round(values)).all()):
        step = max(1, int(np.ceil((high - low + 1) / _BARS)))
        return np.arange(low - 0.5, high + 0.5 + step, step)
    return np.linspace(low, high, _BARS + 1)


def _nearest(bound: Bound, values_F: np.ndarray, rows: Sequence[Looked]) -> dict[str, list[dict[str, Any]]]:
    """Rows that the bound just keeps, and just rejects, the nearest first; of several alike the first."""
    import numpy as np

    side_F = bound.keeps(values_F)
    found = {}
    for name, mask in (("kept", side_F), ("rejected", ~side_F & np.isfinite(values_F))):
        places = np.flatnonzero(mask)
        near = places[np.argsort(np.abs(values_F[places] - bound.value), kind="stable")] if len(places) else places
        found[name] = [
            {"row": rows[at].number, "where": rows[at].where, "text": rows[at].text, "value": float(values_F[at])}
            for at in near[:EXAMPLES].tolist()
        ]
    return found


def _correlations(values: dict[tuple[str, str], np.ndarray]) -> dict[str, Any]:
    """Spearman's, over the rows that have all stats; of a stat that does not vary there is none."""
    import numpy as np
    from scipy.stats import rankdata

    varying = {name: found for (_, name), found in values.items() if np.nanstd(found) > 0}
    names = list(varying)
    if len(names) < 2:
        return {"stats": names, "matrix": [[1.0]] * len(names)}
    table = np.stack([varying[name] for name in names])
    ranks = np.stack([rankdata(row) for row in table[:, np.isfinite(table).all(axis=0)]])
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.corrcoef(ranks) if ranks.shape[1] > 1 else np.full((len(names), len(names)), np.nan)
    return {"stats": names, "matrix": [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in matrix]}


def _examples(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for operator in facts["operators"]:
        for stat in operator["stats"]:
            for bound in stat["bounds"]:
                for place in bound["examples"]:
                    yield from place["kept"]
                    yield from place["rejected"]


def _with(process: Process, operators: Sequence[Operator], bounds: Sequence[Bound]) -> Process:
    """The recipe with these bounds."""
    made: Process = []
    for operator, entry in zip(operators, process, strict=True):
        ((name, given),) = entry.items()
        own = {bound.parameter: bound.written() for bound in bounds if bound.operator == operator.label}
        made.append({name: {**given, **own}})
    return made


def _pictures(input: str, numbers: set[int], reading: Reading) -> dict[int, bytes | str]:
    """Images of some rows, or where they lie; the dataset is read once more, since none was kept."""
    _, rows = _open(input, "caption", reading)
    found: dict[int, bytes | str] = {}
    for number, (row, _) in enumerate(rows):
        if number in numbers and (image := row.image or row.image_uri):
            found[number] = image
        if len(found) == len(numbers):
            break
    return found
