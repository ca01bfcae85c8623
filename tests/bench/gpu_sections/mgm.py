"""MGM-2B's geometry with random weights, for the sections that train it and ask it."""

from __future__ import annotations

from typing import Any

import bench_mgm_gpu
import torch

from pipelines.mgm import register
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.modeling import MGMForConditionalGeneration

from .run import Run


def geometry(run: Run, **changes: Any) -> MGMConfig:
    """The defaults are MGM-2B's; tiny ones where the run is."""
    register()
    return MGMConfig(**{**(bench_mgm_gpu.TINY if run.tiny else {}), **changes})


def random_model(run: Run, config: MGMConfig) -> Any:
    """Frozen, on the device, in its dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(run.dtype)
    with run.device:
        model = MGMForConditionalGeneration(config)
    torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)
