"""One engine for callers in several threads: their images share its slots, so that none empty while the next batch is
on its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import count
from queue import Empty, PriorityQueue
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.blip2.engine import BlipCaptioner, Captioned, Request


class _Call:
    """One caller's images, answered once the last of them is captioned."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.answer: Future[list[Captioned]] = Future()
        self._found: dict[int, Captioned] = {}

    def deliver(self, place: int, said: Captioned) -> None:
        self._found[place] = said
        if len(self._found) == len(self.requests) and not self.answer.done():
            self.answer.set_result([self._found[place] for place in range(len(self.requests))])

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class SharedEngine:
    """A thread that captions whatever callers hand in, the lowest ticket first and, of one ticket, first come, first
    served.

    Args:
        engine: nobody else may use it from now on.
    """

    def __init__(self, engine: BlipCaptioner) -> None:
        self._engine = engine
        self._inbox: PriorityQueue[tuple[int, int, _Call]] = PriorityQueue()
        self._tickets, self._order = count(), count()
        Thread(target=self._serve, name="engine", daemon=True).start()

    def ticket(self) -> int:
        """A place in the queue, behind all that were given before."""
        return next(self._tickets)

    def submit(self, requests: Sequence[Request], ticket: int) -> Future[list[Captioned]]:
        """Captions of the requests to come, in their order. Safe to call from several threads at once.

        The future's exceptions: `WorkFailed` when not even one image fits into the device's memory; whatever else the
        engine raises, every caller it was working for gets.
        """
        call = _Call(requests)
        if requests:
            self._inbox.put((ticket, next(self._order), call))
        else:
            call.answer.set_result([])
        return call.answer

    def _serve(self) -> None:
        while True:
            taken: dict[int, tuple[_Call, int]] = {}
            first = self._inbox.get()[-1]
            try:
                for number, said in self._engine.captions(self._stream(first, taken)):
                    call, place = taken.pop(number)
                    call.deliver(place, said)
            except BaseException as error:  # a thread that died would leave its callers waiting for ever
                for call, _ in taken.values():
                    call.fail(error)

    def _stream(self, call: _Call, taken: dict[int, tuple[_Call, int]]) -> Iterator[Request | None]:
        """Requests as they come in, None while there are none. The engine asks no more once its slots are empty; then
        the next stream begins.
        """
        numbers = count()
        while True:
            for place, request in enumerate(call.requests):
                taken[next(numbers)] = call, place
                yield request
            while (later := self._waiting()) is None:
                next(numbers)
                yield None
            call = later

    def _waiting(self) -> _Call | None:
        try:
            return self._inbox.get_nowait()[-1]
        except Empty:
            return None
