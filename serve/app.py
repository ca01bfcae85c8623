"""The Ray Serve application: an OpenAI-compatible endpoint in front of one merged model.

`build` is the typed builder that a Serve config file names (`import_path: serve.app:build`); `start` and `stop` are
what the command line and the tests call. How full batches are is in Prometheus (`serve_actual_batch_size`) and at `GET
/stats`.
"""

# No `from __future__ import annotations`: Ray Serve reads the annotations at run time.
import logging
import ssl
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application

from pipelines import groups
from pipelines.adapters.unmerged import refuse_misfit
from pipelines.errors import UserError, WorkFailed
from serve import front, keys, limits
from serve.config import ServeConfig
from serve.port import free_port
from serve.replica import Captune

_HEALTHY_WITHIN_S = 60.0
_SHUTDOWN_S = 30.0
_ROOM = 64
"""Requests that a replica has in hand besides those that wait: health, refusals on their way."""
_PROXY_READY_S = 60
"""Ray Serve kills a proxy that is not up within this time; its own 5 s are too few for a machine that also trains."""
_PROXY_GRACE_S = 2.0
"""The proxy gives up this much later than the replica, so that the client gets the replica's error body."""


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
    most = 2 * config.max_batch_size + config.max_queued_requests + _ROOM
    deployment = captune.options(
        num_replicas=config.replicas,
        # All that `Desk` lets in, so that it refuses the rest and health never queues behind them; and so many may wait
        # while a replica starts, or takes over what another had in hand.
        max_ongoing_requests=most,
        max_queued_requests=most,
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
        UserError: the model directory is not complete, the adapter does not fit it, the port is taken, or a file of
            keys or TLS is not what it should be.
        WorkFailed: the model did not start.
    """
    _refuse_incomplete(model)
    if adapter is not None:
        refuse_misfit(Path(model), adapter)
    files = {key: _absolute(getattr(config, key)) for key in ("keys", "audit", "tls_certificate", "tls_key")}
    config = replace(config, **files)  # type: ignore[arg-type]
    _refuse_unfit_certificate(config)
    if config.keys:
        keys.read(Path(config.keys))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # importing Ray Serve has set it to INFO
    place = str(adapter.resolve()) if adapter is not None else ""
    args = BuildArgs(model=str(Path(model).resolve()), adapter=place, name=name, config=config)
    root = _start_http(host, port, config)
    try:
        serve.run(_application(args, groups.selector(config.demand().group)), name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        stop(name)
        raise WorkFailed(f"{model}: the service did not start: {error}") from error
    base = root + route_prefix.rstrip("/")
    _wait_until_healthy(base)
    return base


def _absolute(place: str) -> str:
    """For processes that work elsewhere."""
    return str(Path(place).resolve()) if place else ""


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
        limits.end()
        with suppress(RayActorError):
            ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=_SHUTDOWN_S)
        serve.shutdown()


def _start_http(host: str, port: int, config: ServeConfig) -> str:
    running = serve.context._get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        options = running.http_config
        if port not in (0, options.port):
            raise UserError(
                f"port {port}: Ray Serve already runs on port {options.port} of this cluster; "
                "use that one or stop it first"
            )
        scheme = "https" if options.ssl_certfile else "http"
        return f"{scheme}://{_reachable(options.host or host)}:{options.port}"
    port = free_port(host, port)
    settings = front.environment(config) | {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(_PROXY_READY_S)}
    options = {"host": host, "port": port, "request_timeout_s": config.request_timeout_s + _PROXY_GRACE_S}
    if config.tls_certificate:
        options |= {"ssl_certfile": config.tls_certificate, "ssl_keyfile": config.tls_key}
    try:
        serve.start(
            http_options=options,
            logging_config={"log_level": "WARNING"},
            controller_options={"runtime_env": {"env_vars": settings}},  # what it starts inherits them
        )
    except TimeoutError as error:
        raise WorkFailed(f"{host}:{port}: Ray Serve's HTTP proxy did not come up ({error})") from error
    return f"{'https' if config.tls_certificate else 'http'}://{_reachable(host)}:{port}"


def _refuse_unfit_certificate(config: ServeConfig) -> None:
    if not config.tls_certificate:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.tls_certificate, config.tls_key)
    except OSError as error:  # ssl.SSLError is one
        raise UserError(
            f"serve.tls_certificate, tls_key: {config.tls_certificate} and {config.tls_key} are no pair ({error})"
        ) from error


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _wait_until_healthy(base: str) -> None:
    import httpx

    deadline = time.monotonic() + _HEALTHY_WITHIN_S
    # Whom the certificate names is for clients to check; this asks its own port.
    with httpx.Client(trust_env=False, timeout=5.0, verify=False) as http:
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
