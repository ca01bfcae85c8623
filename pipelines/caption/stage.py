"""`captune caption`: a dataset in any format becomes records with BLIP-2 captions.

Three passes, each continued after a kill:

    dataset --index--> _work/index-* --decode, caption (Ray Data, checkpointed)--> _work/shards --finish--> *.parquet +
    MANIFEST.json

Only encoded bytes or model-sized uint8 pixels travel through the object store; captions come back without their images
and are joined to the index at the end, in the dataset's order, so an interrupted run ends in the same files as an
undisturbed one. A dataset that has grown since is captioned into the same directory: the finished records are results
already.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.blip2 import checkpoint
from pipelines.caption.config import CaptionConfig
from pipelines.caption.dataflow import caption_index
from pipelines.caption.finish import write_records
from pipelines.caption.guards import refuse_useless
from pipelines.caption.index import build_index
from pipelines.caption.results import Results, count_work
from pipelines.caption.watch import SHEET
from pipelines.connection import connect
from pipelines.errors import UserError, WorkFailed
from pipelines.failures import explained
from pipelines.formats import Dataset, open_dataset
from pipelines.lock import hold, release
from pipelines.manifest import MANIFEST, StageOutput, fingerprint, open_stage
from pipelines.modelfiles import model_identity
from pipelines.progress import say

WORK = "_work"
GROWS = ("input", "rows_per_shard")
"""Keys of `inputs` that may change between two runs: the captions that are there stand."""
_STOPPED = "stopped"
"""In `WORK`: why the last try ended. The next one tries again what failed in it."""


def run(input: str, output: Path, config: CaptionConfig, *, restart: bool = False) -> dict[str, Any]:
    """Caption a dataset, or what is new in it since it was captioned into the same directory.

    Args:
        input: dataset in any format `pipelines.formats` reads.
        output: receives Parquet shards of records, at most `rows_per_shard` rows each, and MANIFEST.json last.
        restart: throw away another run's output there.

    Returns:
        The manifest.

    Raises:
        UserError: no dataset, no model, or an output directory that holds something else.
        WorkFailed: the work broke off (run again to continue), a guard stopped it, or rows went missing.
    """
    output = Path(output).resolve()  # Ray's workers have other working directories
    dataset = open_dataset(input, config.reading)
    model = checkpoint.resolve(config.model)
    checkpoint.check(model, config.prompt, config.max_new_tokens)
    if config.candidates.clip_model:
        checkpoint.check_clip(checkpoint.resolve(config.candidates.clip_model, "caption.candidates.clip_model"))
    wanted = inputs(dataset, model, config)
    stage = open_stage(output, "caption", wanted, restart=restart, grows=GROWS)
    work = stage.directory / WORK
    if stage.complete:
        _clear_up(output, work)
        say(f"caption: {output} is complete already ({stage.manifest['rows_out']} rows)")
        return stage.manifest
    results = Results(work, fingerprint({key: value for key, value in wanted.items() if key not in GROWS}))
    connect()
    with _naming_the_output(output):
        if stage.grown:
            _take_over(stage, results)
        return _caption(dataset, work / f"index-{wanted['input']}", results, model, config, stage)


def _clear_up(output: Path, work: Path) -> None:
    """Remove what a kill between the manifest and the clean-up has left, unless somebody is at work there by now."""
    if work.exists():
        with suppress(UserError, OSError):
            hold(output)
            if (output / MANIFEST).exists():
                shutil.rmtree(work)
            release(output)


def inputs(dataset: Dataset, model: Path, config: CaptionConfig) -> dict[str, Any]:
    """Everything that decides the captions of a dataset."""
    decides = {"model": model_identity(model), **config.decides()}
    return {**decides, "input": dataset.identity(), "rows_per_shard": config.rows_per_shard}


def _caption(
    dataset: Dataset, index: Path, results: Results, model: Path, config: CaptionConfig, stage: StageOutput
) -> dict[str, Any]:
    """The three passes and the manifest."""
    for stale in set(index.parent.glob("index*")) - {index}:  # the dataset has changed since
        shutil.rmtree(stale)
    if not index.exists():
        seen = build_index(dataset, index, config.prompt_key)
        try:
            refuse_useless(seen.rows, seen.failed, seen.example, config.guards)
        except WorkFailed:
            shutil.rmtree(index)  # made anew when the files are where they should be
            raise
    stopped = index.parent / _STOPPED
    if stopped.exists():
        results.forget_failed()
        stopped.unlink()
    todo = count_work(index, results)
    sheet = index.parent / SHEET
    started = time.monotonic()
    try:
        caption_index(index, results, todo, model, checkpoint.pixel_spec(model, config.resize), config, sheet)
        seconds = max(time.monotonic() - started, 1e-9)
        facts = write_records(index, results.tables(), stage.directory, config.rows_per_shard)
    except WorkFailed as reason:
        stopped.write_text(str(reason))
        raise
    if facts["rows_in"] != facts["rows_out"]:
        raise WorkFailed(f"{stage.directory}: {facts['rows_in']} rows came in and {facts['rows_out']} went out")
    if sheet.exists():
        sheet.replace(stage.directory / SHEET)
    new = todo.rows - todo.done
    manifest = stage.finish(
        clear=index.parent,
        **facts,
        model={"path": str(model), "identity": stage.inputs["model"]},
        input={"path": str(dataset.path), "format": dataset.format},
        resumed_rows=todo.done,
        new_rows=new,
        images_per_second=round(new / seconds, 3),
        caption_seconds=round(seconds, 3),
    )
    say(_summary(manifest))
    return manifest


def _summary(manifest: dict[str, Any]) -> str:
    """Where every input row went."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in manifest["failed"].items())
    failed = f"{sum(manifest['failed'].values())} failed{f' ({kinds})' if kinds else ''}"
    return (
        f"caption: {manifest['rows_in']} rows in: {manifest['captioned']} captioned, {failed}, "
        f"{manifest['duplicates']} duplicates"
    )


def _take_over(stage: StageOutput, results: Results) -> None:
    """An earlier run's captions stand, finished or not; only what is new is captioned."""
    if stage.manifest:
        say(f"caption: {stage.directory} holds {stage.manifest['rows_out']} rows; captioning what is new")
        results.carry_over(stage.directory)
    stage.accept()


@contextmanager
def _naming_the_output(output: Path) -> Iterator[None]:
    """A volume's refusal without a path is of the output."""
    try:
        yield
    except OSError as error:
        if known := explained(error, output):
            raise known from error
        raise
