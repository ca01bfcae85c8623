"""Work of a stage that goes file by file, in Ray tasks beside each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pipelines import groups
from pipelines.demand import CPU
from pipelines.errors import UserError, WorkFailed

Result = TypeVar("Result")


def in_tasks(work: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
    """Results of `work(*call)` in the order of the calls, each in a task with a CPU of its own; few more are begun than
    there are CPUs.

    Raises:
        UserError, WorkFailed, OSError: as `work` raised it.
    """
    import ray

    task = ray.remote(num_cpus=1, label_selector=groups.selector(CPU))(work)
    most = sum(int(node.cpus) for node in groups.room(groups.at_most(), CPU))
    pending: deque[Any] = deque()
    for call in calls:
        pending.append(task.remote(*call))
        if len(pending) > 2 * most:  # the one that is waited for may be the slowest
            yield _result(pending.popleft())
    while pending:
        yield _result(pending.popleft())


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (UserError, WorkFailed, OSError)):
            raise error.cause from None
        raise
