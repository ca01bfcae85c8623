"""How many CPUs each part of the captioning pass reserves, so that it runs on two cores and never waits for itself.

Ray Data holds actors for the whole pass. When they take every CPU, the tasks that feed them never start and the job hangs; on a
resumed run its checkpoint filter is one more actor, of one whole CPU. So room for both is set aside first.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError
from pipelines.progress import say

_FILTER = 1.0  # Ray Data's own checkpoint filter; not configurable there


@dataclass(frozen=True)
class Sizing:
    """Ray resources of the captioning pass.

    Attributes:
        actors: model replicas.
        actor_cpus: CPUs reserved by each; its thread count comes from the recipe.
        task_cpus: CPUs reserved by each task that reads, decodes or writes.
    """

    actors: int
    actor_cpus: float
    task_cpus: float


def size_pass(config: CaptionConfig, cpus: float, gpus: float) -> Sizing:
    """Fit the recipe's wishes into a cluster.

    Raises:
        UserError: fewer than 2 CPUs, or more GPUs per replica than there are.
    """
    if cpus < 2:
        raise UserError(f"captioning needs a Ray cluster with at least 2 CPUs, this one has {cpus:g}")
    if config.gpus_per_actor > gpus:
        raise UserError(
            f"caption.gpus_per_actor: a replica asks for {config.gpus_per_actor:g} GPU(s), the Ray cluster has {gpus:g}"
        )
    task_cpus = 1.0 if cpus >= 8 else 0.25
    room = cpus - _FILTER - 2 * task_cpus
    actors = config.actors
    if config.gpus_per_actor > 0:
        actors = min(actors, int(gpus / config.gpus_per_actor))
    if actors * config.cpus_per_actor > room:
        actors = max(1, min(actors, int(room / config.cpus_per_actor)))
    if actors < config.actors:
        say(
            f"caption: {config.actors} actors do not fit {cpus:g} CPUs and {gpus:g} GPUs beside their feeders; using {actors}"
        )
    return Sizing(actors, min(config.cpus_per_actor, room / actors), task_cpus)
