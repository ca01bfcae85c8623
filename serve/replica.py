"""One replica of the application: its routes, and a request's way from its body to its answer."""

# No `from __future__ import annotations`: Ray Serve and FastAPI read the annotations at run time. And what the routes
# of `Captune` use stands above it: Ray Serve freezes them where the class ends.
import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fastapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from ray import serve
from starlette.exceptions import HTTPException

from pipelines.manifest import identity
from pipelines.modelfiles import model_identity
from pipelines.progress import say
from serve import body
from serve.api import parse, require_json
from serve.audit import AUDITED, Audit, Record, contents
from serve.config import ServeConfig
from serve.desk import Deadline, Desk, Stream, sound, speak
from serve.errors import ApiError
from serve.gate import BatchGate
from serve.keys import Keys
from serve.replies import Chunks, completion, model_entry
from serve.schema import ChatRequest

_PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
api = fastapi.FastAPI(title="captune", docs_url=None, redoc_url=None)


@api.exception_handler(ApiError)
async def _refuse(request: fastapi.Request, error: ApiError) -> JSONResponse:
    audited = {AUDITED: "1"} if getattr(request.state, "audited", False) else {}
    return JSONResponse(error.body(), error.status, error.headers() | audited)


@api.exception_handler(HTTPException)
async def _refuse_route(request: fastapi.Request, error: HTTPException) -> JSONResponse:
    """Unknown routes and methods, in the same shape as every other refusal."""
    refusal = ApiError(error.status_code, f"{request.url.path}: {error.detail}")
    return JSONResponse(refusal.body(), error.status_code, error.headers)


@api.exception_handler(Exception)
async def _fail(request: fastapi.Request, error: Exception) -> JSONResponse:
    """A fault of this service; Ray's log has its traceback."""
    return JSONResponse(ApiError(500, f"the service failed: {type(error).__name__}").body(), 500)


def _forget(prepared: list[Any]) -> None:
    """Nobody waits for these any more: what is not answered yet costs nothing more."""
    for one in prepared:
        one.wanted = False


@serve.deployment
@serve.ingress(api)
class Captune:
    """One replica: decodes and prepares requests on a few threads, generates in batches on one."""

    def __init__(self, args: dict[str, Any]) -> None:
        import torch
        from transformers.utils import logging as transformers_logging

        from serve.engine import Engine

        transformers_logging.disable_progress_bar()
        self.name = args["name"]
        self.config = ServeConfig(**args["config"])
        threads = max(1, int(self.config.cpus_per_replica))
        torch.set_num_threads(threads)
        self.identity = model_identity(args["model"])
        if args["adapter"]:
            self.identity += f"+{identity(args['adapter'])}"
        self.engine = Engine(args["model"], adapter=args["adapter"], dtype=self.config.dtype)
        if problem := self.engine.try_picture():
            say(f"{args['model']}: it will answer no question about a picture: {problem}")
        self.preparing = ThreadPoolExecutor(max(2, threads), thread_name_prefix="prepare")
        self.generating = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self.keys = Keys(Path(self.config.keys)) if self.config.keys else None
        self.audit = Audit(Path(self.config.audit), "replica") if self.config.audit else None
        self.desk = Desk(2 * self.config.max_batch_size, self.config.max_queued_requests)
        self.gate = BatchGate(self.config.max_batch_size)
        self.created = int(time.time())
        self.batch_sizes: dict[int, int] = {}
        batched: Any = self._batched  # `serve.batch` adds the setters
        batched.set_max_batch_size(self.config.max_batch_size)
        batched.set_batch_wait_timeout_s(self.config.batch_wait_s)

    @api.post("/v1/chat/completions")
    async def chat(self, request: fastapi.Request) -> Response:
        """Answer one conversation, whole or as a stream."""
        key = self._who(request)
        record = Record(self.audit, request.scope, request.headers.get("x-request-id", ""), key, self.name)
        request.state.audited = self.audit is not None
        async with AsyncExitStack() as held:
            held.callback(record.close)
            try:
                response = await self._chat(request, record, held)
            except ApiError as refusal:
                record.refusal = refusal
                raise
        if self.audit is not None:
            response.headers[AUDITED] = "1"
        return response

    async def _chat(self, request: fastapi.Request, record: Record, held: AsyncExitStack) -> Response:
        """The response; one that goes on takes over what is held for the request."""
        require_json(request.headers.get("content-type", ""))
        sent = await body.read(request.scope, request.receive, self.config.max_body_bytes, self.config.body_timeout_s)
        record.request_bytes = len(sent)
        deadline = Deadline(self.config.request_timeout_s)
        await deadline.of(held.enter_async_context(self.desk))
        preparing = asyncio.get_running_loop().run_in_executor(self.preparing, partial(self._prepare, sent))
        chat, prepared = await deadline.of(preparing)
        held.callback(_forget, prepared)
        record.expected, record.pictures = len(prepared), len(prepared[0].request.images)
        if self.config.audit_contents:
            record.messages = contents(chat.model_dump(exclude_none=True)["messages"])
        generate, logprobs = partial(self._generate, record), bool(chat.logprobs)
        if not chat.stream:
            answers = await deadline.of(asyncio.gather(*map(generate, prepared)))
            return JSONResponse(completion(self.name, [sound(each) for each in answers], self.identity, logprobs))
        usage = bool(chat.stream_options and chat.stream_options.include_usage)
        events = speak(prepared, generate, Chunks(self.name, self.identity, include_usage=usage, logprobs=logprobs))
        held.push_async_callback(events.aclose)
        first = await deadline.of(anext(events))
        return Stream(first, events, deadline, held.pop_all(), partial(setattr, record, "refusal"))

    @api.get("/v1/models")
    async def models(self, request: fastapi.Request) -> JSONResponse:
        """The one model here, and its identity."""
        self._who(request)
        entry = model_entry(self.name, self.created, self.identity)
        return JSONResponse({"object": "list", "data": [entry]})

    @api.get("/v1/models/{name:path}")
    async def model(self, name: str, request: fastapi.Request) -> JSONResponse:
        """The model of that name."""
        self._who(request)
        if name != self.name:
            raise ApiError(404, f"the model '{name}' does not exist here", param="model", code="model_not_found")
        return JSONResponse(model_entry(self.name, self.created, self.identity))

    @api.api_route("/health", methods=["GET", "HEAD"])
    @api.api_route("/healthz", methods=["GET", "HEAD"])
    async def health(self) -> JSONResponse:
        """Answers once the model is loaded, however many requests wait."""
        return JSONResponse({"status": "ok", "model": self.name})

    @api.get("/")
    @api.get("/chat")
    async def page(self) -> HTMLResponse:
        """A page to try the model with; the browser lets it ask nobody else."""
        return HTMLResponse(_PAGE, headers={"content-security-policy": _POLICY})

    @api.get("/stats")
    async def stats(self, request: fastapi.Request) -> JSONResponse:
        """Batches of this replica so far, by size."""
        self._who(request)
        sizes = {str(size): count for size, count in sorted(self.batch_sizes.items())}
        requests = sum(size * count for size, count in self.batch_sizes.items())
        return JSONResponse({"batches": sum(self.batch_sizes.values()), "requests": requests, "batch_sizes": sizes})

    async def check_health(self) -> None:
        """Ray Serve asks; a replica that can answer nothing more is replaced.

        Raises:
            RuntimeError: the device has failed for good.
        """
        if self.engine.broken:
            raise RuntimeError(self.engine.broken)

    def _who(self, request: fastapi.Request) -> str | None:
        """The name of the key that asks. `front` has looked already, where it is there; here is nothing to get around.

        Raises:
            ApiError: 401 or 403.
        """
        return self.keys.who(request.headers.get("authorization", "")).name if self.keys is not None else None

    def _prepare(self, sent: bytes) -> tuple[ChatRequest, list[Any]]:
        """The request, and what the engine needs for each of its `n` answers."""
        chat, request = parse(
            sent, self.name, self.config, max_characters=self.engine.max_characters, see=self.engine.see
        )
        prepared = self.engine.prepare(request)
        if prepared.error is not None:
            raise ApiError(400, prepared.error, param="messages", code=prepared.code)
        seeds = range(request.seed, request.seed + (chat.n or 1))
        return chat, [replace(prepared, request=replace(request, seed=seed)) for seed in seeds]

    async def _generate(self, record: Record, prepared: Any) -> Any:
        async with self.gate:
            answer = await self._batched(prepared)
        record.answers.append(answer)
        return answer

    @serve.batch
    async def _batched(self, batch: list[Any]) -> list[Any]:
        self.batch_sizes[len(batch)] = self.batch_sizes.get(len(batch), 0) + 1
        with self.gate.running():
            return await asyncio.get_running_loop().run_in_executor(self.generating, self.engine.generate, batch)
