"""Which coalitions are asked for, and which of them have to be trained."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from functools import cached_property

from pipelines.attribution import shapley
from pipelines.attribution.causes import Ledger
from pipelines.attribution.shapley import Coalition, Game
from pipelines.errors import UserError

_EXACT_UP_TO = 16
"""Causes whose coalitions can be gone through, 65,536, to see how few data they make."""


@dataclass(frozen=True)
class Plan:
    """What an explanation asks for.

    Attributes:
        ledger: which rows each cause changes.
        game: of the causes that change one, in the order of `ledger.live`.
        wanted: coalitions whose worth is asked, numbered as the causes are.
        had: data that an arm of the run has been trained on.
    """

    ledger: Ledger
    game: Game
    wanted: list[Coalition]
    had: Collection[Hashable]

    @cached_property
    def untrained(self) -> dict[Hashable, Coalition]:
        """Data -> one coalition that makes them, of all data that no arm of the run has been trained on."""
        first: dict[Hashable, Coalition] = {}
        for each in self.wanted:
            first.setdefault(self.ledger.data_of(each), each)
        return {data: each for data, each in first.items() if data not in self.had}


def plan(ledger: Ledger, of_the_run: Collection[Coalition], budget: int, seed: int) -> Plan:
    """Exact where the budget lets every coalition be trained, else as many orders as it buys.

    The two by two and leaving out each cause are asked for in any case.

    Args:
        of_the_run: coalitions that are arms of the run.
        budget: data that may be trained on besides.
        seed: of the drawing of orders.

    Raises:
        UserError: the budget is too small.
    """
    live, had = ledger.live, {ledger.data_of(each) for each in of_the_run}
    everything = frozenset(live)
    always = list(dict.fromkeys([*corners(ledger), *(everything - {each} for each in live)]))
    spent = {ledger.data_of(each) for each in always} - had
    if len(spent) > budget:
        raise UserError(
            f"explain.budget: {budget} coalitions to train; captions alone, filters alone and leaving out each of "
            f"{len(live)} causes take {len(spent)}"
        )

    def numbered(coalition: Coalition) -> Coalition:
        """The game's causes have their numbers among those that change something, and here among all."""
        return frozenset(live[place] for place in coalition)

    def data_of(coalition: Coalition) -> Hashable:
        return ledger.data_of(numbered(coalition))

    if len(live) <= _EXACT_UP_TO and len({data_of(each) for each in shapley.subsets(len(live))} - had) <= budget:
        game = shapley.exact(len(live))
    else:
        orders = shapley.affordable_orders(len(live), data_of, had | spent, budget - len(spent), seed)
        if len(orders) < 2:
            raise UserError(
                f"explain.budget: {budget} coalitions to train are too few for {len(live)} causes that change rows: "
                f"with two orders of them, there and back, they are up to {len(spent) + 4 * (len(live) - 1)}"
            )
        game = shapley.sampled(len(live), orders)
    return Plan(ledger, game, list(dict.fromkeys([*always, *map(numbered, game.coalitions)])), had)


def corners(ledger: Ledger) -> list[Coalition]:
    """Nothing, captions (with mixing) alone, operators alone, everything; of the causes that change a row."""
    captions = frozenset(number for number in ledger.live if ledger.causes[number].positions == ())
    everything = frozenset(ledger.live)
    return [frozenset[int](), captions, everything - captions, everything]
