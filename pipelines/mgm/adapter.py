"""An adapter directory: what PEFT saves and loads, of any of its methods, with the weights that were trained whole.

`PeftModel.from_pretrained(base, directory)` restores everything in it. The weights that were trained whole (projector,
uni-modules) also lie in a file of their own, by their plain names: all there is where PEFT trained nothing, and where
older versions kept them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError, WorkFailed
from pipelines.mgm.names import PROJECTOR

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NON_LORA = "non_lora_trainables.safetensors"
PEFT_PREFIX = "base_model.model."
"""Before the names of a model's tensors, in PEFT's files; its prompt methods leave the second part out."""
PROMPT = "prompt_embeddings"
"""What PEFT's files call a learned prefix: (virtual tokens, layers x key and value x width)."""
PROMPT_PREFIX = "base_model."
# PEFT's parameters bear the adapter's name ("default"), which its files leave out; the second kind is LoRA's there, the
# third a learned prefix.
_PEFT = re.compile(r"\.default(\.|$)|\.lora_\w+(\.|$)|^prompt_(encoder|embeddings)(\.|$)")
# Keys of the safetensors files' metadata, which every reader of safetensors passes over.
_TOWERS = "towers"
_BASE = "base"


def is_lora(name: str) -> bool:
    """Whether a trained tensor is PEFT's own: LoRA's, or that of another of its methods."""
    return _PEFT.search(name) is not None


def write_adapter(
    directory: Path, weights: dict[str, torch.Tensor], config: Any | None, *, base: str, towers: bool = False
) -> None:
    """Write trained tensors, named as in the model that PEFT has changed in place.

    Args:
        config: PEFT's own, of any method, whose `base_model_name_or_path` is the model's directory; None when PEFT
            trained nothing.
        base: `model_identity` of the model that was trained.
        towers: the directory says that tower weights in it are meant (the original's trainer can train them).

    Raises:
        WorkFailed: a tensor is empty (a ZeRO-3 shard that nobody gathered), not finite, or PEFT's are missing.
    """
    from safetensors.torch import save_file

    for name, tensor in weights.items():
        if tensor.numel() == 0:
            raise WorkFailed(
                f"{name} is empty ({tuple(tensor.shape)}): it was not gathered from its shards; nothing written"
            )
        if not tensor.isfinite().all():
            raise WorkFailed(f"{name} holds NaN or infinity; nothing written")
    peft = {_saved_name(name): tensor for name, tensor in weights.items() if is_lora(name)}
    whole = {name: tensor for name, tensor in weights.items() if not is_lora(name)}
    if bool(peft) != (config is not None):
        raise WorkFailed(f"{len(peft)} of PEFT's tensors were trained, but its configuration is {config and 'there'}")
    directory.mkdir(parents=True, exist_ok=True)
    about = {"format": "pt", _BASE: base} | ({_TOWERS: "trained"} if towers else {})
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, directory / NON_LORA, metadata=about)
    if config is None:
        return
    config = copy.copy(config)
    if config.peft_type == "ADALORA":
        config.rank_pattern, peft = _allocated(config.rank_pattern, peft)
    if config.is_prompt_learning:
        # These methods have no `modules_to_save`, but PEFT loads whatever the file names into the base model, too.
        peft |= {PROMPT_PREFIX + name: tensor for name, tensor in whole.items()}
    elif whole:
        modules = _modules(whole)
        config.modules_to_save = [*(config.modules_to_save or []), *modules]
        whole = _untrained(Path(config.base_model_name_or_path), modules) | whole
        peft |= {PEFT_PREFIX + name: tensor for name, tensor in whole.items()}
    save_file({name: tensor.contiguous() for name, tensor in peft.items()}, directory / WEIGHTS, metadata=about)
    config.save_pretrained(directory)


def _saved_name(name: str) -> str:
    """As PEFT names its own tensor in a file, without the adapter's name."""
    if name.startswith("prompt_"):
        return PROMPT
    plain = re.sub(r"\.default(?=\.|$)", "", name)
    return PEFT_PREFIX + plain.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def _allocated(
    pattern: dict[str, list[bool]] | None, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, list[bool]] | None, dict[str, torch.Tensor]]:
    """AdaLoRA's tensors as PEFT saves them: without the ranks that were taken away, nor their number at the start."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".ranknum")}
    if pattern is None:
        return None, tensors
    pattern = {name.removesuffix(".default"): kept for name, kept in pattern.items()}
    for name, kept in pattern.items():
        for part, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            key = f"{PEFT_PREFIX}{name.removesuffix('lora_E')}{part}"
            if tensors[key].shape[axis] == len(kept):
                tensors[key] = tensors[key][kept] if axis == 0 else tensors[key][:, kept]
    return pattern, tensors


def _modules(names: Iterable[str]) -> list[str]:
    """The modules that PEFT saves whole, by full path, so that each of the tensors is in one and none in another."""
    found = set()
    for name in names:
        units = [unit for unit in PROJECTOR if name.startswith(unit)]
        found.add(units[0].removesuffix(".") if units else name.rpartition(".")[0])
    return [module for module in sorted(found) if not any(module.startswith(f"{other}.") for other in found)]


def _untrained(model: Path, modules: list[str]) -> dict[str, torch.Tensor]:
    """All tensors of these modules as the base model has them: PEFT takes modules whole, or not at all."""
    from pipelines.mgm.configuration import MGMConfig
    from pipelines.mgm.skeleton import skeleton
    from pipelines.mgm.stored import Stored

    stored = Stored(model, skeleton(MGMConfig.from_pretrained(model)))
    return {name: stored[name] for name in stored if any(name.startswith(f"{module}.") for module in modules)}


def towers_trained(directory: Path) -> bool:
    """Whether the directory was written with `towers`: without that, tower weights in it are somebody's mistake."""
    return any(_TOWERS in _metadata(directory / name) for name in (WEIGHTS, NON_LORA))


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
