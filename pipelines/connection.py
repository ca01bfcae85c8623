"""When Ray is needed: a stage says so once it has found that it has work, and the command around it connects.

So saying "complete already" starts nothing. A library's user without a command around the stages has his own Ray, or
the one that Ray starts by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_pending: list[Callable[[], None]] = []
_turn = threading.RLock()


@contextmanager
def when_needed(start: Callable[[], None]) -> Iterator[None]:
    """Inside the block the first `connect` calls `start`."""
    _pending.append(start)
    try:
        yield
    finally:
        if start in _pending:
            _pending.remove(start)


def connect() -> None:
    """From here on Ray is used."""
    with _turn:  # stages in other threads wait until it is there
        while _pending:
            _pending.pop()()
