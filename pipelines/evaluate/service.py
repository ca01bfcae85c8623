"""One request to an OpenAI-compatible service: how long it may take, what is tried again, and what ends everything."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from pipelines.errors import UserError, WorkFailed
from pipelines.evaluate.config import EvaluateConfig

KEY = "OPENAI_API_KEY"
"""The variable that every OpenAI client reads; an option of a command would show in the list of processes."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
_REFUSES_EVERYTHING = frozenset((401, 403, 404, 405))


class Gone(WorkFailed):
    """Nobody is at the address, or (`status` 404) only a proxy whose service is not there."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Reply:
    """What came of one attempt.

    Attributes:
        content: the JSON of the body; None when it is none.
        error: one line; None after status 200.
        gone: there was nobody to ask.
        pause_s: how long the service asks to wait before the next attempt.
    """

    status: int | None = None
    content: Any = None
    error: str | None = None
    gone: bool = False
    pause_s: float = 0.0


class Service:
    """`async with Service(...)`: connections to a service.

    Args:
        endpoint: its base URL, with or without `/v1`.
        flights: most requests at once.

    Raises:
        UserError: no such URL, or a key that no header can carry.
    """

    def __init__(self, endpoint: str, config: EvaluateConfig, flights: int = 1) -> None:
        self.base = base_url(endpoint)
        self.config = config
        local = urlsplit(self.base).hostname in ("127.0.0.1", "localhost", "::1")
        key = _key()
        self.http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=10.0),  # what httpx calls a timeout is the pause between two bytes
            limits=httpx.Limits(max_connections=flights, max_keepalive_connections=flights),
            headers={"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {}),
            trust_env=not local,  # a proxy of the environment cannot reach this machine's own ports
        )

    async def __aenter__(self) -> Service:
        await self.http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.__aexit__(kind, error, trace)

    async def send(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """The reply; after all retries the last one, with its error.

        Raises:
            Gone: nobody is there.
            UserError: the service refuses whatever is asked.
        """
        reply = await self._once(method, path, body)
        for attempt in range(self.config.retries):
            if not (reply.gone or (reply.error and (reply.status is None or reply.status in _RETRIED))):
                break
            grown = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
            # Jitter: requests that were refused together must not come back together.
            await asyncio.sleep(max(reply.pause_s, grown * random.uniform(0.5, 1.0)))
            reply = await self._once(method, path, body)
        if reply.gone:
            raise Gone(f"{public(self.base)}: {reply.error} (tried {self.config.retries + 1} times)", reply.status)
        if reply.status in _REFUSES_EVERYTHING:
            raise UserError(f"{public(self.base)}: {reply.error}{_hint(reply.status)}")
        return reply

    async def _once(self, method: str, path: str, body: bytes | None) -> Reply:
        try:
            async with asyncio.timeout(self.config.request_timeout_s):
                response = await self.http.request(method, self.base + path, content=body)
        except TimeoutError:
            return Reply(error=f"no answer within {self.config.request_timeout_s:g} s")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as broken:
            return Reply(error=f"connection failed: {type(broken).__name__}: {broken}", gone=True)
        except httpx.RequestError as broken:
            return Reply(error=f"connection broke: {type(broken).__name__}: {broken}")
        return _reply(response)


def base_url(endpoint: str) -> str:
    """The endpoint with `/v1` at its end, once.

    Raises:
        UserError: no http URL.
    """
    try:
        url = httpx.URL(endpoint)
    except httpx.InvalidURL as invalid:
        raise UserError(f"{endpoint}: not an endpoint ({invalid})") from invalid
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"{endpoint}: not an endpoint; a URL such as http://127.0.0.1:8000 is one")
    return endpoint.rstrip("/").removesuffix("/v1") + "/v1"


def public(url: str) -> str:
    """The URL without the password that it may hold, for files and messages."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment's {KEY} holds a character that no key has")
    return key


def _reply(response: httpx.Response) -> Reply:
    try:
        content = response.json()
    except (ValueError, RecursionError):
        content = None
    if response.status_code == 200:
        return Reply(200, content)
    error = content.get("error") if isinstance(content, dict) else None
    error = error if isinstance(error, dict) else {}
    said = error.get("message")
    # While Ray Serve deploys, and behind many a gateway, a proxy whose service is away says 404, too; only that of the
    # service itself is about the model.
    about_the_model = said is not None and "model" in f"{said} {error.get('code')} {error.get('param')}".lower()
    gone = response.status_code == 404 and not about_the_model
    said = " ".join(str(response.text if said is None else said).split())[:300]
    wait = response.headers.get("retry-after", "")
    pause_s = min(float(wait), LONGEST_PAUSE_S) if wait.replace(".", "", 1).isdecimal() else 0.0
    return Reply(response.status_code, content, f"HTTP {response.status_code}: {said}", gone, pause_s)


def _hint(status: int | None) -> str:
    if status not in (401, 403):
        return ""
    return f"; the key sent was that of {KEY}" if _key() else f"; a key is taken from the environment's {KEY}"
