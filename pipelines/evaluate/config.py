"""The `evaluate` and `compare` sections of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.errors import UserError


@dataclass
class EvaluateConfig:
    """How a served model is asked the questions of a benchmark.

    Attributes:
        benchmark: textvqa.
        annotations: the benchmark's own annotation file.
        images: directory of its pictures.
        ocr_tokens: put the reference OCR tokens into the prompt, as the published TextVQA scores do (about 13 points
            there).
        ocr: TextVQA_Rosetta_OCR_v0.2_*.json, when the annotations themselves hold no OCR tokens.
        model: name of the model at the endpoint; empty takes the only one there.
        concurrency: requests in flight.
        max_new_tokens: longest answer, in tokens.
        request_timeout_s: one request, in seconds.
        retries: further attempts after a refusal (429, 5xx), a timeout or a broken connection, with growing pauses.
        limit: only the first questions; None asks all.
    """

    benchmark: str = "textvqa"
    annotations: str = ""
    images: str = ""
    ocr_tokens: bool = False
    ocr: str = ""
    model: str = ""
    concurrency: int = 32
    max_new_tokens: int = 16
    request_timeout_s: float = 120.0
    retries: int = 5
    limit: int | None = None

    def __post_init__(self) -> None:
        for key in ("concurrency", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"evaluate.{key} must be at least 1, not {getattr(self, key)}")
        if self.retries < 0 or self.request_timeout_s <= 0:
            raise UserError("evaluate: retries cannot be negative and request_timeout_s must be positive")
        if self.limit is not None and self.limit < 1:
            raise UserError("evaluate.limit must be at least 1")


@dataclass
class CompareConfig:
    """How two evaluations are held against each other.

    Attributes:
        baseline: name of the arm that others are compared with.
        resamples: of the paired bootstrap.
        confidence: of the interval.
        seed: of the bootstrap.
        examples: questions won and lost that the report shows, of each kind.
    """

    baseline: str = "original"
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    examples: int = 24

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise UserError("compare.resamples must be at least 100")
        if not 0.5 <= self.confidence < 1:
            raise UserError("compare.confidence lies between 0.5 and 1")
