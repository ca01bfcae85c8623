"""`captune caption`: a dataset in any format becomes records with BLIP-2 captions.

Three passes, each continued after a kill:

    dataset --index--> _work/index --decode, caption (Ray Data, checkpointed)--> _work/shards --finish--> *.parquet + MANIFEST.json

Only encoded bytes or model-sized uint8 pixels travel through the object store; captions come back without their images and are
joined to the index at the end, in the dataset's order, so an interrupted run ends in the same files as an undisturbed one.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from pipelines.caption import checkpoint
from pipelines.caption.config import CaptionConfig
from pipelines.caption.finish import Results, write_records
from pipelines.caption.index import build_index
from pipelines.caption.work import caption_index
from pipelines.errors import WorkFailed
from pipelines.formats import open_dataset
from pipelines.manifest import identity, open_stage
from pipelines.progress import say

WORK = "_work"


def run(input: str, output: Path, config: CaptionConfig, *, restart: bool = False) -> dict[str, Any]:
    """Caption a dataset.

    Args:
        input: dataset in any format `pipelines.formats` reads.
        output: receives Parquet shards of records, at most `rows_per_shard` rows each, and MANIFEST.json last.
        restart: throw away another run's output there.

    Returns:
        The manifest.

    Raises:
        UserError: no dataset, no model, or an output directory that holds something else.
        WorkFailed: the work broke off (run again to continue) or rows went missing.
    """
    output = Path(output).resolve()  # Ray's workers have other working directories
    dataset = open_dataset(input)
    model = checkpoint.resolve(config.model)
    checkpoint.check(model, config.prompt, config.max_new_tokens)
    stage = open_stage(output, "caption", _what_decides(config, model, dataset.identity()), restart=restart)
    work = stage.directory / WORK
    if stage.complete:
        shutil.rmtree(work, ignore_errors=True)  # a kill between the manifest and the clean-up
        say(f"caption: {output} is complete already ({stage.manifest['rows_out']} rows)")
        return stage.manifest
    if not (work / "index").exists():
        build_index(dataset, work / "index")
    results = Results(work, stage.fingerprint)
    resumed = results.count()
    started = time.monotonic()
    caption_index(work, results, model, checkpoint.pixel_spec(model), config)
    seconds = max(time.monotonic() - started, 1e-9)
    facts = write_records(work / "index", results, stage.directory, config.rows_per_shard)
    if facts["rows_in"] != facts["rows_out"]:
        raise WorkFailed(f"{output}: {facts['rows_in']} rows came in and {facts['rows_out']} went out")
    new = results.count() - resumed
    manifest = stage.finish(
        **facts,
        model={"path": str(model), "identity": stage.inputs["model"]},
        input={"path": str(dataset.path), "format": dataset.format},
        resumed_rows=resumed,
        images_per_second=round(new / seconds, 3),
        caption_seconds=round(seconds, 3),
    )
    shutil.rmtree(work)
    return manifest


def _what_decides(config: CaptionConfig, model: Path, data: str) -> dict[str, Any]:
    """The fingerprint: what the captions and their shards depend on."""
    return {
        "input": data,
        "model": identity(model),
        **config.decides(),
        "rows_per_shard": config.rows_per_shard,
    }
