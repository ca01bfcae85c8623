"""Steps of several arms and seeds at once, as many as there is room for.

Models of different arms wait for nothing of each other, so while one trains another can, too, or be merged and asked:
on two cores each of two trainings has one, on eight cards each of eight. What counts is what Ray reserves; results do
not depend on who was beside whom.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Sequence

from pipelines import connection, groups
from pipelines.demand import Demand, Node
from pipelines.progress import say
from ray_jobs import hallway
from ray_jobs.hallway import Step
from ray_jobs.recipe import Recipe

_ROUNDING = 1e-9


def perform(recipe: Recipe, steps: Sequence[Step], work: Callable[[Step], None]) -> None:
    """Do the steps, those for all models first, in their order where it comes to a choice.

    When one fails no other begins; those at work come to their end before the failure is raised. Ctrl-C ends all.

    Args:
        work: does a step; called in threads of their own while others are at work.
    """
    for step in (step for step in steps if step.stage not in hallway.OF_A_SEED):
        work(step)
    waiting = [step for step in steps if step.stage in hallway.OF_A_SEED]
    if recipe.side_by_side == 1 or len({(step.arm, step.seed) for step in waiting}) < 2:
        for step in waiting:
            work(step)
    else:
        _at_once(recipe, waiting, work)


def _at_once(recipe: Recipe, waiting: list[Step], work: Callable[[Step], None]) -> None:
    connection.connect()  # from the main thread, which takes signals
    nodes, running = groups.at_most(), set[Step]()
    ended: queue.SimpleQueue[tuple[Step, BaseException | None]] = queue.SimpleQueue()
    failed: list[BaseException] = []
    while waiting or running:
        ready = [] if failed else [step for step in waiting if not _waits(recipe, step, waiting, running)]
        for step in ready:
            full = recipe.side_by_side is not None and len(running) >= recipe.side_by_side
            if running and (full or not _room(nodes, _demands(recipe, [*running, step]))):
                continue
            waiting.remove(step)
            running.add(step)
            threading.Thread(target=_do, args=(work, step, ended), daemon=True, name=str(step)).start()
        if not running:
            break
        step, error = ended.get()
        running.remove(step)
        if error is not None:
            failed.append(error)
            others = f"; ending what is at work: {', '.join(sorted(map(str, running)))}" if running else ""
            say(f"{step}: failed{others}")
    if failed:
        raise failed[0]


def _do(work: Callable[[Step], None], step: Step, ended: queue.SimpleQueue[tuple[Step, BaseException | None]]) -> None:
    try:
        work(step)
    except BaseException as error:  # whatever it is, it is raised where the steps are awaited
        ended.put((step, error))
    else:
        ended.put((step, None))


def _waits(recipe: Recipe, step: Step, *others: Collection[Step]) -> bool:
    """Whether something that the step reads is still to be done."""
    before = hallway.before(recipe, step)
    return any(other in before for each in others for other in each)


def _demands(recipe: Recipe, steps: Sequence[Step]) -> list[Demand]:
    """What Ray reserves for them; merges are done in this process, one at a time
    (`pipelines.mgm.skeleton.BUILDING`).
    """
    demands = {"train": [recipe.train.demand()], "evaluate": [recipe.serve.demand()], "merge": []}
    return [demand for step in steps for demand in demands[step.stage]]


def _room(nodes: Sequence[Node], demands: Sequence[Demand]) -> bool:
    """Whether all of it fits these nodes at once, each part on the first that has room for it."""
    left = [[node.cpus, node.gpus] for node in nodes]
    for demand in demands:
        allowed = groups.room(list(nodes), demand.group)
        for _ in range(demand.count):
            for free, node in zip(left, nodes, strict=True):
                if node in allowed and free[0] + _ROUNDING >= demand.cpus and free[1] + _ROUNDING >= demand.gpus:
                    free[0] -= demand.cpus
                    free[1] -= demand.gpus
                    break
            else:
                return False
    return True
