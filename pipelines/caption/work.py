"""Second pass: the index through decoders and model replicas on Ray Data, with Ray Data's checkpointing keyed by `sample_id`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.caption.config import CaptionConfig
from pipelines.caption.finish import Results, count_work
from pipelines.caption.index import index_files
from pipelines.caption.pixels import PixelSpec
from pipelines.caption.sizing import size_pass
from pipelines.errors import WorkFailed
from pipelines.images import BadImage, decode, read_bytes
from pipelines.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import DataContext

_READ = ["sample_id", "image", "image_uri", "where", "skip"]
_POLL_SECONDS = 0.5


def caption_index(work: Path, results: Results, model: Path, spec: PixelSpec, config: CaptionConfig) -> None:
    """Caption every index row that has no committed result yet.

    Raises:
        UserError: the cluster is too small for one replica.
        WorkFailed: the pass broke off for good; what is done is kept, and the same command continues.
    """
    import ray
    from ray.data import ActorPoolStrategy
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    total, done = count_work(work / "index"), results.count()
    if done >= total:
        return  # nothing left: no need to load a model to learn that
    cluster = ray.cluster_resources()
    sizing = size_pass(config, cluster.get("CPU", 0.0), cluster.get("GPU", 0.0))
    # Beside the driver, whose node the run cannot lose anyway: on any other, losing that node would end the run for the sake of a counter.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    tally = ray.remote(num_cpus=0, scheduling_strategy=here)(Tally).remote()
    with _quiet_data_context(results), _watch(tally, Progress(total, "caption", "images"), done):
        files = [str(file) for file in index_files(work / "index")]
        rows = ray.data.read_parquet(files, num_cpus=sizing.task_cpus, override_num_blocks=len(files))
        pixels = rows.select_columns(_READ).map_batches(
            decode_batch,  # type: ignore[arg-type]
            batch_format="pyarrow",
            batch_size=config.batch_size,
            num_cpus=sizing.task_cpus,
            fn_kwargs={"spec": spec},
        )
        captions = pixels.map_batches(
            Captioner,
            fn_constructor_args=(model, spec, config, tally),
            batch_format="pyarrow",
            batch_size=config.batch_size,
            num_cpus=sizing.actor_cpus,
            num_gpus=config.gpus_per_actor,
            compute=ActorPoolStrategy(size=sizing.actors),
        )
        try:
            captions.write_parquet(str(results.shards), ray_remote_args={"num_cpus": sizing.task_cpus})
        except ray.exceptions.RayError as error:
            raise WorkFailed(
                f"captioning broke off: {_cause(error)}. What is done is kept; the same command continues"
            ) from error


def decode_batch(table: pa.Table, spec: PixelSpec) -> pa.Table:
    """Index rows -> `sample_id`, `pixels` (uint8 bytes of (3, H, W), null when there is no picture), `error`."""
    ids: list[str] = []
    pixels: list[bytes | None] = []
    errors: list[str | None] = []
    for row in table.to_pylist():
        if row["skip"]:
            continue
        try:
            data = row["image"] if row["image"] is not None else read_bytes(row["image_uri"])
            pixels.append(spec.pixels(decode(data, max_side=spec.draft_side)).tobytes())
            errors.append(None)
        except BadImage as problem:
            pixels.append(None)
            errors.append(f"{problem} ({row['where']})")
        ids.append(row["sample_id"])
    return _table(ids, pixels=pixels, error=errors)


class Captioner:
    """One model replica in a Ray actor."""

    def __init__(self, model: Path, spec: PixelSpec, config: CaptionConfig, tally: Any) -> None:
        import torch
        from transformers.utils import logging as transformers_logging

        from pipelines.caption.engine import BlipCaptioner

        transformers_logging.disable_progress_bar()
        on_gpu = config.gpus_per_actor > 0
        if not on_gpu:
            torch.set_num_threads(max(1, round(config.cpus_per_actor)))
        self._engine = BlipCaptioner(model, config, "cuda" if on_gpu else "cpu")
        self._shape = (3, spec.height, spec.width)
        self._tally = tally

    def __call__(self, table: pa.Table) -> pa.Table:
        """`decode_batch`'s table -> `sample_id`, `recaption` (null when failed), `error`."""
        import numpy as np

        found = [data for data in table.column("pixels").to_pylist() if data is not None]
        batch = np.frombuffer(bytearray(b"".join(found)), np.uint8).reshape(-1, *self._shape)
        ids, errors = table.column("sample_id").to_pylist(), table.column("error").to_pylist()
        good = [row for row, error in enumerate(errors) if error is None]
        texts: list[str | None] = [None] * len(errors)
        for row, captioned in zip(good, self._engine.caption(batch, [ids[row] for row in good]), strict=True):
            texts[row], errors[row] = captioned.chosen, captioned.error
        self._tally.add.remote(len(errors), sum(error is not None for error in errors))
        return _table(ids, recaption=texts, error=errors)


class Tally:
    """Counts of this run, kept in an actor of no CPU; retried batches count twice here, which is why only progress reads it."""

    def __init__(self) -> None:
        self.rows = self.failed = 0

    def add(self, rows: int, failed: int) -> None:
        """One more batch is through the model."""
        self.rows += rows
        self.failed += failed

    def get(self) -> tuple[int, int]:
        """Rows and failed rows so far."""
        return self.rows, self.failed


def _table(ids: list[str], **columns: list[Any]) -> pa.Table:
    import pyarrow as pa

    types = {"pixels": pa.large_binary(), "recaption": pa.string(), "error": pa.string()}
    arrays = {name: pa.array(values, types[name]) for name, values in columns.items()}
    return pa.table({"sample_id": pa.array(ids, pa.string()), **arrays})


@contextmanager
def _quiet_data_context(results: Results) -> Iterator[DataContext]:
    """Ray Data's settings for this pass only: checkpointing on, faults tolerated, its own bars and plans off the screen."""
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

    results.make_directories()
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    # The newer reader packs files into blocks by bytes, and index files are small: a thousand images would be one block, done or
    # lost as a whole. The older one makes a task per file, as the index means it.
    context.use_datasource_v2 = False
    context.max_consecutive_actor_init_deaths = 3
    context.checkpoint_config = CheckpointConfig(
        id_column="sample_id", checkpoint_path=str(results.checkpoint), delete_checkpoint_on_success=False
    )
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with DataContext.current(context):
            yield context
    finally:
        logger.setLevel(level)


@contextmanager
def _watch(tally: Any, progress: Progress, done: int) -> Iterator[None]:
    """Print the tally while the main thread waits for Ray Data."""
    import ray

    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(_POLL_SECONDS):
            show()

    def show() -> None:
        rows, failed = ray.get(tally.get.remote())
        fresh = min(done + rows, progress.total or 0) - progress.done
        # silence would look like a hang: a replica takes a while to load, and nothing comes back before
        progress.update(max(fresh, 0), f"{failed} failed" if failed else "captioning" if rows else "starting the model")

    if done:
        progress.start_at(done)
    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
        show()
    finally:
        stop.set()
        thread.join()
        progress.close()


def _cause(error: BaseException) -> str:
    """The last line of a Ray error says what happened; the rest is a traceback through Ray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
