"""A random sample of a stream whose length nobody knows."""

from __future__ import annotations

import random
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Reservoir(Generic[Item]):
    """Reservoir sampling (Vitter 1985): every item offered so far is as likely as any other to be among `items`.

    Args:
        size: items kept.
        seed: of the choice; None for another one each time.
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        self._size, self._random = size, random.Random(seed)
        self._offered = 0
        self.items: list[Item] = []

    def offer(self, item: Item) -> None:
        """One more of the stream."""
        self._offered += 1
        if len(self.items) < self._size:
            self.items.append(item)
        elif (place := self._random.randrange(self._offered)) < self._size:
            self.items[place] = item
