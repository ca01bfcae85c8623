"""An MGM directory as a model, complete or refused; its skeleton without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.mgm.modeling import MGMForConditionalGeneration


def load_base(path: Path | str, precision: str) -> MGMForConditionalGeneration:
    """The base model, frozen, in its own dtype (float32 when that is the training precision).

    Raises:
        UserError: no MGM there, or its weights are incomplete.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise UserError(f"{path}: not a model directory (it has no config.json)")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path}: a model directory without weights (no *.safetensors)")
    dtype = torch.float32 if precision == "float32" else "auto"
    try:
        loaded: Any = MGMForConditionalGeneration.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be loaded as an MGM ({error})") from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise UserError(f"{path}: {len(names)} tensors are missing or of another shape, e.g. {names[0]}")
    frozen: MGMForConditionalGeneration = model.requires_grad_(False).eval()
    return frozen


def quiet() -> None:
    """Keep the libraries' progress bars and deprecation notices about each other out of the person's log."""
    import logging as std_logging
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    # Where bitsandbytes is installed, PEFT imports it and it asks for a kernel that only quantized models on a CPU
    # would use.
    std_logging.getLogger("bitsandbytes").setLevel(std_logging.ERROR)


def load_skeleton(model: Path) -> Any:
    """The model without memory for its weights: names, shapes and modules only."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            return MGMForConditionalGeneration(config)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise UserError(f"{model}: not the configuration of an MGM ({error})") from error


def load_processor(path: Path | str) -> Any:
    """The processor of a model directory."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(path)
