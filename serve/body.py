"""Reading a request's body: no further than it may go, and no longer than it may take."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope

from serve.errors import ApiError

_DISCARD_S, _SILENCE_S = 10.0, 0.5


async def read(scope: Scope, receive: Receive, most: int, within_s: float) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413, it has more than `most` bytes, or says so; 408, it was not here in time.
        ConnectionError: the client went away.
    """
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(int(declared), most)
    pieces, size = [], 0
    try:
        async with asyncio.timeout(within_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError("the client went away")
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > most:
                    raise _too_large(size, most)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise ApiError(408, f"the body was not here within {within_s:g} s", code="timeout") from None


async def discard(receive: Receive) -> None:
    """Read on for a moment what nobody wants: many a client sends all of its body before it reads the refusal, and
    finds the connection reset where the server stopped reading.
    """
    try:
        async with asyncio.timeout(_DISCARD_S):
            while True:
                async with asyncio.timeout(_SILENCE_S):
                    message = await receive()
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _too_large(size: int, most: int) -> ApiError:
    return ApiError(413, f"the body has {size:,} bytes or more, the limit here is {most:,}", code="body_too_large")
