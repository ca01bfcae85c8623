"""Shapley values: a gain divided among causes that work together (Shapley 1953, "A value for n-person games").

A cause's part is what it adds to those before it, averaged over all orders in which the causes may come. The parts are
the only ones that add up to the whole gain, are equal for causes that do the same, nothing for causes that do nothing,
and add up over questions too; so a benchmark's question can be split as its mean is.

Parts are linear in the worth of the coalitions, `weights @ worth`, and the weights are all that this file makes: over
all orders where every coalition can be had, else over a sample of orders (Castro, Gomez and Tejada 2009, Computers &
Operations Research 36:1726), each with its reverse (Mitchell et al. 2022, JMLR 23:43), which evens out what comes
early against what comes late.

Shapes: N causes, C coalitions, O orders.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Coalition = frozenset[int]
"""Causes that are at work, by their numbers from 0 on."""
Order = tuple[int, ...]
"""All causes, the first first."""


@dataclass(frozen=True)
class Game:
    """How the worth of coalitions becomes the parts of causes.

    Attributes:
        causes: how many.
        coalitions: whose worth is asked.
        weights_GNC: float [groups, causes, coalitions]; parts are the mean over groups: of one group where all orders
            are in it, else of one for each order with its reverse, whose spread is the error of having drawn them.
        exact: all orders are in it.
    """

    causes: int
    coalitions: list[Coalition]
    weights_GNC: np.ndarray
    exact: bool

    def parts(self, worth_CQ: np.ndarray) -> np.ndarray:
        """float [causes, questions] from the worth of the coalitions, float [coalitions, questions]; they add up to the
        gain of each question.
        """
        parts_NQ: np.ndarray = self.weights_GNC.mean(axis=0) @ worth_CQ
        return parts_NQ

    def drawing_variance(self, worth_C: np.ndarray) -> np.ndarray:
        """float [causes]: the variance that the parts have because orders were drawn; 0 where they are exact."""
        import numpy as np

        if self.exact:
            return np.zeros(self.causes)
        variance_N: np.ndarray = (self.weights_GNC @ worth_C).var(axis=0, ddof=1) / len(self.weights_GNC)
        return variance_N


def subsets(causes: int) -> Iterator[Coalition]:
    """All coalitions, small ones first."""
    for size in range(causes + 1):
        yield from map(frozenset, combinations(range(causes), size))


def exact(causes: int) -> Game:
    """Over all orders, which takes every coalition: 2 to the power of `causes`."""
    import numpy as np

    coalitions = list(subsets(causes))
    weights_NC = np.zeros((causes, len(coalitions)))
    for place, coalition in enumerate(coalitions):
        size = len(coalition)
        for cause in range(causes):
            joined = size - 1 if cause in coalition else size  # how many were there before it came
            share = math.factorial(joined) * math.factorial(causes - joined - 1) / math.factorial(causes)
            weights_NC[cause, place] = share if cause in coalition else -share
    return Game(causes, coalitions, weights_NC[None], exact=True)


def sampled(causes: int, orders: Sequence[Order]) -> Game:
    """Over these orders, at least two, each with its reverse."""
    import numpy as np

    place: dict[Coalition, int] = {}
    for order in orders:
        for coalition in (*prefixes(order), *prefixes(order[::-1])):
            place.setdefault(coalition, len(place))
    weights_GNC = np.zeros((len(orders), causes, len(place)))
    for group, order in enumerate(orders):
        for each in (order, order[::-1]):
            before = frozenset[int]()
            for cause in each:
                after = before | {cause}
                weights_GNC[group, cause, place[after]] += 0.5
                weights_GNC[group, cause, place[before]] -= 0.5
                before = after
    return Game(causes, list(place), weights_GNC, exact=False)


def affordable_orders(
    causes: int, cost: Callable[[Coalition], Hashable], had: set[Hashable], budget: int, seed: int
) -> list[Order]:
    """Orders, drawn one after the other until the next would take more trainings than there are left.

    Args:
        cost: what has to be trained for a coalition; equal for those whose data are equal.
        had: what is trained anyway.
        budget: further trainings that may be made.
        seed: of the drawing; a larger budget only adds to a smaller one's orders.
    """
    rng, spent, orders = random.Random(seed), set(had), list[Order]()
    while len(orders) < _MOST_ORDERS:
        order = tuple(rng.sample(range(causes), causes))
        wanted = spent | {cost(each) for each in (*prefixes(order), *prefixes(order[::-1]))}
        if len(wanted) - len(had) > budget:
            break
        spent = wanted
        orders.append(order)
    return orders


_MOST_ORDERS = 1000
"""Where nearly all data are equal, orders cost nothing, and more of them say nothing new."""


def prefixes(order: Order) -> Iterator[Coalition]:
    """The coalitions that an order passes through, from nobody to all."""
    for length in range(len(order) + 1):
        yield frozenset(order[:length])
