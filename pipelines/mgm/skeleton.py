"""An MGM without memory for its weights: names, shapes and modules, made from a configuration alone."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.modeling import MGMForConditionalGeneration


def skeleton(
    config: MGMConfig, *, buffers: bool = False, dtype: torch.dtype | None = None
) -> MGMForConditionalGeneration:
    """The model on the device `meta`. With buffers or a dtype it is nothing for two threads at once: both change what
    all of the process sees meanwhile.

    Args:
        buffers: are there all the same, so that the model can be called once its parameters are.
        dtype: of parameters that the configuration gives none; None: torch's default.
    """
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
