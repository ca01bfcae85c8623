"""The benchmarks by name."""

from __future__ import annotations

from typing import Any

from pipelines.errors import UserError
from pipelines.evaluate import mmbench, pope, textcaps, textvqa, vqav2
from pipelines.evaluate.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "textvqa": textvqa,
    "vqav2": vqav2,
    "mmbench": mmbench,
    "pope": pope,
    "textcaps": textcaps,
}


def open_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        UserError: there is none.
    """
    if name not in BENCHMARKS:
        raise UserError(f"evaluate.benchmark: there is no benchmark '{name}'; choose one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def asked(found: dict[str, Any]) -> str:
    """What was asked, as a sentence about an evaluation or a comparison needs it: the sample world's questions are in a
    benchmark's layout, and are not the benchmark's.
    """
    name = title(str(found.get("benchmark")))
    return f"drawn questions in {name}'s layout" if found.get("drawn") else f"{name} questions"


def title(name: str) -> str:
    """A benchmark's name as its authors write it; the name itself when captune does not know it."""
    return BENCHMARKS[name].TITLE if name in BENCHMARKS else name
