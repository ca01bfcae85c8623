"""How many CPUs each part of the captioning pass reserves, so that it runs on two cores and never waits for itself.

Ray Data holds actors for the whole pass. When they take every CPU, the tasks that feed them never start and the job
hangs; on a resumed run its checkpoint filter is one more actor, of one whole CPU. So room for both is set aside first.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError
from pipelines.progress import say

_FILTER = 1.0  # Ray Data's own checkpoint filter; not configurable there
_REFILL = 2
"""Decode batches that are handed to the engine together."""
_MAX_BATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Sizing:
    """Ray resources of the captioning pass.

    Attributes:
        actors: model replicas at the start, and the fewest.
        max_actors: the most.
        actor_cpus: CPUs reserved by each; its thread count comes from the recipe. More threads than cores are far
            slower than one each.
        task_cpus: CPUs reserved by each task that reads, decodes or writes.
        decode_inside: decode in the replicas, where several of them share the cores: pixels then never leave the
            process that captions them. A single replica on the CPU is better fed from outside, where decoding takes
            nothing from its interpreter, and so is a GPU.
        feeders: most tasks that read, and most that decode, at once; None for as many as fit. On few cores those of a
            resumed run, which have thousands of finished files to pass over, would hold every core that a writer needs,
            and nothing would be committed before the end.
        writers: most tasks that write at once. Each of them is a process that takes a second of a core to start.
    """

    actors: int
    max_actors: int
    actor_cpus: float
    task_cpus: float
    decode_inside: bool
    feeders: int | None
    writers: int | None


def size_pass(config: CaptionConfig, cpus: float, gpus: float) -> Sizing:
    """Fit the recipe's wishes into a cluster of so many CPUs and GPUs (at its largest, when it scales by itself).

    Raises:
        UserError: fewer than 2 CPUs, or more GPUs per replica than there are.
    """
    if cpus < 2:
        raise UserError(f"captioning needs a Ray cluster with at least 2 CPUs, this one has {cpus:g}")
    if config.gpus_per_actor > gpus:
        raise UserError(
            f"caption.gpus_per_actor: a replica asks for {config.gpus_per_actor:g} GPU(s), the Ray cluster has {gpus:g}"
        )
    task_cpus = 1.0 if cpus >= 8 else 0.125
    room = cpus - _FILTER - 3 * task_cpus
    wish = most = max(config.actors, config.max_actors)
    if config.gpus_per_actor > 0:
        most = min(most, int(gpus / config.gpus_per_actor))
    if most * config.cpus_per_actor > room:
        most = max(1, min(most, int(room / config.cpus_per_actor)))
    if most < wish:
        say(f"caption: {wish} actors do not fit {cpus:g} CPUs and {gpus:g} GPUs beside their feeders; using {most}")
    actor_cpus = min(config.cpus_per_actor, room / most)
    return Sizing(
        actors=min(config.actors, most),
        max_actors=most,
        actor_cpus=actor_cpus,
        task_cpus=task_cpus,
        decode_inside=most > 1 and not config.gpus_per_actor,
        feeders=1 if task_cpus < 1 else None,
        writers=2 if task_cpus < 1 else None,
    )


def rows_per_batch(config: CaptionConfig, row_bytes: int, store_bytes: float) -> int:
    """Rows of pixels that a replica takes together: whole decode batches, as long as some such blocks fit the object
    store.

    Args:
        row_bytes: of one image's pixels.
        store_bytes: object store of the whole cluster.
    """
    most = int(min(_MAX_BATCH_BYTES, store_bytes / 16) / row_bytes)
    return max(min(_REFILL * config.batch_size, most), 1)
