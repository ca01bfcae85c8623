"""What a stage used: hours of nodes, CPUs and cards, by group of nodes, and how many of them worked.

While a stage is at work a meter looks at Ray's node table every few seconds. Its sums lie in the stage's directory, so
that attempts that died count, too, and go into the manifest at the end. Stages that this process has at work side by
side share what is there evenly. Where it has no Ray it is this machine alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import groups, machine
from pipelines.errors import UserError
from pipelines.files import read_text, write_text

USED = ".used.json"
"""In the directory of a stage at work: its hours so far, as JSON."""
_FIRST_S, _SLOWER, _LONGEST_S = 0.5, 1.5, 10.0
"""Seconds to the first look, and how they grow: a kill loses what came after the last one."""
_HOUR = 3600.0
_DIGITS = 6

Hours = dict[str, dict[str, float]]
"""Group -> `node_hours`, `cpu_hours` and `gpu_hours` that were there, and `cpu_hours_worked` and `gpu_hours_worked`:
those that tasks and actors held, or outside of Ray those in which this process computed."""


@dataclass(frozen=True)
class Look:
    """One node at one moment."""

    group: str
    cpus: float
    gpus: float
    cpus_held: float
    gpus_held: float


class Meter:
    """Counts from its making to `stop`, or until nobody holds it any more.

    Args:
        directory: of the stage.
        before: what earlier runs used there, where no attempt has left a file.
    """

    def __init__(self, directory: Path, before: Hours | None = None) -> None:
        self._path = directory / USED
        self.hours: Hours = _read(self._path) or before or {}
        self._last, self._computed = time.monotonic(), _computed()
        self._turn, self._ended = threading.Lock(), threading.Event()
        weakref.finalize(self, self._ended.set)
        watch = threading.Thread(target=_watch, args=(weakref.ref(self), self._ended), daemon=True, name="captune-cost")
        watch.start()
        _count_until_now()
        _at_work.add(self)

    def look(self) -> None:
        """Count what has been there since the last look."""
        with self._turn:
            if self._ended.is_set():
                return
            now, computed = time.monotonic(), _computed()
            hours = (now - self._last) / _HOUR / max(1, len(_at_work))
            nodes = _ray_nodes()
            if nodes is None:
                nodes = [_this_machine(computed - self._computed, now - self._last)]
            for node in nodes:
                self._add(node, hours)
            if nodes:
                self._last, self._computed = now, computed
                with contextlib.suppress(OSError):  # a full disk is for the stage to tell
                    if self._path.parent.is_dir():
                        write_text(self._path, _text(self.hours))

    def stop(self) -> Hours:
        """The sums, after a last look."""
        _count_until_now()
        self._ended.set()
        _at_work.discard(self)
        return rounded(self.hours)

    def _add(self, node: Look, hours: float) -> None:
        used = self.hours.setdefault(node.group, {})
        seen = {"cpu_hours": node.cpus, "gpu_hours": node.gpus}
        seen |= {"cpu_hours_worked": node.cpus_held, "gpu_hours_worked": node.gpus_held}
        for key, count in {"node_hours": 1.0, **seen}.items():
            used[key] = used.get(key, 0.0) + count * hours


_at_work: weakref.WeakSet[Meter] = weakref.WeakSet()
"""Of this process, also where nobody stopped them."""


def _count_until_now() -> None:
    """Before the number of those that share what is there changes."""
    for meter in list(_at_work):
        meter.look()


def of(manifest: dict[str, Any]) -> Hours:
    """What a finished stage used; empty where it did not count."""
    return manifest.get("cost") or {}


def worked(used: dict[str, float]) -> float | None:
    """Share of a group's hours that worked: of its cards where it has some, else of its CPUs; None without either."""
    kind = "gpu" if used["gpu_hours"] else "cpu"
    return used[f"{kind}_hours_worked"] / used[f"{kind}_hours"] if used[f"{kind}_hours"] else None


def added(parts: Iterable[Hours]) -> Hours:
    """The sum of several stages' hours."""
    total: Hours = {}
    for part in parts:
        for group, used in part.items():
            into = total.setdefault(group, {})
            for key, value in used.items():
                into[key] = into.get(key, 0.0) + value
    return total


def scaled(hours: Hours, factor: float) -> Hours:
    """The hours of so many times as much work."""
    return {group: {key: value * factor for key, value in used.items()} for group, used in hours.items()}


def rounded(hours: Hours) -> Hours:
    """To thousandths of a second, nearly."""
    return {group: {key: round(value, _DIGITS) for key, value in used.items()} for group, used in hours.items()}


def _watch(meter: weakref.ref[Meter], ended: threading.Event) -> None:
    pause = _FIRST_S
    while not ended.wait(pause):
        if (found := meter()) is None:
            return
        found.look()
        del found
        pause = min(pause * _SLOWER, _LONGEST_S)


def _ray_nodes() -> list[Look] | None:
    """Nodes of the cluster that this process is connected to; None without one, nothing while it does not answer."""
    ray = sys.modules.get("ray")
    connected = getattr(ray, "is_initialized", None)  # a module is in the table before it is whole
    if connected is None or not connected():
        return None
    try:
        return [Look(*found) for found in groups.in_use()]
    except Exception:  # whatever a connection that breaks off raises: the next look counts for this one, too
        return []


def _this_machine(computed: float, seconds: float) -> Look:
    cpus = float(machine.cpus())
    held = min(cpus, computed / seconds) if seconds > 0 else 0.0
    return Look(groups.LOCAL, cpus, float(len(machine.cards())), held, 0.0)


def _computed() -> float:
    """Seconds that CPUs have worked for this process and its children that have ended."""
    return sum(os.times()[:4])


def _read(path: Path) -> Hours:
    with contextlib.suppress(OSError, ValueError, UserError):  # none, or a file system that lost half of it
        return dict(json.loads(read_text(path)))
    return {}


def _text(hours: Hours) -> str:
    return json.dumps(rounded(hours))
