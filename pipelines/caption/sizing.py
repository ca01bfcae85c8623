"""How many CPUs each part of the captioning pass reserves, so that it runs on two cores and never waits for itself;
and, the other way round, how many CPUs a cluster needs for the pass that a recipe wishes for.

Ray Data holds actors for the whole pass. When they take every CPU, the tasks that feed them never start and the job
hangs; on a resumed run its checkpoint filter is one more actor, of one whole CPU. So room for both is set aside first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError
from pipelines.progress import say

_FEWEST_CPUS = 2.0
_FILTER = 1.0
"""CPUs of Ray Data's own checkpoint filter; not configurable there."""
_TASKS = 3
"""Tasks that must run beside the replicas: one that reads, one that decodes, one that writes."""
_WHOLE, _SMALL, _FEW = 1.0, 0.125, 8.0
"""CPUs that a task reserves: a whole one, or this little on fewer CPUs than `_FEW`."""
_FEEDERS_PER_GPU = 4.0
"""CPUs that read, decode and write beside one captioning GPU. One CPU decodes about 200 JPEGs of 640 x 480 a second, 80
of 1024 x 768 (tests/bench/bench_decode.py), and a card captions some hundreds."""
_ROUNDING = 1e-9
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
    """Fit the recipe's wishes into a cluster of so many CPUs and GPUs (at its largest, when it scales by itself). A
    larger cluster never runs fewer replicas.

    Raises:
        UserError: fewer than 2 CPUs, or more GPUs per replica than there are.
    """
    check_room(config, cpus, gpus, "the Ray cluster")
    beside_whole = cpus - _FILTER - _TASKS * _WHOLE
    room = max(beside_whole, _room_beside_small_tasks(cpus))
    wish = most = most_actors(config)
    if config.gpus_per_actor > 0:
        most = min(most, int(gpus / config.gpus_per_actor + _ROUNDING))
    if most * config.cpus_per_actor > room + _ROUNDING:
        most = max(1, min(most, int(room / config.cpus_per_actor + _ROUNDING)))
    if most < wish:
        say(f"caption: {wish} actors do not fit {cpus:g} CPUs and {gpus:g} GPUs beside their feeders; using {most}")
    actor_cpus = min(config.cpus_per_actor, room / most)
    few = cpus < _FEW
    small = few or most * actor_cpus > beside_whole + _ROUNDING
    return Sizing(
        actors=min(config.actors, most),
        max_actors=most,
        actor_cpus=actor_cpus,
        task_cpus=_SMALL if small else _WHOLE,
        decode_inside=most > 1 and not config.gpus_per_actor,
        feeders=1 if few else None,
        writers=2 if few else None,
    )


def check_room(config: CaptionConfig, cpus: float, gpus: float, where: str) -> None:
    """Refuse a machine or cluster (called `where`) that is too small for one replica.

    Raises:
        UserError: fewer than 2 CPUs, or more GPUs per replica than there are.
    """
    if config.gpus_per_actor > gpus:
        raise UserError(
            f"caption.gpus_per_actor: a replica needs {config.gpus_per_actor:g} GPU(s), {where} has {gpus:g}"
        )
    if cpus < _FEWEST_CPUS:
        raise UserError(f"caption: needs at least 2 CPUs for a replica and what feeds it, {where} has {cpus:g}")


def most_actors(config: CaptionConfig) -> int:
    """Replicas that a recipe wishes for, at most."""
    return config.demand().count


def cpus_wanted(config: CaptionConfig) -> float:
    """The fewest CPUs of a cluster in which `size_pass` gives every replica of a recipe (GPUs permitting). A lone
    replica on the CPU takes what there is, so it asks for no more than the pass itself needs.
    """
    if most_actors(config) == 1 and not config.gpus_per_actor:
        return _FEWEST_CPUS
    return max(_FEWEST_CPUS, most_actors(config) * config.cpus_per_actor + cpus_beside(config))


def cpus_beside(config: CaptionConfig) -> float:
    """CPUs that a recipe's replicas want beside their own, for the checkpoint filter and the tasks that feed them; more
    than `size_pass` insists on where GPUs are fed.
    """
    if config.gpus_per_actor:
        cards = math.ceil(most_actors(config) * config.gpus_per_actor - _ROUNDING)
        return _FILTER + max(_TASKS * _WHOLE, _FEEDERS_PER_GPU * cards)
    few = most_actors(config) * config.cpus_per_actor <= _room_beside_small_tasks(_FEW)
    return _FILTER + _TASKS * (_SMALL if few else _WHOLE)


def _room_beside_small_tasks(cpus: float) -> float:
    """What small tasks leave to replicas: on few CPUs, and on somewhat more of them where whole tasks would take CPUs
    that the replicas had on few.
    """
    return min(cpus, _FEW) - _FILTER - _TASKS * _SMALL


def rows_per_batch(config: CaptionConfig, row_bytes: int, store_bytes: float) -> int:
    """Rows of pixels that a replica takes together: whole decode batches, as long as some such blocks fit the object
    store.

    Args:
        row_bytes: of one image's pixels.
        store_bytes: object store of the whole cluster.
    """
    most = int(min(_MAX_BATCH_BYTES, store_bytes / 16) / row_bytes)
    return max(min(_REFILL * config.slots_on(config.device), most), 1)
