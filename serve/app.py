"""The Ray Serve application: an OpenAI-compatible endpoint in front of one merged model.

`build` is the typed builder that a Serve config file names (`import_path: serve.app:build`); `start` and `stop` are
what the command line and the tests call. How full batches are is in Prometheus (`serve_actual_batch_size`) and at `GET
/stats`.
"""

# No `from __future__ import annotations`: Ray Serve and FastAPI read the annotations at run time.
import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import fastapi
import ray
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from starlette.exceptions import HTTPException

from pipelines import groups
from pipelines.adapters.unmerged import refuse_misfit
from pipelines.errors import UserError, WorkFailed
from pipelines.manifest import identity
from pipelines.modelfiles import model_identity
from serve.api import ApiError, ChatRequest, completion, models, parse
from serve.config import ServeConfig
from serve.gate import BatchGate
from serve.port import free_port

_HEALTHY_WITHIN_S = 60.0
_SHUTDOWN_S = 30.0
_PROXY_READY_S = 60
"""Ray Serve kills a proxy that is not up within this time; its own 5 s are too few for a machine that also trains."""
_PROXY_GRACE_S = 2.0
"""The proxy gives up this much later than the replica, so that the client gets the replica's error body."""

api = fastapi.FastAPI(title="captune", docs_url=None, redoc_url=None)


@api.exception_handler(ApiError)
async def _refuse(request: fastapi.Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status)


@api.exception_handler(HTTPException)
async def _refuse_route(request: fastapi.Request, error: HTTPException) -> JSONResponse:
    """Unknown routes and methods, in the same shape as every other refusal."""
    return JSONResponse(ApiError(error.status_code, f"{request.url.path}: {error.detail}").body(), error.status_code)


class BuildArgs(BaseModel):
    """Arguments of the application, as `args` of a Serve config file.

    Attributes:
        model: merged model directory, on every node that may run a replica.
        adapter: directory of an adapter to answer with unmerged, likewise; empty: none.
        name: the model's name in requests.
        config: the `serve` section of a recipe.
        start_tries: how often a replica that does not come up is tried again, up to a minute apart, before the
            deployment is given up; at most RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT times the replicas. Ray never tries
            again what it has given up, so an endpoint that may wait for its model wants many.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str
    adapter: str = ""
    name: str = "captune"
    config: ServeConfig = Field(default_factory=ServeConfig)
    start_tries: int = Field(default=2, ge=1)


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
        self.preparing = ThreadPoolExecutor(max(2, threads), thread_name_prefix="prepare")
        self.generating = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self.gate = BatchGate(self.config.max_batch_size)
        self.created = int(time.time())
        self.batch_sizes: dict[int, int] = {}
        batched: Any = self._batched  # `serve.batch` adds the setters
        batched.set_max_batch_size(self.config.max_batch_size)
        batched.set_batch_wait_timeout_s(self.config.batch_wait_s)

    @api.post("/v1/chat/completions")
    async def chat(self, request: fastapi.Request) -> JSONResponse:
        """Answer one conversation."""
        body = await request.body()
        try:
            async with asyncio.timeout(self.config.request_timeout_s):
                return JSONResponse(await self._answer(body))
        except TimeoutError:
            raise ApiError(408, f"no answer within {self.config.request_timeout_s:g} s", code="timeout") from None

    @api.get("/v1/models")
    async def models(self) -> JSONResponse:
        """The one model here, and its identity."""
        return JSONResponse(models(self.name, self.created, self.identity))

    @api.get("/health")
    @api.get("/healthz")
    async def health(self) -> JSONResponse:
        """Answers once the model is loaded."""
        return JSONResponse({"status": "ok", "model": self.name})

    @api.get("/stats")
    async def stats(self) -> JSONResponse:
        """Batches of this replica so far, by size."""
        sizes = {str(size): count for size, count in sorted(self.batch_sizes.items())}
        requests = sum(size * count for size, count in self.batch_sizes.items())
        return JSONResponse({"batches": sum(self.batch_sizes.values()), "requests": requests, "batch_sizes": sizes})

    async def _answer(self, body: bytes) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        chat, prepared = await loop.run_in_executor(self.preparing, partial(self._prepare, body))
        async with self.gate:
            answer = await self._batched(prepared)
        if answer.error is not None:
            raise ApiError(500, answer.error)
        return completion(chat, answer, self.identity)

    def _prepare(self, body: bytes) -> tuple[ChatRequest, Any]:
        chat, request = parse(body, self.name, self.config)
        prepared = self.engine.prepare(request)
        if prepared.error is not None:
            raise ApiError(400, prepared.error, param="messages")
        return chat, prepared

    @serve.batch
    async def _batched(self, batch: list[Any]) -> list[Any]:
        self.batch_sizes[len(batch)] = self.batch_sizes.get(len(batch), 0) + 1
        with self.gate.running():
            return await asyncio.get_running_loop().run_in_executor(self.generating, self.engine.generate, batch)


def build(args: BuildArgs) -> Application:
    """The application for a model directory; the builder of a Serve config file, on a cluster of its own.

    Raises:
        UserError: the model is not complete and another one answers already, which then goes on.
    """
    if _answers():
        _refuse_incomplete(Path(args.model))
    return _application(args, {})


def _application(args: BuildArgs, where: dict[str, str]) -> Application:
    """`where`: labels of the nodes that replicas run on."""
    config = args.config
    captune: Any = Captune  # a class to mypy, a deployment since `serve.deployment`
    deployment = captune.options(
        num_replicas=config.replicas,
        # A batch in the model and the next one prepared in front of the gate; health and stats besides.
        max_ongoing_requests=2 * config.max_batch_size + 8,
        max_queued_requests=config.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
            "label_selector": where,
        },
        max_constructor_retry_count=args.start_tries,
        graceful_shutdown_timeout_s=config.request_timeout_s + _PROXY_GRACE_S,  # answers under way are finished
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    told = {"model": args.model, "adapter": args.adapter, "name": args.name, "config": asdict(config)}
    return deployment.bind(told)


def start(
    model: Path,
    config: ServeConfig,
    *,
    adapter: Path | None = None,
    name: str = "captune",
    route_prefix: str = "/",
    port: int = 8000,
    host: str = "127.0.0.1",
) -> str:
    """Serve `model` on the Ray cluster this process is connected to; returns the base URL once it answers.

    Several applications live side by side when their names and route prefixes differ; the first decides host and port.

    Args:
        adapter: trained on this model; answers come from both, unmerged.
        port: 0 takes a free one.

    Raises:
        UserError: the model directory is not complete, the adapter does not fit it, or the port is taken.
        WorkFailed: the model did not start.
    """
    _refuse_incomplete(model)
    if adapter is not None:
        refuse_misfit(Path(model), adapter)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # importing Ray Serve has set it to INFO
    place = str(adapter.resolve()) if adapter is not None else ""
    args = BuildArgs(model=str(Path(model).resolve()), adapter=place, name=name, config=config)
    root = _start_http(host, port, config.request_timeout_s + _PROXY_GRACE_S)
    try:
        serve.run(_application(args, groups.selector(config.demand().group)), name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        stop(name)
        raise WorkFailed(f"{model}: the service did not start: {error}") from error
    base = root + route_prefix.rstrip("/")
    _wait_until_healthy(base)
    return base


def _answers() -> bool:
    """Whether a replica lives on this cluster; asked of Ray's names, because Serve's own status is empty while it
    builds, and also where no cluster is connected.
    """
    if not ray.is_initialized():
        return False
    named: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["name"].startswith("SERVE_REPLICA::") for actor in named)


def _refuse_incomplete(model: Path) -> None:
    """Here, in one line: in a replica the same error is tried three times and logged with Ray's tracebacks."""
    from pipelines.mgm.load import check_tensors, load_processor

    check_tensors(model)
    load_processor(model)


def stop(name: str = "captune", *, last: bool = True) -> None:
    """Take the application away; the last one takes Ray Serve, and with it the port, along, unless others will come."""
    serve.delete(name)
    if last:
        shutdown()


def shutdown() -> None:
    """End Ray Serve where nothing is served any more."""
    # Asked without a cluster, Serve would start one.
    client: Any = ray.is_initialized() and serve.context._get_global_client(raise_if_no_controller_running=False)
    if client and not serve.status().applications:
        # The controller's last task kills the controller itself; `serve.shutdown` lets Ray retry it, and Ray complains.
        with suppress(RayActorError):
            ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=_SHUTDOWN_S)
        serve.shutdown()


def _start_http(host: str, port: int, timeout_s: float) -> str:
    running = serve.context._get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        options = running.http_config
        if port not in (0, options.port):
            raise UserError(
                f"port {port}: Ray Serve already runs on port {options.port} of this cluster; "
                "use that one or stop it first"
            )
        return f"http://{_reachable(options.host or host)}:{options.port}"
    port = free_port(host, port)
    try:
        serve.start(
            http_options={"host": host, "port": port, "request_timeout_s": timeout_s},
            logging_config={"log_level": "WARNING"},
            controller_options={
                "runtime_env": {"env_vars": {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(_PROXY_READY_S)}}
            },
        )
    except TimeoutError as error:
        raise WorkFailed(f"{host}:{port}: Ray Serve's HTTP proxy did not come up ({error})") from error
    return f"http://{_reachable(host)}:{port}"


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _wait_until_healthy(base: str) -> None:
    import httpx

    deadline = time.monotonic() + _HEALTHY_WITHIN_S
    with httpx.Client(trust_env=False, timeout=5.0) as http:
        while True:
            try:
                if http.get(f"{base}/health").status_code == 200:
                    return
            except httpx.TransportError as error:
                if time.monotonic() > deadline:
                    raise WorkFailed(
                        f"{base} did not become healthy within {_HEALTHY_WITHIN_S:g} s ({error})"
                    ) from error
            if time.monotonic() > deadline:
                raise WorkFailed(f"{base} did not become healthy within {_HEALTHY_WITHIN_S:g} s")
            time.sleep(0.1)
