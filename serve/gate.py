"""Holds requests back while the model works, so that they enter the next batch together.

`@serve.batch` forms its next batch while the model is still busy with the last one: whatever arrived within the wait
becomes a batch of its own, however small, and queues up. With a few dozen clients that each wait for their answer,
batches of three or four follow one another for ever and never merge again. Waiting in front of the queue instead lets
all of them leave as one full batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class BatchGate:
    """`async with gate:` around the call of a batched method; `with gate.running():` inside the method itself.

    At most `size` requests are inside. Newcomers pass while the model is idle and there is room; all others wait until
    the inside is empty, and then enter together. Everything inside leaves sooner or later, so nobody waits for ever.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._inside = 0
        self._running = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model works on what is inside."""
        self._running = True
        try:
            yield
        finally:
            self._running = False
            self._open()  # all inside may have given up while the model worked, and others come to wait

    async def __aenter__(self) -> None:
        if not self._running and not self._waiting and self._inside < self.size:
            self._inside += 1
            return
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(ticket)
        try:
            await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled():
                self._leave()  # let in and given up in the same moment
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._inside -= 1
        self._open()

    def _open(self) -> None:
        if self._inside == 0:
            while self._waiting and self._inside < self.size:
                ticket = self._waiting.popleft()
                if not ticket.done():
                    ticket.set_result(None)
                    self._inside += 1
