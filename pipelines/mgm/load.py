"""An MGM directory as a model: complete or refused, whoever loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.convert_config import expected_shapes
from pipelines.mgm.directory import check_model_directory
from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.names import HEAD, is_buffer
from pipelines.mgm.processing import MGMProcessor
from pipelines.mgm.skeleton import skeleton
from pipelines.modelfiles import (
    ADAPTER,
    CONFIG,
    Differences,
    Shapes,
    compare_shapes,
    load_complete,
    read_object,
    tensor_shapes,
)


def load_model(
    path: Path | str, dtype: str = "auto", device: torch.device | str = "cpu", **options: Any
) -> MGMForConditionalGeneration:
    """The model of a directory, frozen and in evaluation mode; with the adapter that it carries, a `PeftModel`.

    Args:
        dtype: auto (as the weights are stored), float32, bfloat16 or float16.
        options: of `from_pretrained`, e.g. `quantization_config`.

    Raises:
        UserError: the directory is no complete MGM, or cannot be read.
    """
    path = Path(path)
    check_tensors(path)
    quantized = "quantization_config" in options or is_quantized(path)
    if quantized:  # bitsandbytes packs the weights of a module where the module is
        options["device_map"] = {"": device}
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model: Any = load_complete(MGMForConditionalGeneration, path, dtype=wanted, **options)
    if (path / ADAPTER).is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(path / ADAPTER))
    frozen: MGMForConditionalGeneration = model.requires_grad_(False).eval()
    return frozen if quantized else frozen.to(device)  # type: ignore[arg-type]


def check_tensors(path: Path | str) -> None:
    """Refuse a directory whose files lack a tensor of the configured model, have one too many, or of another shape.

    Headers and a model without weights: below a second for any size.

    Raises:
        UserError: as above, or no MGM directory at all (`check_model_directory`).
    """
    path = Path(path)
    config, found = load_config(path), tensor_shapes(path)
    # Packed tensors have names and shapes of their own, pickled ones have no header: loading them tells.
    if found is not None and not is_quantized(path) and (bad := differences(config, found)):
        raise UserError(f"{path}: weights and configuration disagree; {bad.told()}")


def differences(config: MGMConfig, found: Shapes) -> Differences:
    """Hold the tensors of a directory's files against its configuration; what follows from others may be there."""
    tied = {HEAD} if config.tie_word_embeddings else set()
    own = {name: shape for name, shape in found.items() if name not in tied and not is_buffer(name)}
    return compare_shapes(expected_shapes(config), own)


def load_config(path: Path | str) -> MGMConfig:
    """The configuration of a complete MGM directory.

    Raises:
        UserError: the directory is not complete (`check_model_directory`), or its configuration is impossible.
    """
    check_model_directory(path)
    try:
        config: MGMConfig = MGMConfig.from_pretrained(path)
    except (ValueError, OSError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: not the configuration of an MGM ({_first_line(error)})") from error
    return config


def load_skeleton(path: Path | str) -> MGMForConditionalGeneration:
    """The model without memory for its weights: names, shapes and modules only. Raises as `load_config`."""
    return skeleton(load_config(path))


def load_processor(path: Path | str) -> MGMProcessor:
    """The processor of a complete MGM directory, which can put a conversation into words.

    Raises:
        UserError: the directory is not complete, its tokenizer or processor cannot be read, or it has no chat template.
    """
    check_model_directory(path)
    try:
        processor: MGMProcessor = MGMProcessor.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare exceptions
        raise UserError(f"{path}: its processor cannot be loaded ({_first_line(error)})") from error
    if not processor.chat_template:
        raise UserError(f"{path}: its processor has no chat template (chat_template.jinja)")
    return processor


def quiet() -> None:
    """Keep the libraries' progress bars and deprecation notices about each other out of the person's log."""
    import logging as std_logging
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    # DeepSpeed calls torch by names that torch will drop, hundreds of times a step
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # Where bitsandbytes is installed, PEFT imports it and it asks for a kernel that only quantized models on a CPU
    # would use.
    std_logging.getLogger("bitsandbytes").setLevel(std_logging.ERROR)


def is_quantized(path: Path) -> bool:
    """Whether the directory's weights are stored quantized."""
    return "quantization_config" in read_object(path / CONFIG)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
