"""The `serve` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.demand import Demand
from pipelines.errors import UserError


@dataclass
class ServeConfig:
    """How a merged model answers over HTTP.

    Attributes:
        replicas: model replicas.
        cpus_per_replica: CPUs that Ray reserves for a replica; also its torch threads.
        gpus_per_replica: GPUs that Ray reserves for a replica; 0 runs on the CPU.
        max_batch_size: questions answered in one call of the model.
        batch_wait_s: longest time the first question of a batch waits for others, in seconds.
        max_new_tokens: longest answer; `max_tokens` of a request above it means this.
        max_queued_requests: wait at each replica beside the two batches in hand; more get 429 with Retry-After.
        request_timeout_s: a request that takes longer gets 408, its body's way here not counted.
        max_body_bytes: larger requests are refused with 413.
        body_timeout_s: a body that takes longer to get here is refused with 408.
        max_image_pixels: larger pictures are refused with 400.
        max_image_bytes: larger files are refused with 413.
        max_images: pictures in one request; more are refused with 400.
        max_request_pixels: of all pictures of a request together; more are refused with 400.
        dtype: auto, float32, bfloat16 or float16.
        keys: file of API keys (python -m serve.keys makes it); empty: anybody may ask.
        audit: folder for a line about each request; empty: none.
        audit_contents: write down messages and answers, too.
        tls_certificate, tls_key: files (PEM) to answer over https with; empty: http, for behind a gateway.
    """

    replicas: int = 1
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    max_batch_size: int = 16
    batch_wait_s: float = 0.02
    max_new_tokens: int = 128
    max_queued_requests: int = 512
    request_timeout_s: float = 60.0
    max_body_bytes: int = 64_000_000
    body_timeout_s: float = 60.0
    max_image_pixels: int = 50_000_000
    max_image_bytes: int = 20_000_000
    max_images: int = 16
    max_request_pixels: int = 200_000_000
    dtype: str = "auto"
    keys: str = ""
    audit: str = ""
    audit_contents: bool = False
    tls_certificate: str = ""
    tls_key: str = ""

    def __post_init__(self) -> None:
        counts = ("replicas", "max_batch_size", "max_new_tokens", "max_queued_requests")
        sizes = ("max_body_bytes", "max_image_pixels", "max_image_bytes", "max_images", "max_request_pixels")
        for key in (*counts, *sizes):
            if getattr(self, key) < 1:
                raise UserError(f"serve.{key} must be at least 1, not {getattr(self, key)}")
        if self.cpus_per_replica < 0 or self.gpus_per_replica < 0:
            raise UserError("serve: cpus_per_replica and gpus_per_replica cannot be negative")
        if self.request_timeout_s <= 0 or self.body_timeout_s <= 0 or self.batch_wait_s < 0:
            raise UserError("serve: request_timeout_s and body_timeout_s must be positive, batch_wait_s not negative")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise UserError("serve: tls_certificate and tls_key are one thing's two halves; set both or none")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UserError(f"serve.dtype must be auto, float32, bfloat16 or float16, not '{self.dtype}'")

    def private(self) -> ServeConfig:
        """The same without keys, audit log and TLS: of a service that a command starts for itself alone."""
        return replace(self, keys="", audit="", tls_certificate="", tls_key="")

    def demand(self) -> Demand:
        """All replicas: the service is up when every one of them is."""
        keys = ("replicas", "cpus_per_replica", "gpus_per_replica")
        return Demand("serve", "replica", self.replicas, self.cpus_per_replica, self.gpus_per_replica, keys)
