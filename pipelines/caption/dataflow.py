"""Second pass: the index through decoders and model replicas on Ray Data, with Ray Data's checkpointing keyed by
`sample_id`.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import groups
from pipelines.blip2.pixels import PixelSpec
from pipelines.caption.config import CaptionConfig
from pipelines.caption.index import index_files
from pipelines.caption.replica import Captioner, DecodingCaptioner, decode_batch
from pipelines.caption.results import Results, Work
from pipelines.caption.sizing import Sizing, rows_per_batch, size_pass
from pipelines.caption.tally import Tally
from pipelines.caption.watch import Watch
from pipelines.demand import CPU
from pipelines.errors import WorkFailed
from pipelines.failures import explained
from pipelines.progress import Progress

if TYPE_CHECKING:
    from ray.data import DataContext, Dataset

_READ = ["sample_id", "image", "image_uri", "caption", "meta", "where", "result_of", "skip"]
_AT_ONCE, _IN_FLIGHT = 3, 4
"""Index files that a replica works on at once, so that its slots never wait for one's images; and with those that lie
ready there."""
# A driver that was killed keeps its share of the cluster until its request expires, and Ray Data divides whole CPUs
# among all requests: after a few kills nothing would be left for the writers of the run that continues. Requests are
# renewed every ten seconds. Ray reads this on import.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
_NAMED = re.compile(r"[\w.]*(Error|Exception|Tripped)\b.*:")
_PATIENCE_SECONDS = 7200.0
"""A cluster that scales by itself may take long to find a GPU; a run without any progress for so long is a failed
one."""


def caption_index(
    index: Path, results: Results, work: Work, model: Path, spec: PixelSpec, config: CaptionConfig, sheet: Path
) -> None:
    """Caption every index row that has no committed result yet.

    Args:
        index: directory of index files.
        work: what `count_work` found in it.
        sheet: where the contact sheet goes.

    Raises:
        UserError: the cluster is too small for one replica.
        WorkFailed: the pass broke off for good, or a guard stopped it; what is done is kept, and the same command
            continues.
    """
    import ray
    from ray.data import ActorPoolStrategy

    if work.done >= work.rows:
        return  # nothing left: no need to load a model to learn that
    group = config.demand().group
    most = groups.room(groups.at_most(), CPU, group)  # one that starts without GPUs may still get some
    sizing = size_pass(config, sum(node.cpus for node in most), sum(node.gpus for node in most))
    beside = sizing.actors * sizing.actor_cpus if group != CPU else 0.0
    # Each part where it belongs. A label of its own would keep Ray Data from fusing parts that share a group.
    feeding, captioning = (groups.selector(CPU), groups.selector(group)) if group != CPU else ({}, {})
    tally = _beside_this_driver(work.rows - work.done, config)
    progress = Progress(work.rows, "caption", "images")
    with (
        groups.data_context(CPU, group, cpus=beside) as context,
        _quietly(context, results),
        Watch(tally, progress, work.done, sheet) as watch,
    ):
        files = [str(file) for file in reversed(index_files(index))]
        fused = sizing.decode_inside and not results.any()
        read = ray.data.read_parquet(
            files,
            columns=_READ,
            # with as many CPUs as a replica Ray Data reads inside it; its checkpoint filter, on a resumed run, would
            # stand between
            num_cpus=sizing.actor_cpus if fused else sizing.task_cpus,
            override_num_blocks=len(files),
            concurrency=None if fused else sizing.feeders,
            ray_remote_args={"label_selector": feeding},
        )
        pool = ActorPoolStrategy(
            min_size=sizing.actors,
            max_size=sizing.max_actors,
            max_tasks_in_flight_per_actor=_IN_FLIGHT,
            max_concurrent_calls_per_actor=_AT_ONCE,
            enable_true_multi_threading=True,
        )
        source, batch = read, None
        if not sizing.decode_inside:
            source = _decoded(read, sizing, spec, config, feeding)
            batch = rows_per_batch(config, spec.row_bytes, ray.cluster_resources().get("object_store_memory", 0.0))
        captions = source.map_batches(
            DecodingCaptioner if sizing.decode_inside else Captioner,
            fn_constructor_args=(model, spec, config, tally),
            batch_format="pyarrow",
            batch_size=batch,
            num_cpus=sizing.actor_cpus,
            num_gpus=config.gpus_per_actor,
            compute=pool,
            label_selector=captioning,
        )
        try:
            captions.write_parquet(
                str(results.shards),
                ray_remote_args={"num_cpus": sizing.task_cpus, "label_selector": feeding},
                concurrency=sizing.writers,
            )
        except ray.exceptions.RayError as error:
            if not watch.stopped():
                if known := explained(error, index.parent, "caption.batch_size"):
                    raise known from error
                raise WorkFailed(
                    f"captioning into {index.parent} broke off: {_cause(error)}. What is done is kept; the "
                    f"same command continues"
                ) from error
    if reason := watch.stopped():
        raise WorkFailed(
            f"captioning stopped itself: {reason}. What is done is kept; put it right and the same command continues"
        )


def _decoded(read: Dataset, sizing: Sizing, spec: PixelSpec, config: CaptionConfig, where: dict[str, str]) -> Dataset:
    """Index rows -> pixels, in tasks beside the replicas, on nodes of these labels."""
    from ray.data import TaskPoolStrategy

    return read.map_batches(
        decode_batch,  # type: ignore[arg-type]
        batch_format="pyarrow",
        batch_size=config.slots_on(config.device),
        num_cpus=sizing.task_cpus,
        compute=TaskPoolStrategy(sizing.feeders),
        label_selector=where,
        fn_kwargs={"spec": spec, "prompt_key": config.prompt_key},
    )


def _beside_this_driver(remaining: int, config: CaptionConfig) -> object:
    """The tally, on the driver's own node: losing a worker node loses no counts."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(Tally).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here)
    return actor.remote(remaining, config.guards)


@contextmanager
def _quietly(context: DataContext, results: Results) -> Iterator[None]:
    """Ray Data's settings for this pass only: checkpointing on, faults tolerated, its own bars and plans off the
    screen.
    """
    from ray.data.checkpoint import CheckpointConfig

    results.make_directories()
    context.enable_progress_bars = False
    # The newer reader packs files into blocks by bytes, and index files are small: a thousand images would be one
    # block, done or lost as a whole. The older one makes a task per file, as the index means it.
    context.use_datasource_v2 = False
    context.max_consecutive_actor_init_deaths = 3
    context.execution_no_progress_timeout_s = _PATIENCE_SECONDS
    context.checkpoint_config = CheckpointConfig(
        id_column="sample_id", checkpoint_path=str(results.checkpoint), delete_checkpoint_on_success=False
    )
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # a pass over one file cannot have two writers, and need not
            warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")
            yield
    finally:
        logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The line of a Ray error that says what happened; around it are tracebacks through Ray and advice about Ray's
    settings.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if _NAMED.match(line)]
    return (named or lines or [type(error).__name__])[-1][:300]
