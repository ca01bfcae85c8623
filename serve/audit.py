"""Who asked what, when, and what came of it: one JSON object a line, rotated.

A request that a replica answered is in the replica's file, with the model and what it cost; one that never got there
(no key, too large, nobody there) is in the proxy's. `request_id` is the header `x-request-id` of the response.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

if TYPE_CHECKING:
    from serve.engine import Answer
    from serve.errors import ApiError

AUDITED = "x-captune-audited"
"""Header by which a replica tells the proxy in front of it that this request is written down."""
_FILE_BYTES = 50_000_000
_FILES = 10
_CLIENT_LEFT = 499
"""Nobody's status: what proxies note of a client that did not wait for its response."""


@dataclass
class Outcome:
    """One request.

    Attributes:
        time: when it ended, UTC.
        key: the name of its API key.
        seconds: from its first byte here to the last of the response.
        code: OpenAI's, of a refusal.
        contents: the messages, pictures as their lengths, and the answers; only where they are asked for.
    """

    time: str
    request_id: str
    key: str | None
    client: str
    method: str
    path: str
    status: int
    seconds: float
    model: str | None = None
    request_bytes: int = 0
    pictures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    code: str | None = None
    contents: dict[str, Any] | None = None

    @classmethod
    def of(cls, scope: Scope, request_id: str, key: str | None, status: int, seconds: float, **more: Any) -> Outcome:
        """The outcome of an ASGI request."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        client = (scope.get("client") or ("", 0))[0]
        return cls(now, request_id, key, client, scope["method"], scope["path"], status, round(seconds, 4), **more)


class Audit:
    """A file of outcomes of this process in a folder, `WHO-HOST-PROCESS.jsonl`; ten of 50 MB are kept.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, who: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{who}-{socket.gethostname()}-{os.getpid()}.jsonl"
        handler = RotatingFileHandler(
            folder / name, maxBytes=_FILE_BYTES, backupCount=_FILES - 1, encoding="utf-8", delay=True
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._log = logging.Logger(f"audit {time.monotonic_ns()}")  # of its own: nobody's settings reach it
        self._log.addHandler(handler)

    def write(self, outcome: Outcome) -> None:
        """One line more."""
        found = {key: value for key, value in asdict(outcome).items() if value is not None}
        self._log.info(json.dumps(found, ensure_ascii=False))


class Record:
    """What is known of one request while a replica works on it; written down by `close`, also when its client left.

    Args:
        audit: None: nothing is written.
        scope: of the request.
    """

    def __init__(self, audit: Audit | None, scope: Scope, request_id: str, key: str | None, model: str) -> None:
        self.audit, self.scope, self.request_id, self.key, self.model = audit, scope, request_id, key, model
        self.began = time.monotonic()
        self.request_bytes = self.pictures = self.expected = 0
        self.messages: list[Any] | None = None
        self.answers: list[Answer] = []
        self.refusal: ApiError | None = None

    def close(self) -> None:
        """The line of this request."""
        if self.audit is None:
            return
        code, contents = None, None
        status = 200 if 0 < self.expected == len(self.answers) else _CLIENT_LEFT
        if self.refusal is not None:
            status, code = self.refusal.status, self.refusal.code
        if self.messages is not None:
            contents = {"messages": self.messages, "answers": [answer.text for answer in self.answers]}
        outcome = Outcome.of(
            self.scope,
            self.request_id,
            self.key,
            status,
            time.monotonic() - self.began,
            model=self.model,
            request_bytes=self.request_bytes,
            pictures=self.pictures,
            prompt_tokens=self.answers[0].prompt_tokens if self.answers else 0,
            completion_tokens=sum(answer.completion_tokens for answer in self.answers),
            code=code,
            contents=contents,
        )
        self.audit.write(outcome)


def contents(messages: list[Any]) -> list[Any]:
    """Messages as they were sent, but for pictures, of which only the length is kept."""
    found = json.loads(json.dumps(messages))
    for part in (part for message in found if isinstance(message["content"], list) for part in message["content"]):
        if part["type"] == "image_url":
            part["image_url"] = f"{len(part['image_url']['url'])} characters"
    return list(found)
