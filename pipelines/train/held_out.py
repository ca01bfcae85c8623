"""Rows of the instructions that no arm trains on. All arms answer them with the same words, so their loss is the one
that arms can be compared by: the loss of training is taken on texts that differ from arm to arm.
"""

from __future__ import annotations

from pipelines.train.rows import Image, Row, Rows

LARGEST_SHARE = 10
"""At most every tenth row is held out, whatever number was asked for."""


def set_aside(rows: Rows, count: int) -> Rows:
    """Take about `count` rows out of `rows`, and with a row all others that show the same image; returns them.

    Which ones depends on their order in the data alone: neither arm, seed nor number of workers.
    """
    import numpy as np

    every, chosen = _by_image(rows.rows), set[int]()
    for group in np.random.default_rng(0).permutation(len(every)).tolist():
        if len(chosen) + len(every[group]) <= most(rows, count):
            chosen.update(every[group])
    held = Rows(rows.source, [rows.rows[number] for number in sorted(chosen)], spool=rows.spool)
    held.total = len(held.rows)
    rows.rows = [row for number, row in enumerate(rows.rows) if number not in chosen]
    return held


def most(rows: Rows, count: int) -> int:
    """How many rows `set_aside` takes at most."""
    return min(count, len(rows) // LARGEST_SHARE)


def _by_image(rows: list[Row]) -> list[list[int]]:
    """Places of the rows, those together that share an image, if only by way of others."""
    leader = list(range(len(rows)))

    def lead(place: int) -> int:
        while leader[place] != place:
            leader[place] = place = leader[leader[place]]
        return place

    first: dict[Image, int] = {}
    for place, row in enumerate(rows):
        for image in row.images:
            leader[lead(place)] = lead(first.setdefault(image, place))
    groups: dict[int, list[int]] = {}
    for place in range(len(rows)):
        groups.setdefault(lead(place), []).append(place)
    return list(groups.values())
