"""Asks an OpenAI-compatible endpoint many questions at once; every answer is on disk as soon as it is here."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.errors import UserError, WorkFailed
from pipelines.evaluate.benchmark import Prediction
from pipelines.evaluate.config import EvaluateConfig
from pipelines.files import write_text
from pipelines.progress import Progress

if TYPE_CHECKING:
    import httpx

RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
REFUSES_EVERYTHING = frozenset((401, 403, 404, 405))
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_SUFFIX_TYPES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp", ".gif": "gif"}


@dataclass(frozen=True)
class Ask:
    """One request: the prompt and the picture that goes before it."""

    id: str
    prompt: str
    image: Path | None


def ask_all(
    asks: Sequence[Ask], endpoint: str, config: EvaluateConfig, journal: Path, *, what: str = "evaluate"
) -> dict[str, Prediction]:
    """Answers by id; a request that the endpoint refuses or cannot answer carries its error.

    What `journal` already holds is not asked again, except failed requests. Greedy (`temperature` 0), so that asking
    again gives the same answers.

    Raises:
        UserError: nothing answers at `endpoint`, or it knows no such model.
        WorkFailed: the endpoint went away; the journal keeps what was answered, and the same call continues.
    """
    done = read_journal(journal)
    done = {ask.id: done[ask.id] for ask in asks if ask.id in done and done[ask.id].error is None}
    rest = [ask for ask in asks if ask.id not in done]
    with Progress(len(asks), what, "questions") as progress:
        progress.start_at(len(done))
        if rest:
            _rewrite(journal, done)
            with journal.open("a", encoding="utf-8") as stream:
                done |= asyncio.run(_Client(endpoint, config, stream, progress).run(rest))
    return done


def read_journal(journal: Path) -> dict[str, Prediction]:
    """What an earlier run got; the last line may be torn where that run was killed."""
    found: dict[str, Prediction] = {}
    if not journal.exists():
        return found
    for line in journal.read_bytes().split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # torn by a kill and then continued by a later run's line break
        found[entry["id"]] = Prediction(**entry)
    return found


def _rewrite(journal: Path, done: dict[str, Prediction]) -> None:
    write_text(journal, "".join(map(_line, done.values())))


def _line(prediction: Prediction) -> str:
    return json.dumps(vars(prediction)) + "\n"


class _Client:
    def __init__(self, endpoint: str, config: EvaluateConfig, journal: IO[str], progress: Progress) -> None:
        self.base = endpoint.rstrip("/").removesuffix("/v1") + "/v1"
        self.config = config
        self.journal = journal
        self.progress = progress
        self.answers: dict[str, Prediction] = {}
        self.errors = 0

    async def run(self, asks: Sequence[Ask]) -> dict[str, Prediction]:
        import httpx

        flights = min(self.config.concurrency, len(asks))
        local = urlsplit(self.base).hostname in ("127.0.0.1", "localhost", "::1")
        async with httpx.AsyncClient(
            timeout=httpx.Timeout(self.config.request_timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=flights, max_keepalive_connections=flights),
            trust_env=not local,  # a proxy of the environment cannot reach this machine's own ports
        ) as http:
            model = await self._model(http)
            queue = iter(asks)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(flights):
                        group.create_task(self._work(http, queue, model))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
        return self.answers

    async def _work(self, http: httpx.AsyncClient, queue: Iterator[Ask], model: str) -> None:
        """One of the flights; all draw from the same iterator."""
        for ask in queue:
            body = await asyncio.to_thread(_body, ask, model, self.config.max_new_tokens)
            response, error = await self._send(http, "POST", "/chat/completions", body)
            text = ""
            if response is not None and response.status_code in REFUSES_EVERYTHING:
                raise UserError(f"{self.base}: {_reason(response)}")
            if response is not None and error is None:
                text, error = _answer(response)
            self._keep(Prediction(ask.id, text, error))

    def _keep(self, prediction: Prediction) -> None:
        self.journal.write(_line(prediction))
        self.journal.flush()
        self.answers[prediction.id] = prediction
        self.errors += prediction.error is not None
        self.progress.update(1, f"{self.errors} failed" if self.errors else "")

    async def _send(
        self, http: httpx.AsyncClient, method: str, path: str, body: bytes | None = None
    ) -> tuple[httpx.Response | None, str | None]:
        """Response, or the error that is left after all retries."""
        import httpx

        for attempt in range(self.config.retries + 1):
            response, pause = None, None
            try:
                response = await http.request(
                    method, self.base + path, content=body, headers={"content-type": "application/json"}
                )
                if response.status_code == 200:
                    return response, None
                error = _reason(response)
                if response.status_code not in RETRIED:
                    return response, error
                pause = _retry_after(response)
            except httpx.ReadTimeout:
                error = f"no answer within {self.config.request_timeout_s:g} s"
            except httpx.TransportError as broken:
                error = f"connection failed: {type(broken).__name__}: {broken}"
                if attempt == self.config.retries:
                    raise WorkFailed(
                        f"{self.base}: {error} ({attempt + 1} attempts). "
                        f"{len(self.answers)} answers of this run are kept; run the same command again to continue"
                    ) from broken
            except httpx.InvalidURL as invalid:
                raise UserError(f"{self.base}: not an endpoint ({invalid})") from invalid
            if attempt < self.config.retries:
                grown = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
                # Jitter: requests that were refused together must not come back together.
                await asyncio.sleep(max(pause or 0.0, grown * random.uniform(0.5, 1.0)))
        return response, error

    async def _model(self, http: httpx.AsyncClient) -> str:
        response, error = await self._send(http, "GET", "/models")
        if response is None or error is not None:
            raise UserError(f"{self.base}/models: {error}; is this an OpenAI-compatible endpoint?")
        try:
            names = [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.base}/models: not the answer of an OpenAI-compatible endpoint") from None
        if self.config.model and self.config.model in names:
            return self.config.model
        if self.config.model or len(names) != 1:
            wanted = f"has no model '{self.config.model}'" if self.config.model else "has not exactly one model"
            raise UserError(f"{self.base} {wanted}; set evaluate.model to one of: {', '.join(names) or '(none)'}")
        return names[0]


def _body(ask: Ask, model: str, max_tokens: int) -> bytes:
    parts: list[dict[str, Any]] = []
    if ask.image is not None:
        kind = _SUFFIX_TYPES.get(ask.image.suffix.lower(), "jpeg")
        encoded = base64.b64encode(ask.image.read_bytes()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded}"}})
    parts.append({"type": "text", "text": ask.prompt})
    message = {"role": "user", "content": parts}
    return json.dumps({"model": model, "messages": [message], "max_tokens": max_tokens, "temperature": 0}).encode()


def _answer(response: httpx.Response) -> tuple[str, str | None]:
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return "", "the endpoint's answer is no chat completion"
    return (text, None) if isinstance(text, str) else ("", "the endpoint's answer holds no text")


def _reason(response: httpx.Response) -> str:
    """What the endpoint said, in one line."""
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = response.text
    return f"HTTP {response.status_code}: {' '.join(str(said).split())[:300]}"


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return min(float(value), LONGEST_PAUSE_S) if value.replace(".", "", 1).isdecimal() else None
