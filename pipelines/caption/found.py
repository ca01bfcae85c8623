"""A caption set that is the dataset's own: records as captioning makes them, every picture looked at, and no model.

    dataset --index--> _work/index --decode (Ray tasks)--> *.parquet + MANIFEST.json

Killed halfway it starts over, because nothing in it is slow; a dataset that has grown since is gone through again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.caption.config import CaptionConfig
from pipelines.caption.finish import write_records
from pipelines.caption.guards import refuse_useless
from pipelines.caption.index import build_index, content, index_files
from pipelines.caption.results import result_schema
from pipelines.caption.stage import GROWS, WORK
from pipelines.connection import connect
from pipelines.formats import Dataset, open_dataset
from pipelines.images import BadImage, decode
from pipelines.manifest import open_stage
from pipelines.progress import Progress, say
from pipelines.tasks import in_tasks

if TYPE_CHECKING:
    import pyarrow as pa


def run(input: str, output: Path, config: CaptionConfig, *, restart: bool = False) -> dict[str, Any]:
    """Records of a dataset, with its own captions.

    Args:
        config: of its keys `rows_per_shard` and `guards` are used.

    Returns:
        The manifest.

    Raises:
        UserError: no dataset, or an output directory that holds something else.
        WorkFailed: not one row can be used.
    """
    output, dataset = Path(output).resolve(), open_dataset(input, config.reading)
    stage = open_stage(output, "caption", inputs(dataset, config), restart=restart, grows=GROWS)
    if stage.complete:
        say(f"caption: {output} is complete already ({stage.manifest['rows_out']} rows)")
        return stage.manifest
    if stage.grown:
        stage.accept()
    connect()
    work = output / WORK
    shutil.rmtree(work, ignore_errors=True)
    seen = build_index(dataset, work / "index")
    refuse_useless(seen.rows, seen.failed, seen.example, config.guards)
    facts = write_records(work / "index", _looked_at(work / "index"), output, config.rows_per_shard)
    failed = sum(facts["failed"].values())
    say(f"caption: {facts['rows_in']} rows in with the captions they have, {failed} failed")
    where = {"path": str(dataset.path), "format": dataset.format}
    return stage.finish(clear=work, **facts, text="caption", input=where)


def inputs(dataset: Dataset, config: CaptionConfig) -> dict[str, Any]:
    """Everything that decides these records."""
    return {"captions": "found", "input": dataset.identity(), "rows_per_shard": config.rows_per_shard}


def _looked_at(index: Path) -> Iterator[pa.Table]:
    """Results of the rows of an index: no caption, and an error where there is no picture."""
    with Progress(None, "caption: looking at the pictures") as progress:
        for table in in_tasks(_look, ((file,) for file in index_files(index))):
            yield table
            progress.update(len(table))


def _look(file: Path) -> pa.Table:
    """One index file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for row in pq.read_table(file).to_pylist():
        if not row["skip"]:
            rows.append({"sample_id": row["sample_id"], "error": _error(row)})
    return pa.Table.from_pylist(rows, schema=result_schema())


def _error(row: dict[str, Any]) -> str | None:
    try:
        decode(content(row))
    except BadImage as problem:
        return f"{problem} ({row['where']})"
    return None
