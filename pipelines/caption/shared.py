"""One engine for callers in several threads: their images share its slots, so that none empty while the next batch is on its way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pipelines.caption.engine import BlipCaptioner, Captioned, Request


class _Call:
    """One caller's images, answered once the last of them is captioned."""

    def __init__(self, count: int) -> None:
        self.answer: Future[list[Captioned]] = Future()
        self._found: dict[int, Captioned] = {}
        self._count = count

    def deliver(self, place: int, said: Captioned) -> None:
        self._found[place] = said
        if len(self._found) == self._count and not self.answer.done():
            self.answer.set_result([self._found[place] for place in range(self._count)])

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class _Item(NamedTuple):
    call: _Call
    place: int
    request: Request


class SharedEngine:
    """A thread that captions whatever callers hand in, first come, first served.

    Args:
        engine: nobody else may use it from now on.
    """

    def __init__(self, engine: BlipCaptioner) -> None:
        self._engine = engine
        self._inbox: SimpleQueue[_Item] = SimpleQueue()
        Thread(target=self._serve, name="engine", daemon=True).start()

    def caption(self, requests: Sequence[Request]) -> list[Captioned]:
        """Captions of the requests, in their order; waits for them. Safe to call from several threads at once.

        Raises:
            WorkFailed: not even one image fits into the device's memory; whatever else the engine raises, every caller it was working for gets.
        """
        if not requests:
            return []
        call = _Call(len(requests))
        for place, request in enumerate(requests):
            self._inbox.put(_Item(call, place, request))
        return call.answer.result()

    def _serve(self) -> None:
        while True:
            taken: dict[int, _Item] = {}
            first = self._inbox.get()
            try:
                for number, said in self._engine.captions(self._stream(first, taken)):
                    item = taken.pop(number)
                    item.call.deliver(item.place, said)
            except BaseException as error:  # a thread that died would leave its callers waiting for ever
                for item in taken.values():
                    item.call.fail(error)

    def _stream(self, first: _Item, taken: dict[int, _Item]) -> Iterator[Request]:
        """Requests as long as there are any; then the engine empties its slots, and the next stream begins."""
        number, item = 0, first
        while True:
            taken[number] = item
            yield item.request
            number += 1
            try:
                item = self._inbox.get_nowait()
            except Empty:
                return
