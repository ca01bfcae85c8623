"""The `evaluate` and `compare` sections of a recipe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.errors import UserError

OF_A_BENCHMARK = {
    "annotations": str,
    "images": str,
    "ocr": str,
    "ocr_tokens": bool,
    "max_new_tokens": int,
    "limit": int,
}
"""Keys of `evaluate` that each further benchmark has for itself, and what they hold."""


@dataclass
class EvaluateConfig:
    """How a served model is asked the questions of a benchmark.

    Attributes:
        benchmark: its name, one of those that `captune evaluate --help` lists; or several with commas, of which the
            first gives the verdict and the others have their files in `also`.
        annotations: the benchmark's own annotation file; of VQAv2 the questions, whose answers lie beside them under
            their published name; of POPE a file of questions, or a folder of several.
        images: directory of its pictures; MMBench's lie in its annotation file.
        ocr_tokens: put the reference OCR tokens into the prompt, as the published TextVQA scores do (about 13 points
            there).
        ocr: file of OCR tokens (for TextVQA, TextVQA_Rosetta_OCR_v0.2_*.json), when the annotations hold none.
        model: name of the model at the endpoint; empty takes the only one there.
        concurrency: requests in flight.
        max_new_tokens: longest answer, in tokens.
        request_timeout_s: one request, from its first byte to the answer's last, in seconds.
        retries: further attempts after a refusal (429, 5xx), a timeout or a broken connection, with growing pauses.
        max_error_share: largest share of questions that may stay without an answer; with more the evaluation has
            failed, and the same command asks them again.
        limit: only the first questions; None asks all.
        also: further benchmarks, which the same service is asked: name -> `annotations`, `images` and what else is
            their own (`ocr`, `ocr_tokens`, `max_new_tokens`, `limit`).
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
    max_error_share: float = 0.01
    limit: int | None = None
    also: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.benchmark, *further = [name for each in self.benchmark.split(",") if (name := each.strip())] or [""]
        self.also = {**self.also, **{name: self.also.get(name) or {} for name in further}}
        for name, own in self.also.items():
            self._check_further(name, own)
        for key in ("concurrency", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"evaluate.{key} must be at least 1, not {getattr(self, key)}")
        if self.retries < 0 or self.request_timeout_s <= 0:
            raise UserError("evaluate: retries cannot be negative and request_timeout_s must be positive")
        if not 0 <= self.max_error_share <= 1:
            raise UserError(f"evaluate.max_error_share is a share between 0 and 1, not {self.max_error_share:g}")
        if self.limit is not None and self.limit < 1:
            raise UserError("evaluate.limit must be at least 1")

    def each(self) -> dict[str, EvaluateConfig]:
        """Benchmark -> how it is asked; the one that gives the verdict first."""
        bare = replace(self, also={})
        files: dict[str, Any] = {"annotations": "", "images": "", "ocr": "", "ocr_tokens": False}
        further = {name: replace(bare, benchmark=name, **(files | own)) for name, own in self.also.items()}
        return {self.benchmark: bare} | further

    def key(self, benchmark: str) -> str:
        """Where a recipe says what is one benchmark's own."""
        return "evaluate" if benchmark == self.benchmark else f"evaluate.also.{benchmark}"

    def _check_further(self, name: str, own: Any) -> None:
        key = f"evaluate.also.{name}"
        if name == self.benchmark:
            raise UserError(f"{key}: is evaluate.benchmark already")
        if not isinstance(own, dict):
            raise UserError(f"{key}: '{own}' is no section; its annotations and images stand below it")
        for each, value in own.items():
            if each not in OF_A_BENCHMARK:
                raise UserError(f"{key}.{each}: a further benchmark's own keys are {', '.join(OF_A_BENCHMARK)}")
            if type(value) is not OF_A_BENCHMARK[each]:
                raise UserError(f"{key}.{each}: '{value}' is not what evaluate.{each} holds")


@dataclass
class CompareConfig:
    """How two evaluations are held against each other.

    Attributes:
        baseline: name of the arm that others are compared with; empty takes `original` where there is one, else the
            first.
        resamples: of the paired bootstrap over pictures, and of the permutation test.
        confidence: of the interval; a difference is shown when the permutation test agrees at the same level, for all
            arms together (Holm).
        margin: on the score's scale of 0 to 1; arms whose interval lies within it on both sides of zero are as good as
            equal.
        pilot: run directory, or `comparison.json`, of an earlier run that says how much scores differ by chance; a dry
            run foresees from it what this one can show, else from stated assumptions.
        overlap: what `captune overlap` wrote: the result is also given without the questions whose picture is trained
            on.
        seed: of the bootstrap.
        examples: questions won and lost that the report shows, of each kind.
    """

    baseline: str = ""
    resamples: int = 10_000
    confidence: float = 0.95
    margin: float = 0.01
    pilot: str = ""
    overlap: str = ""
    seed: int = 0
    examples: int = 24

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise UserError("compare.resamples must be at least 100")
        if not 0.5 <= self.confidence < 1:
            raise UserError("compare.confidence lies between 0.5 and 1")
        if not 0 < self.margin < 1:
            raise UserError(f"compare.margin is a part of the score's scale, between 0 and 1, not {self.margin:g}")

    def baseline_among(self, arms: Collection[str]) -> str:
        """The arm that the others are compared with.

        Raises:
            UserError: the configured one is not among `arms`.
        """
        if self.baseline and self.baseline not in arms:
            raise UserError(f"compare.baseline names '{self.baseline}', but the arms are {', '.join(arms)}")
        return self.baseline or ("original" if "original" in arms else next(iter(arms)))
