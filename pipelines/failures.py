"""What a file system or Ray refused, as one sentence for whoever ran the command.

A worker's error comes back wrapped: by Ray in an error of its own, by Ray Data and Ray Train in another, with pages of
advice about Ray's settings. What a person has to know is within: which volume is full, or which pod ran out of memory
and what to change.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UserError, WorkFailed
from pipelines.files import FORBIDDEN, FULL, refusal
from pipelines.groups import LABEL

VOLUME = (*FULL, errno.EROFS, *FORBIDDEN)
"""Refusals of a volume: full, read-only, forbidden."""
_ERRNO = re.compile(r"\[[Ee]rrno (\d+)\]")
_QUOTED = re.compile(r"'(/[^']+)'")
_MEMORY = re.compile(r"node \(IP: (?P<ip>\S+), ID: (?P<node>\w+)\) was (?P<used>\S+) used / (?P<limit>\S+) limit")
_KILLED = ("killed by the OOM killer", "The worker died unexpectedly while executing this task")


class Refused(UserError):
    """A volume cannot be written to."""


def explained(error: BaseException, path: Path | str | None = None, turn: str = "") -> UserError | WorkFailed | None:
    """What an error comes to, where it is a volume's or memory's; None for everything else.

    Args:
        path: that was worked on, for errors that name none.
        turn: keys of the recipe that make the work take less memory.
    """
    causes = list(_within(error))
    for cause in causes:
        if (refused := _of_a_volume(cause)) is not None:
            sentence = refusal(refused, path)
            return WorkFailed(sentence) if refused.errno in FULL else Refused(sentence)
    text = "\n".join(map(str, causes))
    if found := _MEMORY.search(text):
        what = (
            f"{_node(found['node'], found['ip'])} ran out of memory: {found['used']} of its limit of {found['limit']}"
        )
        return WorkFailed(f"{what} were used, and Ray ended the work there. {_advice(turn)}")
    if any(words in text for words in _KILLED):
        return WorkFailed(
            "a worker process was killed from outside, most often by Linux because its pod reached its memory limit "
            f"(OOMKilled in kubectl -n captune describe pod). {_advice(turn)}"
        )
    return None


def _advice(turn: str) -> str:
    lower = f"Lower {turn}, or give" if turn else "Give"
    return f"{lower} the group larger pods (memory in the overlay's size/); the same command continues"


def _within(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it stands for."""
    todo, seen = [error], set()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner: list[Any] = [one.__cause__, getattr(one, "cause", None), getattr(one, "controller_failure", None)]
        inner += list(getattr(one, "worker_failures", {}).values())
        todo += [each for each in inner if isinstance(each, BaseException)]


def _of_a_volume(error: BaseException) -> OSError | None:
    """A volume's refusal; also one whose number has survived in its text alone, as in errors of pyarrow or Ray."""
    if isinstance(error, OSError) and error.errno in VOLUME:
        return error
    if isinstance(error, (UserError, WorkFailed)):
        return None  # says it already
    numbers = [int(number) for number in _ERRNO.findall(str(error)) if int(number) in VOLUME]
    if not numbers:
        return None
    places = _QUOTED.findall(str(error))
    return OSError(numbers[-1], os.strerror(numbers[-1]), *places[-1:])


def _node(node: str, address: str) -> str:
    """A node as kubectl names it: the pod and its group."""
    import ray

    for each in ray.nodes() if ray.is_initialized() else ():
        if each["NodeID"] == node:
            group = (each.get("Labels") or {}).get(LABEL, "")
            return f"pod {each['NodeManagerHostname']} (group {group})" if group else each["NodeManagerHostname"]
    return f"the node at {address}"
