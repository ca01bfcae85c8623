"""What an arm does to its data that its baseline does not, and which rows that leaves.

Whether an operator changes anything, and whether two coalitions make the same data, is known before any training: every
operator is tried alone, on each text, and a filter keeps or drops a row whatever other filters do. So the rows that a
coalition of filters keeps are those that each of them keeps. Mappers change the text that operators after them see, and
a deduplicator keeps what others have dropped the like of: coalitions with one of these are what they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.attribution.shapley import Coalition
from pipelines.errors import UserError
from pipelines.manifest import require_finished
from pipelines.records import read_shards
from pipelines.refine.operators import Process, build

if TYPE_CHECKING:
    import numpy as np

CAPTIONS, MIXING = "captions", "mixing"
"""The causes that are no operators, and their kinds: new captions, and captions as found beside them."""
FILTERS = "filters"
"""All operators as one cause."""


@dataclass(frozen=True)
class Cause:
    """One thing that an arm does.

    Attributes:
        name: `captions`, `mixing`, or the operator's name (its second use is `#2`), or `filters` for all of them.
        kind: `captions`, `mixing`, `filter`, `mapper` or `global`; of several operators the one that hides most.
        positions: of its operators in the arm's Data-Juicer recipe; none for the others.
    """

    name: str
    kind: str
    positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class ArmData:
    """How an arm's data come about.

    Attributes:
        arm: its name, for messages.
        captions: the caption set and the column of it that trains.
        mix: how captions as found stand beside new ones; None: not at all.
        process: its operators.
    """

    arm: str
    captions: tuple[str, str]
    mix: object | None
    process: Process


def find(base: ArmData, own: ArmData, *, together: bool = False) -> list[Cause]:
    """The causes: captions, mixing, then operators in their order.

    Args:
        together: all operators are one cause.

    Raises:
        UserError: the baseline filters or mixes in a way that the arm does not, or the two make the same data.
    """
    if lacking := [name for entry in base.process if entry not in own.process for name in entry]:
        raise UserError(
            f"arms.{own.arm}.recipe: lacks the operator {lacking[0]} of the baseline {base.arm}; what an arm leaves "
            "out cannot be told from what it does"
        )
    if base.mix is not None and base.mix != own.mix:
        raise UserError(f"arms.{base.arm}.mix: the baseline mixes captions in a way that arms.{own.arm} does not")
    causes = [Cause(CAPTIONS, CAPTIONS)] if base.captions != own.captions else []
    causes += [Cause(MIXING, MIXING)] if base.mix != own.mix else []
    operators = [
        Cause(operator.label, operator.kind, (position,))
        for position, (entry, operator) in enumerate(zip(own.process, build(own.process), strict=True))
        if entry not in base.process
    ]
    causes += [_as_one(operators)] if together and operators else operators
    if not causes:
        raise UserError(f"arms.{own.arm}: makes the same data as the baseline {base.arm}; there is nothing to explain")
    return causes


def _as_one(operators: Sequence[Cause]) -> Cause:
    kinds = {operator.kind for operator in operators}
    kind = next(kind for kind in ("mapper", "global", "filter") if kind in kinds)
    return Cause(FILTERS, kind, tuple(position for operator in operators for position in operator.positions))


def process_of(coalition: Coalition, causes: Sequence[Cause], own: Process) -> Process:
    """The operators of a coalition: the arm's without those of the causes that are not in it."""
    left_out = {place for number, cause in enumerate(causes) if number not in coalition for place in cause.positions}
    return [entry for position, entry in enumerate(own) if position not in left_out]


class Ledger:
    """Which rows each operator keeps when it is alone, and mixing makes.

    Args:
        causes: all of them.
        rows: uint64 [rows], as `rows_of` gives them, of every coalition of `alone`.
    """

    def __init__(self, causes: Sequence[Cause], rows: dict[Coalition, np.ndarray]) -> None:
        self.causes, self._rows = causes, rows
        self._captions, self._mixing = (numbers_of(causes, kind) for kind in (CAPTIONS, MIXING))
        self.live = self._live()

    def changed(self, number: int) -> dict[str, int]:
        """Rows that a cause alone drops or changes, among the captions as found and, where there are any, among the new
        ones; captions are held against those as found, mixing against new ones.
        """
        kind = self.causes[number].kind
        if kind == CAPTIONS:
            return {"found": self._apart(frozenset(), self._captions)}
        if kind == MIXING:
            return {"new": self._apart(self._captions, self._captions | {number})}
        each = {"found": frozenset[int](), "new": self._captions} if self._captions else {"found": frozenset[int]()}
        return {name: self._apart(texts, texts | {number}) for name, texts in each.items()}

    def data_of(self, coalition: Coalition) -> Hashable:
        """Equal for coalitions whose data are equal; what changes no row of the text in question does not count."""
        live = coalition & frozenset(self.live)
        texts = live & self._captions
        mixing = live & self._mixing if texts == self._captions else frozenset[int]()
        at_work, behind_a_mapper = set(texts | mixing), False
        for number in sorted(live - self._captions - self._mixing):
            if mixing or behind_a_mapper or self._apart(texts, texts | {number}):
                at_work.add(number)
                behind_a_mapper |= self.causes[number].kind == "mapper"
        if any(self.causes[number].kind not in (CAPTIONS, "filter") for number in at_work):
            return frozenset(at_work)
        kept = self.kept(frozenset(at_work))
        return (bool(texts), hashlib.blake2b(kept.tobytes(), digest_size=16).hexdigest())

    def kept(self, coalition: Coalition) -> np.ndarray:
        """The rows of a coalition of captions and filters."""
        import numpy as np

        texts = coalition & self._captions
        rows = self._rows[texts]
        for number in coalition - texts:
            rows = np.intersect1d(rows, self._rows[texts | {number}], assume_unique=True)
        return rows

    def _live(self) -> list[int]:
        """Causes that change a row. What a mapper that does so may let operators behind it see, nobody knows here."""
        live: list[int] = []
        behind_a_mapper = False
        for number, cause in enumerate(self.causes):
            if behind_a_mapper or any(self.changed(number).values()):
                live.append(number)
                behind_a_mapper |= cause.kind == "mapper"
        return live

    def _apart(self, one: Coalition, other: Coalition) -> int:
        """Rows that are in one of both alone, the more of the two; a changed text is another row."""
        import numpy as np

        lost, new = (np.setdiff1d(self._rows[a], self._rows[b]) for a, b in ((one, other), (other, one)))
        return max(len(lost), len(new))


def numbers_of(causes: Sequence[Cause], kind: str) -> Coalition:
    """The causes of a kind."""
    return frozenset(number for number, cause in enumerate(causes) if cause.kind == kind)


def alone(causes: Sequence[Cause]) -> list[Coalition]:
    """Coalitions whose data say what every cause does: each operator alone, and nothing, on each text; and mixing."""
    captions, mixing = (numbers_of(causes, kind) for kind in (CAPTIONS, MIXING))
    operators = [frozenset([number]) for number, cause in enumerate(causes) if cause.positions]
    texts = dict.fromkeys([frozenset[int](), captions])
    return [
        *(each | more for each in texts for more in (frozenset[int](), *operators)),
        *[captions | mixing] * bool(mixing),
    ]


def rows_of(dataset: Path) -> np.ndarray:
    """uint64 [rows], sorted: a digest of the id and the training text of every kept row of a refined directory.

    Raises:
        UserError: it is not finished.
    """
    import numpy as np

    from pipelines.manifest import training_text

    require_finished(dataset)
    text = training_text(dataset)
    table = read_shards(dataset, columns=["sample_id", text])
    pairs = zip(table["sample_id"].to_pylist(), table[text].to_pylist(), strict=True)
    digests = [hashlib.blake2b(f"{key}\0{said}".encode(), digest_size=8).digest() for key, said in pairs]
    return np.unique(np.frombuffer(b"".join(digests), dtype=np.uint64))
