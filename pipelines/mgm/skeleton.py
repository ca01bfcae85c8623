"""An MGM without memory for its weights: names, shapes and modules, made from a configuration alone."""

from __future__ import annotations

import threading
from typing import Any

import torch

from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.modeling import MGMForConditionalGeneration

BUILDING = threading.RLock()
"""Held while a model is built, and by whoever computes with one in a process where others may be built: meanwhile
transformers changes torch's default dtype, and accelerate how modules take their parameters, for all threads.
"""


def skeleton(
    config: MGMConfig, *, buffers: bool = False, dtype: torch.dtype | None = None
) -> MGMForConditionalGeneration:
    """The model on the device `meta`.

    Args:
        buffers: are there all the same, so that the model can be called once its parameters are.
        dtype: of parameters that the configuration gives none; None: torch's default.
    """
    with BUILDING:
        if buffers:
            from accelerate import init_empty_weights

            place: Any = init_empty_weights(include_buffers=False)
        else:
            place = torch.device("meta")
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or before)
        try:
            with place:
                return MGMForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
