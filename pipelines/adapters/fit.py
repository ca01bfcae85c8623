"""An adapter held against a model: what it changes there, and everything that speaks against merging it.

`captune check` tells the faults, `captune merge` refuses an adapter that has any: one look decides for both. The model
is a skeleton, so none of its weights are read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.errors import UserError
from pipelines.manifest import require_finished
from pipelines.mgm.adapter import (
    CONFIG,
    NON_LORA,
    PEFT_PREFIX,
    PROMPT,
    PROMPT_PREFIX,
    WEIGHTS,
    has_lora,
    towers_trained,
)
from pipelines.mgm.names import EMBEDDING, HEAD, TOWERS
from pipelines.mgm.tensorfiles import read_file

CHECKS = {
    "method": "can be merged",
    "empty tensors": "none is Size([0])",
    "finite": "no NaN, no infinity",
    "targets": "none in a tower",
    "shapes": "as the model's",
    "trained whole": "tensors of the model",
    "effect": "every module learned something",
}
"""Name of a check -> what it says when nothing is wrong."""
_TOKENS = ".token_adapter."


@dataclass
class Fit:
    """What an adapter is made of, by names of the model's modules and parameters.

    Attributes:
        config: PEFT's, None where PEFT trained nothing.
        modules: module -> PEFT's tensors of it, by their names inside of it.
        whole: parameter -> its new values.
        rows: parameter -> numbers of some of its rows, and their new values.
        towers: whether tower weights in it are meant.
        faults: check -> what is wrong, for the checks that found anything.
    """

    config: Any
    modules: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], torch.Tensor]] = field(default_factory=dict)
    towers: bool = False
    faults: dict[str, list[str]] = field(default_factory=dict)

    def fault(self, check: str, text: str) -> None:
        """Note one thing that is wrong."""
        self.faults.setdefault(check, []).append(text)

    def layer(self, module: str, base: nn.Module) -> Any:
        """PEFT's layer around `base`, which has its weights, with the adapter's tensors in it.

        PEFT makes it as it would inside the model, where patterns match full names and where some methods begin by
        changing the base's weights (PiSSA, OLoRA).
        """
        from peft import PeftModel, set_peft_model_state_dict

        holder = _holder(module, base)
        tuned = PeftModel(holder, self._config_of(module))
        tensors = {f"{PEFT_PREFIX}{module}.{part}": tensor for part, tensor in self.modules[module].items()}
        set_peft_model_state_dict(tuned, tensors)
        return holder.get_submodule(module).eval()

    def _config_of(self, module: str) -> Any:
        config = copy.copy(self.config)
        config.task_type = None
        config.target_modules, config.base_model_name_or_path = {module}, None
        for key in ("modules_to_save", "exclude_modules", "layers_to_transform", "trainable_token_indices"):
            if hasattr(config, key):
                setattr(config, key, None)
        if config.peft_type == "ADALORA" and config.rank_pattern:
            config.rank_pattern = {
                name: kept for name, kept in config.rank_pattern.items() if name.startswith(f"{module}.")
            }
        return config


def look(adapter: Path, skeleton: nn.Module) -> Fit:
    """Hold an adapter directory against a model without weights (`load_skeleton`), which PEFT changes.

    Raises:
        UserError: no adapter directory, or files that are missing, damaged, unfinished or not of one training.
    """
    require_finished(adapter)
    fit = Fit(_read_config(adapter) if has_lora(adapter) else None, towers=towers_trained(adapter))
    saved = read_file(adapter / WEIGHTS) if fit.config is not None else {}
    plain = read_file(adapter / NON_LORA) if (adapter / NON_LORA).exists() else {}
    for name, tensor in sorted((saved | plain).items()):
        if tensor.numel() == 0:
            fit.fault("empty tensors", f"{name} {tensor.shape}")
        elif not tensor.isfinite().all():
            fit.fault("finite", name)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    tied = bool(getattr(skeleton.config, "tie_word_embeddings", False))
    if fit.config is not None:
        if fit.config.is_prompt_learning:
            _look_at_prompt(fit, saved, skeleton)
        else:
            _look_at_peft(fit, saved, skeleton, tied)
    _take_plain(adapter, fit, plain)
    _look_at_whole(fit, shapes)
    return fit


def told(faults: dict[str, list[str]], shown: int = 3) -> str:
    """Faults in words, the first few of them."""
    texts = [f"{check}: {text}" for check, found in faults.items() for text in found]
    return "; ".join(texts[:shown]) + (f" (and {len(texts) - shown} more)" if len(texts) > shown else "")


def _read_config(adapter: Path) -> Any:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{adapter / CONFIG}: not a configuration of PEFT's ({error})") from error


def _look_at_peft(fit: Fit, saved: dict[str, torch.Tensor], skeleton: nn.Module, tied: bool) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    bases = dict(skeleton.named_modules())
    neutral = copy.copy(fit.config)
    neutral.task_type = neutral.base_model_name_or_path = None
    if hasattr(neutral, "init_lora_weights"):
        neutral.init_lora_weights = True  # how it began needs the base's weights, and changes no shape
    if neutral.peft_type == "ADALORA":
        neutral.rank_pattern = None
    try:
        tuned = PeftModel(skeleton, neutral, low_cpu_mem_usage=True)
        wanted = get_peft_model_state_dict(tuned)
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, KeyError) as error:
        fit.fault("targets", f"PEFT cannot put it onto this model ({error})")
        return
    layers = dict(_layers(tuned))
    _sort(fit, saved, layers, tuned)
    _look_at_names(fit, set(wanted), set(saved))
    _look_at_shapes(fit, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, saved)
    if tied:
        own = {EMBEDDING, HEAD} & ({f"{module}.weight" for module in fit.modules} | fit.whole.keys())
        for name in sorted(own):
            fit.fault("targets", f"{name} is tied: input and output embedding are one, which an adapter would part")
    for module in fit.modules:
        if f"{module}.".startswith(TOWERS):
            fit.fault("targets", f"{module} lies in a tower")
    if not fit.faults:
        _try(fit, layers, bases)
        _look_at_effect(fit, layers)


def _look_at_prompt(fit: Fit, saved: dict[str, torch.Tensor], skeleton: nn.Module) -> None:
    """A learned prefix: keys and values of tokens that stand before every prompt."""
    config, text = fit.config, skeleton.config.get_text_config()  # type: ignore[operator, union-attr]
    kind = config.peft_type.value
    fit.whole = {n.removeprefix(PROMPT_PREFIX): tensor for n, tensor in saved.items() if n != PROMPT}
    if PROMPT not in saved:
        fit.fault("targets", f"{PROMPT} is missing")
    if kind != "PREFIX_TUNING":
        fit.fault("method", f"{kind} changes no weight, and of such methods a model can carry a prefix only")
        return
    heads = text.num_key_value_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    own = (config.num_layers, config.num_attention_heads, config.token_dim)
    if own != (text.num_hidden_layers, heads, heads * size):
        fit.fault(
            "shapes", f"layers, heads and width are {own}, the model's {(text.num_hidden_layers, heads, heads * size)}"
        )
    shape = (config.num_virtual_tokens, text.num_hidden_layers * 2 * heads * size)
    if PROMPT in saved and tuple(saved[PROMPT].shape) != shape:
        fit.fault("shapes", f"{PROMPT} is {tuple(saved[PROMPT].shape)}, the model takes {shape}")


def _layers(tuned: nn.Module) -> Iterator[tuple[str, Any]]:
    """Full path -> PEFT's layer, of those that stand for one module of the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in tuned.named_modules():
        if isinstance(module, BaseTunerLayer) and _TOKENS not in f"{name}.":
            yield name.removeprefix(PEFT_PREFIX), module


def _sort(fit: Fit, saved: dict[str, torch.Tensor], layers: dict[str, Any], tuned: nn.Module) -> None:
    """Every tensor of PEFT's file to what it is part of."""
    for key, tensor in saved.items():
        name = key.removeprefix(PEFT_PREFIX)
        module = next((module for module in layers if name.startswith(f"{module}.")), None)
        if _TOKENS in name:
            owner = name.partition(_TOKENS)[0]
            wrapper: Any = tuned.get_submodule(PEFT_PREFIX + owner)
            fit.rows[f"{owner}.weight"] = (list(wrapper.token_adapter.token_indices["default"]), tensor)
        elif module is None or name.startswith(f"{module}.base_layer."):
            fit.whole[name.replace(".base_layer.", ".")] = tensor
        else:
            fit.modules.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor
    for module in layers.keys() - fit.modules.keys():
        fit.fault("targets", f"{module} is a target without weights")


def _look_at_names(fit: Fit, wanted: set[str], found: set[str]) -> None:
    """PEFT itself only warns about tensors that it did not find, and passes over others."""
    for name in sorted(wanted - found):
        fit.fault("targets", f"{name.removeprefix(PEFT_PREFIX)} is missing")
    for name in sorted(found - wanted):
        fit.fault("targets", f"{name.removeprefix(PEFT_PREFIX)} has no place in what the configuration describes")


def _look_at_shapes(fit: Fit, wanted: dict[str, tuple[int, ...]], saved: dict[str, torch.Tensor]) -> None:
    kept = {
        name: sum(ranks)
        for name, ranks in (getattr(fit.config, "rank_pattern", None) or {}).items()
        if isinstance(ranks, list)
    }
    for name, shape in sorted(wanted.items()):
        if (module := re.search(r"^(.*\.)lora_([ABE])$", name.removeprefix(PEFT_PREFIX))) and kept:
            rank = kept.get(f"{module[1]}lora_E", shape[0])
            shape = (shape[0], rank) if module[2] == "B" else (rank, shape[1])
        if name in saved and saved[name].numel() and tuple(saved[name].shape) != shape:
            found = tuple(saved[name].shape)
            fit.fault("shapes", f"{name.removeprefix(PEFT_PREFIX)} is {found}, model and configuration say {shape}")


def _try(fit: Fit, layers: dict[str, Any], bases: dict[str, nn.Module]) -> None:
    """Merge one module of each kind, with random numbers in place of the base's, to see whether PEFT can."""
    kinds = {type(layer): module for module, layer in layers.items() if module in fit.modules}
    for kind, module in kinds.items():
        base = copy.deepcopy(bases[module]).to_empty(device="cpu").float()
        for parameter in base.parameters():
            nn.init.normal_(parameter)
        try:
            fit.layer(module, base).merge(safe_merge=True)
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, KeyError) as error:
            fit.fault("method", f"PEFT cannot merge its {kind.__name__} of {module} ({error})")


def _look_at_effect(fit: Fit, layers: dict[str, Any]) -> None:
    """What training never touched begins at zero; AdaLoRA, which takes ranks away, may leave some modules none."""
    idle = []
    for module, tensors in sorted(fit.modules.items()):
        up = tensors.get("lora_B.weight", tensors.get("lora_E"))
        if up is not None and not up.any():
            idle.append(f"{module} learned nothing")
        elif getattr(layers[module], "scaling", {}).get("default") == 0:
            idle.append(f"{module} is scaled by zero")
    if fit.config.peft_type != "ADALORA" or len(idle) == len(fit.modules):
        for text in idle:
            fit.fault("effect", text)


def _take_plain(adapter: Path, fit: Fit, plain: dict[str, torch.Tensor]) -> None:
    """The file that PEFT does not know has the same as PEFT's, or what PEFT's lacks."""
    for name, tensor in sorted(plain.items()):
        other = fit.whole.get(name, tensor)
        if other.shape != tensor.shape or not torch.equal(other.nan_to_num(), tensor.nan_to_num()):
            raise UserError(f"{adapter}: {name} is one thing in {WEIGHTS} and another in {NON_LORA}")
    fit.whole |= plain


def _look_at_whole(fit: Fit, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in sorted(fit.whole.items()):
        if name not in shapes:
            fit.fault("trained whole", f"{name} has no place in the model")
        elif name.startswith(TOWERS) and not fit.towers:
            fit.fault("trained whole", f"{name} belongs to a tower, and towers stay frozen")
        elif tuple(tensor.shape) != shapes[name]:
            fit.fault("trained whole", f"{name} is {tuple(tensor.shape)}, the model's is {shapes[name]}")


def _holder(path: str, module: nn.Module) -> nn.Module:
    """A model of nothing but this module, at its full path."""
    root = place = nn.Module()
    *parents, last = path.split(".")
    for part in parents:
        child = nn.Module()
        place.add_module(part, child)
        place = child
    place.add_module(last, module)
    return root
