"""The benchmarks by name."""

from __future__ import annotations

from types import ModuleType

from pipelines.errors import UserError

BENCHMARKS = ("textvqa",)


def open_benchmark(name: str) -> ModuleType:
    """The module of a benchmark: `load`, `image_path`, `read_predictions`, `write_predictions`, `score_question`."""
    if name == "textvqa":
        from pipelines.evaluate import textvqa

        return textvqa
    raise UserError(f"evaluate.benchmark: there is no benchmark '{name}'; choose one of {', '.join(BENCHMARKS)}")
