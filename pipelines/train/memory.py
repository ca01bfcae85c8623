"""What training takes of a device's memory, and of the host's."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 1 << 30


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: on a card what tensors took since the phase began, on a CPU the resident set of the process
    since it started.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parameter_count(parameter: torch.Tensor) -> int:
    """Its numbers, also where ZeRO-3 keeps only a shard of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
