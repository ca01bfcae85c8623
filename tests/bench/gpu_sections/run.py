"""What all sections share: notes, clocks, memory, and the kernels of a piece of work by class."""

from __future__ import annotations

import gc
import json
import re
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_CLASSES = (
    ("attention", r"flash|fmha|attention|sdpa|_attend"),
    ("convolution", r"conv|wgrad|dgrad|fprop|winograd"),
    ("product", r"gemm|gemv|nvjet|cutlass|cublas|splitk|\bmm\b|addmm|triton_tem"),
    ("softmax, loss", r"softmax|nll_loss|cross_entropy|logsumexp"),
    ("norm", r"layer_?norm|rms_?norm|rsqrt|GammaBeta|_add_norm"),
    ("quantize", r"_quantize"),
    ("optimizer", r"multi_tensor|adam|lpnorm"),
    ("copy", r"memcpy|memset|copy|catarray|index|gather|scatter|transpose|nchw|nhwc|\bcat\b|fill|_store_prefix"),
    ("reduction", r"reduce|argmax|cumsum|scan|sort"),
    ("elementwise", r"elementwise|triton_poi|dropout|gelu|upsample|relu"),
)


class Run:
    """One run of the command: where figures go, and how much time is left.

    Args:
        out: directory; `gpu.jsonl` gets a line for each figure as soon as it is known, `kernels.txt` the tables.
        budget: seconds.
        tiny: toy models on the CPU.
    """

    def __init__(self, out: Path, budget: float, tiny: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.tiny, self.device = tiny, torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.peak_flops = 1e12  # until it is measured
        self._start, self._budget = time.monotonic(), budget
        self._lines, self._tables = (out / "gpu.jsonl").open("a"), (out / "kernels.txt").open("a")

    def left(self) -> float:
        """Seconds of the budget."""
        return self._budget - (time.monotonic() - self._start)

    def note(self, what: str, **facts: Any) -> None:
        """A line."""
        line = json.dumps({"t": round(time.monotonic() - self._start, 1), "what": what, **_short(facts)})
        print(line, file=self._lines, flush=True)
        print(line, flush=True)

    def section(self, name: str, need: float, work: Callable[[Run], None]) -> None:
        """Do it; what fails, and what has less than `need` seconds left, is a line, too."""
        if not self.tiny and self.left() < need:
            self.note(name, skipped=f"{self.left():.0f} s left, {need:.0f} wanted")
            return
        try:
            work(self)
        except Exception as error:
            where = traceback.format_exc()[-1200:]
            self.note(name, failed=f"{type(error).__name__}: {str(error)[:400]}", trace=where)
        self.clean()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one run, the device's work included."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def median(self, work: Callable[[], object], rounds: int = 5, warm: int = 2) -> float:
        """Seconds, the median of so many runs."""
        for _ in range(1 if self.tiny else warm):
            work()
        rounds = 1 if self.tiny else rounds
        return sorted(self.seconds(work) for _ in range(rounds))[rounds // 2]

    def wait(self) -> None:
        """For what was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Free what nobody holds, and forget the peak of memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Most memory allocated since `clean`."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None

    def kernels(self, name: str, work: Callable[[], object], repeats: int = 1) -> None:
        """Where `repeats` of the work spend their time: a line by class of kernel, and a table of the largest."""
        wall = self.median(work, 3, 1) / repeats
        activity = ProfilerActivity.CPU if self.tiny else ProfilerActivity.CUDA
        with profile(activities=[activity], acc_events=True) as profiler:
            work()
            self.wait()
        events = _device_events(profiler, cuda=not self.tiny)
        busy = _union(events) / repeats
        classes: dict[str, float] = defaultdict(float)
        largest: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        for kernel, _, microseconds in events:
            classes[_class(kernel)] += microseconds / repeats / 1e3
            largest[kernel][0] += microseconds / repeats / 1e3
            largest[kernel][1] += 1 / repeats
        ordered = dict(sorted(classes.items(), key=lambda item: -item[1]))
        idle = 1 - busy / 1e3 / (1e3 * wall)
        self.note(name, wall_ms=1e3 * wall, busy_ms=busy / 1e3, idle=idle, launches=len(events) / repeats, ms=ordered)
        print(f"\n{name}: {1e3 * wall:.3f} ms, {len(events) / repeats:.0f} kernels", file=self._tables)
        for kernel, (ms, count) in sorted(largest.items(), key=lambda item: -item[1][0])[:20]:
            print(f"{ms:10.4f} ms {count:8.1f} x  {_class(kernel):13} {_brief(kernel)}", file=self._tables)
        self._tables.flush()


def agreement(got: Tensor, wanted: Tensor) -> dict[str, float]:
    """Relative distance of all, and the least cosine of a row."""
    a, b = got.float().flatten(1), wanted.float().flatten(1)
    apart = float((a - b).norm() / b.norm())
    return {"apart": apart, "least_cosine": float(F.cosine_similarity(a, b, dim=1).min())}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return {key: _short(each) for key, each in value.items()} if isinstance(value, dict) else value


def _device_events(profiler: Any, cuda: bool) -> list[tuple[str, float, float]]:
    """(name, start, microseconds) of what ran on the device; of operators on a CPU."""
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    found = []
    for event in profiler.profiler.kineto_results.events():
        ours = event.device_type() == wanted and event.duration_ns() > 0
        if ours and not re.match(r"## |Optimizer\.|ProfilerStep|Context Sync|Stream |Event |cuda", event.name()):
            found.append((event.name(), event.start_ns() / 1e3, event.duration_ns() / 1e3))
    return found


def _union(events: list[tuple[str, float, float]]) -> float:
    """Microseconds in which anything ran."""
    busy = end = 0.0
    for _, start, length in sorted(events, key=lambda event: event[1]):
        busy += max(0.0, start + length - max(end, start))
        end = max(end, start + length)
    return busy


def _class(kernel: str) -> str:
    return next((name for name, pattern in _CLASSES if re.search(pattern, kernel, re.IGNORECASE)), "other")


def _brief(kernel: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"at::native::|\(anonymous namespace\)::|void ", "", kernel))[:110]
