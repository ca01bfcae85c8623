"""Progress of long work: what is happening, how fast, how long still; on a terminal (one live line) and in a log (a
line now and then).
"""

from __future__ import annotations

import sys
import time
import weakref
from types import TracebackType
from typing import TextIO

_open: weakref.WeakSet[Progress] = weakref.WeakSet()


class Progress:
    """Counts `unit`s of `what`; prints to standard error so that standard output stays machine-readable.

    Args:
        total: number of units expected, None when it is not known.
        what: stage or phase as the user knows it, e.g. "caption" or "train enhanced/align".
        every: seconds between lines in a log, six times as many while nothing changes, and on a terminal where other
            work is shown, too; for itself alone, its line there is refreshed twice a second.
    """

    def __init__(
        self, total: int | None, what: str, unit: str = "rows", *, every: float = 5.0, stream: TextIO | None = None
    ) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = 0
        self.stream = stream or sys.stderr
        self._terminal = self.stream.isatty()
        self._every = every
        self._start = self._last = time.monotonic()
        self._first = 0  # units that were done before this run started: they say nothing about speed
        self._notes = ""
        self._said: tuple[int, str] | None = None
        _open.add(self)

    @property
    def live(self) -> bool:
        """Whether its line is the last of a terminal, and all that changes there."""
        return self._terminal and len(_open) <= 1

    @property
    def every(self) -> float:
        """Seconds between two lines."""
        return 0.5 if self.live else self._every

    def start_at(self, done: int) -> None:
        """Units finished by an earlier, interrupted run."""
        self.done = self._first = done
        self._print()

    def update(self, units: int = 1, notes: str = "") -> None:
        """`units` more are done; `notes` is a short live figure such as 'loss 2.31'."""
        self.done += units
        self._notes = notes or self._notes
        now = time.monotonic()
        still = not self.live and self._said == (self.done, self._notes)
        if now - self._last >= self.every * (6 if still else 1):
            self._last = now
            self._print()

    def close(self) -> None:
        """Print the last line."""
        unfinished = self.live
        self._print()
        _open.discard(self)
        if unfinished:
            self.stream.write("\n")
        self.stream.flush()

    def line(self) -> str:
        """The line as printed, e.g. `caption: 512/1000 rows (51 %), 48.2 rows/s, 0:10 left`."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._first) / elapsed
        text = f"{self.what}: {self.done}"
        if self.total:
            text += f"/{self.total} {self.unit} ({100 * self.done / self.total:.0f} %)"
        else:
            text += f" {self.unit}"
        if rate > 0:
            text += f", {rate:.3g} {self.unit}/s" if rate < 1000 else f", {rate:.0f} {self.unit}/s"
        if self.total and rate > 0 and self.done < self.total:
            text += f", {clock((self.total - self.done) / rate)} left"
        elif self.total and self.done >= self.total:
            text += f", took {clock(elapsed)}"
        return text + (f", {self._notes}" if self._notes else "")

    def _print(self) -> None:
        self._said = self.done, self._notes
        before = "\r\033[K" if self._terminal else ""
        self.stream.write(before + self.line() + ("" if self.live else "\n"))
        self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            unfinished = self.live
            _open.discard(self)
            if unfinished:
                self.stream.write("\n")


def say(message: str) -> None:
    """One line for the person watching, on standard error."""
    print(message, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` under an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
