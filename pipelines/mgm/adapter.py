"""An adapter directory: PEFT's two files for LoRA, and beside them the weights that were trained without LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError, WorkFailed

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NON_LORA = "non_lora_trainables.safetensors"
_PEFT_PREFIX = "base_model.model."
# Keys of the safetensors files' metadata, which every reader of safetensors passes over.
_TOWERS = "towers"
_BASE = "base"


def is_lora(name: str) -> bool:
    """Whether a trained tensor belongs to LoRA."""
    return ".lora_" in name


def write_adapter(
    directory: Path, weights: dict[str, torch.Tensor], lora_config: Any | None, *, base: str, towers: bool = False
) -> None:
    """Write trained tensors, named as in the base model.

    Args:
        lora_config: PEFT's `LoraConfig`; None when only non-LoRA weights were trained (no PEFT files then).
        base: `model_identity` of the model that was trained.
        towers: the directory says that tower weights in it are meant (the original's trainer can train them).

    Raises:
        WorkFailed: a tensor is empty (a ZeRO-3 shard that nobody gathered), not finite, or LoRA is missing.
    """
    from safetensors.torch import save_file

    for name, tensor in weights.items():
        if tensor.numel() == 0:
            raise WorkFailed(
                f"{name} is empty ({tuple(tensor.shape)}): it was not gathered from its shards; nothing written"
            )
        if not tensor.isfinite().all():
            raise WorkFailed(f"{name} holds NaN or infinity; nothing written")
    lora = {_PEFT_PREFIX + n.replace(".default.", "."): t.contiguous() for n, t in weights.items() if is_lora(n)}
    other = {name: tensor.contiguous() for name, tensor in weights.items() if not is_lora(name)}
    if bool(lora) != (lora_config is not None):
        raise WorkFailed(
            f"{len(lora)} LoRA tensors were trained, but a LoRA configuration is {lora_config and 'there'}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    if lora_config is not None:
        save_file(lora, directory / WEIGHTS, metadata={"format": "pt", _BASE: base})
        lora_config.save_pretrained(directory)
    about = {"format": "pt", _BASE: base} | ({_TOWERS: "trained"} if towers else {})
    save_file(other, directory / NON_LORA, metadata=about)


def towers_trained(directory: Path) -> bool:
    """Whether the directory was written with `towers`: without that, tower weights in it are somebody's mistake."""
    return _TOWERS in _metadata(directory / NON_LORA)


def trained_on(directory: Path) -> str | None:
    """`model_identity` of the model that the adapter was trained on; None when its files do not say.

    Raises:
        UserError: its files come from the training of two different models.
    """
    named = {_metadata(directory / name).get(_BASE) for name in (WEIGHTS, NON_LORA)} - {None}
    if len(named) > 1:
        raise UserError(f"{directory}: {WEIGHTS} and {NON_LORA} were trained on two different models")
    return next(iter(named), None)


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return {}
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error


def has_lora(directory: Path) -> bool:
    """Whether the directory holds a PEFT adapter (training may have stopped after the projector).

    Raises:
        UserError: no adapter directory at all, or half of one.
    """
    found = [name for name in (CONFIG, WEIGHTS, NON_LORA) if (directory / name).exists()]
    if not found:
        raise UserError(f"{directory}: not an adapter directory (neither {CONFIG} nor {NON_LORA})")
    if (CONFIG in found) != (WEIGHTS in found):
        raise UserError(f"{directory}: half an adapter: of {CONFIG} and {WEIGHTS} only one is there")
    return CONFIG in found


def read_non_lora(directory: Path) -> dict[str, torch.Tensor]:
    """Weights trained without LoRA, named as in the base model; empty when there are none."""
    from pipelines.mgm.tensorfiles import read_file

    path = directory / NON_LORA
    return read_file(path) if path.exists() else {}
