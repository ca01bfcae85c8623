"""What this machine has: CPUs, memory and cards, as Ray counts them when it starts here. Imports nothing heavy.

Cards are asked for through NVIDIA's own library, which comes with the driver; where there is none, there are none.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Card:
    """One GPU: its name and its memory in bytes."""

    name: str
    memory: int


def cpus() -> int:
    """CPUs that processes here may use: of a container with a quota, those of the quota."""
    found = os.cpu_count() or 1
    quota = _quota()
    return min(found, max(1, int(quota))) if quota is not None else found


def memory() -> int:
    """Bytes of memory: of a container with a limit, the limit."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups 2 and 1
        with suppress(OSError, ValueError):  # no such limit, or the word "max"
            return min(found, int((_CGROUP / name).read_text()))
    return found


def cards() -> tuple[Card, ...]:
    """GPUs that processes here may use (`CUDA_VISIBLE_DEVICES`)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _nvidia()[1]
    named = [word for word in visible.split(",") if word.strip() and word != "NoDevFiles"]
    return _nvidia()[1][: len(named)]


def driver() -> str:
    """Version of NVIDIA's driver; empty where there is none."""
    return _nvidia()[0]


def _quota() -> float | None:
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


@cache
def _nvidia() -> tuple[str, tuple[Card, ...]]:
    """The driver's version, and its cards."""
    with suppress(OSError), _library() as nvml:
        count, version = ctypes.c_uint(), ctypes.create_string_buffer(96)
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) or nvml.nvmlSystemGetDriverVersion(version, 96):
            return "", ()
        return version.value.decode(), tuple(_card(nvml, number) for number in range(count.value))
    return "", ()


@contextmanager
def _library() -> Iterator[ctypes.CDLL]:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    if nvml.nvmlInit_v2():
        raise OSError("NVIDIA's driver does not answer")
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _card(nvml: ctypes.CDLL, number: int) -> Card:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    sizes = (ctypes.c_ulonglong * 3)()  # total, free and used bytes
    for failed in (
        nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)),
        nvml.nvmlDeviceGetName(handle, name, 96),
        nvml.nvmlDeviceGetMemoryInfo(handle, sizes),
    ):
        if failed:
            raise OSError(f"card {number} does not answer ({failed})")
    return Card(name.value.decode(), sizes[0])
