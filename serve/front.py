"""What stands in front of Ray Serve's proxy, in the same process: who may ask, how large a request may be, and that
every refusal is an OpenAI error.

Ray Serve asks the function that RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names for `middlewares` when a proxy starts.
A request reaches a replica only when it is here as a whole: a slow or endless body holds no place there, and what a
dying replica had in hand is given to another one.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import body
from serve.audit import AUDITED, Audit, Outcome
from serve.config import ServeConfig
from serve.errors import ApiError
from serve.keys import Key, Keys
from serve.limits import Limits

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
SETTINGS = "CAPTUNE_FRONT"
"""The environment's variables of a proxy: where `middlewares` is, and `Settings` as JSON (none: the defaults)."""
REQUEST_ID = "x-request-id"
KEY_NAME = "x-captune-key"
"""Tells the replica whose key it was; what a client sends under this name is taken away."""
_OPEN = ("/health", "/healthz", "/-/healthz", "/-/routes", "/chat")
"""Ends of paths that are open without a key: what probes ask, and the page, which asks its user for one."""
_TRIES, _PAUSE_S = 3, 0.2
_HELD_AT_ONCE = 16
"""Bodies of full length that a proxy holds; more wait for nobody and are refused."""
_LONGEST_ID = 200


@dataclass(frozen=True)
class Settings:
    """The keys of `ServeConfig` that matter here."""

    max_body_bytes: int = ServeConfig.max_body_bytes
    body_timeout_s: float = ServeConfig.body_timeout_s
    keys: str = ServeConfig.keys
    audit: str = ServeConfig.audit
    audit_contents: bool = ServeConfig.audit_contents


def environment(config: ServeConfig) -> dict[str, str]:
    """Variables that a proxy must find to be guarded as `config` says."""
    mine = {field.name: getattr(config, field.name) for field in fields(Settings)}
    return {CALLBACK: f"{__name__}:{middlewares.__name__}", SETTINGS: json.dumps(asdict(Settings(**mine)))}


def middlewares() -> list[Middleware]:
    """For Ray Serve.

    Raises:
        UserError: the file of keys is none.
    """
    return [Middleware(Front, settings=Settings(**json.loads(os.environ.get(SETTINGS, "{}"))))]


class Front:
    """ASGI middleware around Ray Serve's proxy.

    Raises:
        UserError: the file of keys is none.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.keys = Keys(Path(settings.keys)) if settings.keys else None
        self.limits = Limits()
        self.audit = Audit(Path(settings.audit), "proxy") if settings.audit else None
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or what else a server tells its application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, send)
        began = time.monotonic()
        key: Key | None = None
        try:
            key = await self._admit(exchange)
            with self._holding(scope) as hold:
                whole = await body.read(scope, receive, self.settings.max_body_bytes, self.settings.body_timeout_s)
                hold(len(whole))
                await self._forward(exchange, whole, receive)
        except ApiError as refusal:
            if refusal.status == 413:
                await body.discard(receive)
            await exchange.refuse(refusal)
        except ConnectionError:
            return  # whoever asked has gone
        finally:
            if self.audit is not None and not exchange.audited and not _is_open(scope):
                seconds = time.monotonic() - began
                self.audit.write(Outcome.of(scope, exchange.id, key.name if key else None, exchange.status, seconds))

    async def _admit(self, exchange: Exchange) -> Key | None:
        """Whose request it is; None where anybody may ask.

        Raises:
            ApiError: 401, 403 or 429.
        """
        headers = MutableHeaders(scope=exchange.scope)
        del headers[KEY_NAME]
        if self.keys is None or _is_open(exchange.scope):
            return None
        key = self.keys.who(headers.get("authorization", ""))
        headers[KEY_NAME] = key.name
        await self.limits.take(key)
        return key

    @contextmanager
    def _holding(self, scope: Scope) -> Iterator[Callable[[int], None]]:
        """Count the bytes of a body while it is held: those that are announced, then those that came.

        Raises:
            ApiError: 429, too many are on their way.
        """
        announced = Headers(scope=scope).get("content-length", "0")
        chunked = "transfer-encoding" in Headers(scope=scope)
        most = self.settings.max_body_bytes
        own = most if chunked else min(int(announced), most) if announced.isdigit() else 0
        if own and self.held + own > _HELD_AT_ONCE * most:
            raise ApiError(429, "too many large requests are on their way", code="overloaded", wait_s=1)
        self.held += own

        def replace(size: int) -> None:
            nonlocal own
            self.held += size - own
            own = size

        try:
            yield replace
        finally:
            self.held -= own

    async def _forward(self, exchange: Exchange, whole: bytes, receive: Receive) -> None:
        """Let a replica answer; another one where the first dies before it says a word.

        Raises:
            ApiError: 503, none did.
        """
        for attempt in range(_TRIES):
            await asyncio.sleep(_PAUSE_S * attempt)  # until the router knows that it is dead
            await self.app(exchange.scope, _again(whole, receive, exchange), exchange.send)
            if exchange.complete or exchange.left:
                return
            if exchange.started:
                await exchange.break_off()
                return
        raise ApiError(503, "the replica that had this request died", code="unavailable", wait_s=1)


class Exchange:
    """One response on its way out: what Ray Serve's proxy says in plain text becomes an OpenAI error."""

    def __init__(self, scope: Scope, send: Send) -> None:
        headers = MutableHeaders(scope=scope)
        given = headers.get(REQUEST_ID, "")
        self.id = given if 0 < len(given) <= _LONGEST_ID and given.isprintable() else secrets.token_hex(16)
        headers[REQUEST_ID] = self.id
        self.scope, self._send = scope, send
        self.status, self.started, self.complete, self.audited = 0, False, False, False
        self.left = False
        self._streams = False
        self._plain: list[bytes] | None = None
        self._plain_headers = Headers()

    async def send(self, message: Message) -> None:
        """Pass on one message of the proxy."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            self.status = message["status"]
            self.audited = AUDITED in headers
            del headers[AUDITED]
            if self.status >= 400 and not headers.get("content-type", "").startswith("application/json"):
                self._plain, self._plain_headers = [], Headers(raw=message["headers"])
                return
            self._streams = headers.get("content-type", "").startswith("text/event-stream")
            self.started = True
        elif message["type"] == "http.response.body":
            last = not message.get("more_body", False)
            if self._plain is not None:
                self._plain.append(message.get("body", b""))
                if last:
                    await self._translate()
                return
            self.complete = last
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """The whole response."""
        self.status, self.started = error.status, True
        headers = {**error.headers(), REQUEST_ID: self.id}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        await JSONResponse(error.body(), error.status, headers)(self.scope, _nothing, self._send)
        self.complete = True

    async def break_off(self) -> None:
        """The replica died in the middle of its answer. A stream can say so; another response just ends short."""
        self.status = 503
        if self._streams:
            error = ApiError(503, "the replica died in the middle of its answer", code="unavailable").body()
            said = f"data: {json.dumps(error)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": said, "more_body": False})

    async def _translate(self) -> None:
        """A refusal of the proxy, which knows nothing of OpenAI."""
        said = b"".join(self._plain or []).decode("utf-8", "replace").strip() or "no reason given"
        wait = self._plain_headers.get("retry-after", "")
        error = ApiError(self.status, said[:500], wait_s=int(wait) if wait.isdigit() else None)
        if self.status == 404:  # the proxy knows no application for this path: it starts, or changes
            error = ApiError(503, "nothing is served here at this moment", code="unavailable", wait_s=1)
        await self.refuse(error)


def _is_open(scope: Scope) -> bool:
    path = scope["path"].rstrip("/")
    return not path or path.endswith(_OPEN)


def _again(whole: bytes, receive: Receive, exchange: Exchange) -> Receive:
    """A `receive` that has the whole body first, and then what the client does."""
    sent = False

    async def next_message() -> Message:
        nonlocal sent
        if sent:
            message = await receive()
            exchange.left = exchange.left or message["type"] == "http.disconnect"
            return message
        sent = True
        return {"type": "http.request", "body": whole, "more_body": False}

    return next_message


async def _nothing() -> Message:
    raise AssertionError("a refusal reads no request")
