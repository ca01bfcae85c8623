"""What a drill prints: one line for each thing that was done or seen, with the seconds since it began."""

from __future__ import annotations

import time


class Record:
    """A drill's record.

    Args:
        title: what is drilled.
    """

    def __init__(self, title: str) -> None:
        self.began = time.monotonic()
        print(title, flush=True)

    def say(self, what: str) -> None:
        """One line."""
        print(f"{time.monotonic() - self.began:7.1f} s  {what}", flush=True)

    def check(self, holds: bool, what: str) -> None:
        """One line about what must hold; ends the drill with status 1 when it does not."""
        self.say(f"{'ok' if holds else 'NOT SO'}: {what}")
        if not holds:
            raise SystemExit(1)
