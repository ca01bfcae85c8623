"""What a stage asks of the machines it runs on: so many equal parts at once, each of them on one machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.errors import Problem

_ROUNDING = 1e-9
CPU = "cpu"
"""The group of whatever needs no card."""


@dataclass(frozen=True)
class Node:
    """What one machine offers, and its group on a cluster that has groups."""

    cpus: float
    gpus: float
    group: str = ""


@dataclass(frozen=True)
class Demand:
    """What one section of a recipe asks for.

    Attributes:
        section: of the recipe.
        part: what people call one of them: worker, replica, task.
        count: so many are needed at once.
        cpus: that one of them reserves.
        gpus: that one of them reserves; fractions share a card, and never span two.
        keys: of the section, that say `count`, `cpus` and `gpus`.
    """

    section: str
    part: str
    count: int
    cpus: float
    gpus: float = 0.0
    keys: tuple[str, str, str] = ("", "", "")

    @property
    def group(self) -> str:
        """The group of nodes that does it, on a cluster that has groups: one of the section's own for what needs a
        card, and one for all the rest.
        """
        return self.section if self.gpus else CPU

    def per_node(self, node: Node) -> int:
        """How many of them a machine holds; 0 when not even one."""
        room = [
            int(has / asked + _ROUNDING) for asked, has in ((self.gpus, node.gpus), (self.cpus, node.cpus)) if asked > 0
        ]
        return min(room, default=self.count)

    def too_large(self, nodes: Sequence[Node], where: str) -> Iterator[Problem]:
        """Why it never fits these machines; nothing when it does. `where` is what people call them."""
        _, cpus_key, gpus_key = (f"{self.section}.{key}" for key in self.keys)
        for asked, has, key, unit in (
            (self.cpus, max((node.cpus for node in nodes), default=0), cpus_key, "CPU"),
            (self.gpus, max((node.gpus for node in nodes), default=0), gpus_key, "GPU"),
        ):
            if asked > has + _ROUNDING:
                yield Problem(key, f"a {self.part} needs {_units(asked, unit)}, {where} has {_units(has, unit)}")

    def missing(self, nodes: Sequence[Node], where: str) -> Iterator[Problem]:
        """Why all of them together do not fit these machines; nothing when they do."""
        fit = sum(self.per_node(node) for node in nodes)
        if too_large := list(self.too_large(nodes, where)):
            yield from too_large
        elif fit < self.count:
            size = _units(self.cpus, "CPU") + (f" and {_units(self.gpus, 'GPU')}" if self.gpus else "")
            has = f"{where} has room for {fit} ({_units(sum(node.cpus for node in nodes), 'CPU')}"
            has += f", {_units(sum(node.gpus for node in nodes), 'GPU')})" if self.gpus else ")"
            yield Problem(f"{self.section}.{self.keys[0]}", f"{self.count} {self.part}s need {size} each, {has}")


def _units(count: float, unit: str) -> str:
    return f"no {unit}" if not count else f"{count:g} {unit}{'s' * (count > 1)}"
