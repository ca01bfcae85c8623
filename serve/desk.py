"""How many requests a replica takes, and one request's way through it while its client listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.errors import ApiError
from serve.replies import DONE, Chunks, event

if TYPE_CHECKING:
    from serve.engine import Answer, Prepared


class Desk:
    """`async with desk:` around a request. At most `busy` are prepared or answered at a time; `queued` more wait, of
    which nothing but the body is held.

    Raises:
        ApiError: 429, so many wait already.
    """

    def __init__(self, busy: int, queued: int) -> None:
        self.most, self.inside = busy + queued, 0
        self._places = asyncio.Semaphore(busy)

    async def __aenter__(self) -> None:
        if self.inside >= self.most:
            raise ApiError(429, "too many requests wait already; come again in a moment", code="overloaded", wait_s=1)
        self.inside += 1
        try:
            await self._places.acquire()
        except BaseException:
            self.inside -= 1
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._places.release()
        self.inside -= 1


class Deadline:
    """When a request must have its answer.

    Args:
        within_s: from now.
    """

    def __init__(self, within_s: float) -> None:
        self.within_s = within_s
        self.moment = asyncio.get_running_loop().time() + within_s

    async def of(self, work: Awaitable[Any]) -> Any:
        """What `work` gives.

        Raises:
            ApiError: 408, it took too long, and is cancelled.
        """
        try:
            async with asyncio.timeout_at(self.moment):
                return await work
        except TimeoutError:
            raise ApiError(408, f"no answer within {self.within_s:g} s", code="timeout") from None


async def speak(
    prepared: Sequence[Prepared], generate: Callable[[Prepared], Awaitable[Answer]], chunks: Chunks
) -> AsyncGenerator[str]:
    """Events of the answers to one request, each as soon as its text is there.

    Raises:
        ApiError: 500, an answer failed.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
    tasks = []
    for index, one in enumerate(prepared):
        one.hear = partial(_hear, loop, queue, index)
        task = asyncio.ensure_future(generate(one))
        task.add_done_callback(partial(_done, queue, index))
        tasks.append(task)
    begun: set[int] = set()
    answers: dict[int, Answer] = {}
    try:
        while len(answers) < len(tasks):
            index, news = await queue.get()
            finished = isinstance(news, asyncio.Future)
            if finished:
                answers[index] = sound(news.result())
            if index not in begun:
                begun.add(index)
                yield chunks.begin(index)
            yield chunks.end(index, answers[index].finish_reason) if finished else chunks.text(index, *news)
    finally:
        for task in tasks:
            task.cancel()
    if told := chunks.usage([answers[index] for index in sorted(answers)]):
        yield told


def sound(answer: Answer) -> Answer:
    """The answer.

    Raises:
        ApiError: 500, it is a failure.
    """
    if answer.error is not None:
        raise ApiError(500, answer.error)
    return answer


def _hear(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[tuple[int, Any]], index: int, *news: Any) -> None:
    """From the generating thread to the loop, in order."""
    loop.call_soon_threadsafe(queue.put_nowait, (index, news))


def _done(queue: asyncio.Queue[tuple[int, Any]], index: int, task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()  # seen, whether or not anybody still listens
        queue.put_nowait((index, task))


class Stream(StreamingResponse):
    """Server-sent events; what is held for the request is let go when the stream ends, however it does.

    Args:
        first: the event that has come already: what fails before is an ordinary refusal.
        held: closed at the end.
        failed: told of a failure in the middle, which the client finds as an event.
    """

    def __init__(
        self,
        first: str,
        events: AsyncIterator[str],
        deadline: Deadline,
        held: AsyncExitStack,
        failed: Callable[[ApiError], None],
    ) -> None:
        self.held = held
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # no proxy on the way may collect it
        super().__init__(_all(first, events, deadline, failed), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.held.aclose()


async def _all(
    first: str, events: AsyncIterator[str], deadline: Deadline, failed: Callable[[ApiError], None]
) -> AsyncIterator[str]:
    yield first
    try:
        while (one := await deadline.of(anext(events, None))) is not None:  # type: ignore[arg-type]
            yield one
    except ApiError as error:
        failed(error)
        yield event(error.body())
    yield DONE
