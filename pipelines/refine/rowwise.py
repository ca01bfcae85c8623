"""Row-wise operators on Ray Data: read what they look at, run them batch by batch, bring back the verdicts and nothing
else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import groups
from pipelines.demand import CPU
from pipelines.errors import UserError, WorkFailed
from pipelines.failures import explained
from pipelines.progress import Progress
from pipelines.records import source_id
from pipelines.refine.apply import Outcome, Row, run_operators
from pipelines.refine.config import RefineConfig
from pipelines.refine.operators import Operator, Process, build

if TYPE_CHECKING:
    import pyarrow as pa
    import ray


_PROBLEM = "problem"
"""In place of a `sample_id`: a worker's error for the user. Ray would wrap the exception itself and lose its class on
the way."""
_RAISED = {error.__name__: error for error in (UserError, WorkFailed)}


def run_stretch(
    process: Process,
    stretch: Sequence[tuple[int, Operator]],
    shards: Sequence[Path],
    outcomes: dict[str, Outcome],
    config: RefineConfig,
    what: str,
) -> None:
    """Run consecutive row-wise operators over the rows that are still alive, and update `outcomes` in place.

    Args:
        process: the whole recipe; workers build their own operators from it, because some cannot be pickled.
        stretch: (position in `process`, operator) of the operators to run.
        outcomes: by `records.text_id`.
        shards: Parquet shards of records that hold every sample of `outcomes`.
        what: what the progress line says.
    """
    import numpy as np
    import pyarrow as pa
    import ray

    alive = sorted(
        (key for key, outcome in outcomes.items() if outcome.step is None), key=lambda key: (source_id(key), key)
    )
    if not alive:
        return
    # Arrays and not a dictionary: workers map them from the object store instead of each unpickling a million strings.
    samples = np.array([source_id(key).encode() for key in alive])
    texts = pa.array([outcomes[key].text for key in alive], pa.string())
    columns = ["sample_id"]
    if any(operator.reads_images for _, operator in stretch):
        columns += ["image", "image_uri"]
    if any(operator.reads_fields for _, operator in stretch):
        columns.append("meta")
    with groups.data_context(CPU) as context:
        context.enable_progress_bars = False  # our own line says it
        dataset = ray.data.read_parquet([str(path) for path in shards]).select_columns(columns)
    dataset = dataset.map_batches(
        _verdicts,  # type: ignore[arg-type]  # Ray's annotation leaves out functions with keyword arguments
        batch_size=config.batch_size,
        batch_format="pyarrow",
        num_cpus=config.cpus_per_task,
        fn_kwargs={
            "process": json.dumps(process),
            "positions": tuple(position for position, _ in stretch),
            "alive": ray.put((samples, pa.array(alive, pa.string()), texts)),
        },
    )
    rejected = 0
    with Progress(len(alive), f"{what}: {_names(stretch)}") as progress:
        batch: pa.Table
        for batch in _explaining(dataset, shards[0].parent):
            for row in batch.to_pylist():
                if row["sample_id"] == _PROBLEM:
                    raise _RAISED[row["step"]](row["reason"])
                outcome = outcomes[row["sample_id"]]
                if outcome.step is None:  # a repeated sample comes twice, with the same verdict
                    outcome.text, outcome.step, outcome.reason = row["text"], row["step"], row["reason"]
                    outcome.stats |= json.loads(row["stats"])
                    rejected += outcome.step is not None
            progress.update(batch.num_rows, f"{rejected} rejected")


def _explaining(dataset: ray.data.Dataset, input: Path) -> Iterator[pa.Table]:
    """Its batches; what Ray says of a worker's end becomes a sentence."""
    import ray

    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")  # type: ignore[misc]
    except ray.exceptions.RayError as error:
        if known := explained(error, input, "refine.batch_size (arms.NAME.batch_size)"):
            raise known from error
        raise


def _names(stretch: Sequence[tuple[int, Operator]]) -> str:
    first = stretch[0][1].label
    return first if len(stretch) == 1 else f"{first} and {len(stretch) - 1} more operators"


def _verdicts(batch: pa.Table, *, process: str, positions: tuple[int, ...], alive: ray.ObjectRef) -> pa.Table:
    """One Ray Data batch (columns `sample_id` and perhaps `image`, `image_uri`, `meta`) to verdicts on those of its
    texts that are alive.
    """
    import numpy as np
    import pyarrow as pa
    import ray

    samples, keys, texts = ray.get(alive)
    wanted = np.array([sample_id.encode() for sample_id in batch["sample_id"].to_pylist()])
    first, end = np.searchsorted(samples, wanted, "left"), np.searchsorted(samples, wanted, "right")
    found = end > first
    records = batch.filter(pa.array(found)).to_pylist()
    rows = [
        Row(
            keys[at].as_py(),
            texts[at].as_py(),
            record.get("image"),
            record.get("image_uri"),
            json.loads(record.get("meta") or "{}"),
        )
        for record, begin, stop in zip(records, first[found].tolist(), end[found].tolist(), strict=True)
        for at in range(begin, stop)  # a sample may have several texts
    ]
    sample_ids = [row.sample_id for row in rows]
    try:
        operators = _operators(process)
        done = run_operators([operators[position] for position in positions], rows)
    except (UserError, WorkFailed) as error:
        sample_ids, done = [_PROBLEM], [Outcome("", step=type(error).__name__, reason=str(error))]
    return pa.table(
        {
            "sample_id": pa.array(sample_ids, pa.string()),
            "text": pa.array([outcome.text for outcome in done], pa.string()),
            "stats": pa.array([json.dumps(outcome.stats, ensure_ascii=False) for outcome in done], pa.string()),
            "step": pa.array([outcome.step for outcome in done], pa.string()),
            "reason": pa.array([outcome.reason for outcome in done], pa.string()),
        }
    )


@lru_cache(maxsize=2)
def _operators(process: str) -> list[Operator]:
    """Operators of a worker process: models and compiled patterns are built once, not once a batch."""
    return build(json.loads(process), check=False)
