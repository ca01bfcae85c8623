"""A small benchmark on disk, and a chat endpoint that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def entry(number: int, **changes: Any) -> dict[str, Any]:
    """One annotation entry; the right answer to question N is `wordN`."""
    return {
        "question_id": 100 + number,
        "image_id": f"pic{number}",
        "question": f"What is {number}?",
        "answers": [f"word{number}"] * 10,
        "ocr_tokens": [f"word{number}", "STOP"],
    } | changes


@pytest.fixture
def benchmark(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """`benchmark(20)` writes 20 questions with pictures; returns annotation file and picture directory."""

    def make(count: int, **changes: Any) -> tuple[Path, Path]:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        for number in range(count):
            (images / f"pic{number}.jpg").write_bytes(f"bytes of {number}".encode())
        annotations = tmp_path / "annotations.json"
        annotations.write_text(json.dumps({"data": [entry(number, **changes) for number in range(count)]}))
        return annotations, images

    return make


class Endpoint:
    """What an OpenAI-compatible server may do. `faults[prompt line] = [...]` are played before it answers; `asked`
    counts.

    A fault is a status, or: `hang`, `garbage`, `drip` (a byte now and then), `away` (the 404 of a proxy whose service
    is being deployed), `cut` (an answer that reached the token limit); or, from here on, `another model` of captune's
    and `another root`, of a service that names none in its answers.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.faults: dict[str, list[Any]] = {}
        self.pause_s = 0.0
        self.in_flight = self.most_in_flight = 0
        self.bodies: list[dict[str, Any]] = []
        self.url = ""
        self.models: list[dict[str, Any]] = [{"id": "stub"}]
        self.system_fingerprint: str | None = None
        self.key = ""
        self.says = ""

    def is_captune(self, identity: str) -> None:
        """Publish a model as captune's own service does."""
        self.models, self.system_fingerprint = [{"id": "stub", "identity": identity}], identity

    def app(self) -> Any:
        import fastapi
        from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

        app = fastapi.FastAPI()

        @app.middleware("http")
        async def only_with_the_key(request: fastapi.Request, answer: Any) -> Any:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "no such key"}}, 401)
            return await answer(request)

        @app.get("/v1/models")
        async def models() -> Any:
            stamped = [{**model, "created": time.time()} for model in self.models]
            return {"object": "list", "data": stamped}

        @app.post("/v1/chat/completions")
        async def chat(body: dict[str, Any]) -> Any:
            question = body["messages"][0]["content"][-1]["text"].split("\n")[0]
            self.asked[question] += 1
            self.bodies.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            await asyncio.sleep(self.pause_s)
            self.in_flight -= 1
            fault = self.faults.get(question, [])
            play = fault.pop(0) if fault else None
            if play == "hang":
                await asyncio.sleep(60)
            if play == "drip":
                return StreamingResponse(_drip(b'{"choices": []}'), media_type="application/json")
            if play == "garbage":
                return PlainTextResponse("<html>")
            if play == "away":
                return PlainTextResponse("Path '/v1/chat/completions' not found.", 404)
            if isinstance(play, int):
                headers = {"retry-after": "0"} if play == 429 else {}
                code = "model_not_found" if play == 404 else None
                return JSONResponse({"error": {"message": f"played {play}", "code": code}}, play, headers=headers)
            if play == "another model":
                self.is_captune("b" * 32)
            if play == "another root":
                self.models = [{"id": "stub", "root": "/models/another"}]
            number = question.removeprefix("What is ").removesuffix("?")
            message = {"role": "assistant", "content": self.says or f"Word{number}."}
            end = "length" if play == "cut" else "stop"
            return {
                "choices": [{"message": message, "finish_reason": end}],
                "system_fingerprint": self.system_fingerprint,
            }

        return app


async def _drip(content: bytes) -> AsyncIterator[bytes]:
    for byte in content:
        await asyncio.sleep(0.2)
        yield bytes([byte])


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    import uvicorn

    stub = Endpoint()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        stub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(stub.app(), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield stub
        server.should_exit = True
        thread.join(10)
