"""The original trainer's LoRA output (which the original's own loader ignores) as an adapter that merges and serves.

The trainer writes `adapter_config.json` and `adapter_model.bin` (PEFT 0.4) for LoRA, and `non_lora_trainables.bin` for
everything else that was trained: the projector, the mining modules, tower layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.mgm import names
from pipelines.mgm.adapter import write_adapter
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.convert_config import expected_shapes
from pipelines.mgm.tensorfiles import read_file
from pipelines.modelfiles import Shapes, model_identity, read_object

_PEFT_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.weight$")


def convert_lora(adapter: str | Path, model: str | Path, output: str | Path) -> None:
    """An original LoRA directory -> a PEFT adapter and the other trained weights, named as in `model`.

    Args:
        adapter: the trainer's output directory.
        model: the converted base model; its weights are not loaded.
        output: an adapter directory, as `captune train` writes it.

    Raises:
        UserError: files missing or unreadable, tensors that the base model has no place for, empty tensors (a ZeRO-3
            run that did not gather them), or ranks that differ from the configuration.
    """
    from peft import LoraConfig

    adapter, output = Path(adapter), Path(output)
    shapes = expected_shapes(MGMConfig.from_pretrained(model))
    saved = read_object(adapter / "adapter_config.json")
    if saved.get("peft_type") != "LORA":
        raise UserError(f"{adapter / 'adapter_config.json'}: peft_type {saved.get('peft_type')!r}, only LORA is known")
    lora = _renamed(_existing(adapter, "adapter_model"))
    other = _renamed(_existing(adapter, "non_lora_trainables"))
    modules = {name.split(".lora_")[0] for name in lora}
    ranks = dict.fromkeys(modules, saved["r"]) | _pattern_by_module(saved.get("rank_pattern") or {}, modules)
    _refuse_switches(adapter / "adapter_config.json", saved)
    _check(adapter, lora, other, shapes, ranks)
    config = LoraConfig(
        r=saved["r"],
        lora_alpha=saved["lora_alpha"],
        lora_dropout=saved.get("lora_dropout", 0.0),
        use_rslora=bool(saved.get("use_rslora", False)),
        alpha_pattern=_pattern_by_module(saved.get("alpha_pattern") or {}, modules),
        rank_pattern=_pattern_by_module(saved.get("rank_pattern") or {}, modules),
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=_target_pattern(modules),
        base_model_name_or_path=str(model),
    )
    towers = any(name.startswith(names.TOWERS) for name in other)
    write_adapter(output, lora | other, config, base=model_identity(model), towers=towers)


_CARRIED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern", "rank_pattern", "target_modules"}
# Which say nothing about the numbers of a finished adapter, or something that is looked at elsewhere.
_WITHOUT_EFFECT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "init_lora_weights", "modules_to_save", "runtime_config", "layers_to_transform", "layers_pattern",
    "exclude_modules", "eva_config", "corda_config", "loftq_config", "ensure_weight_tying", "qalora_group_size",
    "megatron_core",
}  # fmt: skip


def _refuse_switches(path: Path, saved: dict[str, Any]) -> None:
    """A switch that changes what the tensors mean, and that is not carried over, must not be lost without a word."""
    set_ones = {key: value for key, value in saved.items() if value not in (None, False, {}, [], "none", "")}
    unknown = sorted(set_ones.keys() - _CARRIED - _WITHOUT_EFFECT)
    if unknown:
        raise UserError(
            f"{path}: {unknown[0]} is {set_ones[unknown[0]]!r}, and what it means for the weights is not known here; "
            f"carried over are {', '.join(sorted(_CARRIED))}"
        )


def _pattern_by_module(pattern: dict[str, int], modules: set[str]) -> dict[str, int]:
    """A pattern over the original's names as one entry per module, which no other module's name can match."""
    found: dict[str, int] = {}
    for module in sorted(modules):
        theirs = names.to_original(f"{module}.weight") or ""
        for key, value in pattern.items():
            # as PEFT matches them: the whole name, or its end behind a dot
            if re.fullmatch(rf"(.*\.)?({key})", theirs.removesuffix(".weight")):
                found[module] = value
                break
    return found


def _existing(directory: Path, stem: str) -> dict[str, torch.Tensor]:
    for suffix in (".safetensors", ".bin"):
        if (directory / (stem + suffix)).exists():
            return read_file(directory / (stem + suffix))
    raise UserError(f"{directory}: has neither {stem}.safetensors nor {stem}.bin")


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names; a name that no MGM has stays as it is, for the check to list."""
    renamed = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(_PEFT_PREFIX).replace(".default.", ".").replace(".base_layer.", ".")
        renamed[names.to_hf(plain) or plain] = tensor.clone()
    return renamed


def _check(
    adapter: Path, lora: dict[str, torch.Tensor], other: dict[str, torch.Tensor], shapes: Shapes, ranks: dict[str, int]
) -> None:
    complaints = []
    for name, tensor in (lora | other).items():
        match = _LORA.match(name) if name in lora else None
        weight = shapes.get(f"{match['module']}.weight") if match else shapes.get(name)
        if weight is None:
            complaints.append(f"{name}: the base model has no place for it")
        elif tensor.numel() == 0:
            complaints.append(f"{name}: empty, it was not gathered when it was saved")
        else:
            expected = weight
            if match:
                rank = ranks[match["module"]]
                expected = (rank, weight[1]) if match["part"] == "lora_A" else (weight[0], rank)
            if tuple(tensor.shape) != expected:
                complaints.append(f"{name}: {tuple(tensor.shape)} instead of {expected}")
        if match and ".experts." in name:
            complaints.append(
                f"{name}: experts are one tensor in transformers 5, so a LoRA of one of them has no module"
            )
    halves = {part: {n.split(".lora_")[0] for n in lora if f".{part}." in n} for part in ("lora_A", "lora_B")}
    complaints += [f"{module}: has only one of lora_A and lora_B" for module in halves["lora_A"] ^ halves["lora_B"]]
    if not lora:
        complaints.append("the adapter holds no tensors")
    if complaints:
        raise UserError(f"{adapter}: {len(complaints)} problems: " + "; ".join(sorted(complaints)))


def _target_pattern(modules: set[str]) -> str:
    """A pattern that matches exactly these modules' full names: leaves alone (`q_proj`) would hit the CLIP tower
    too.
    """
    paths = sorted({re.sub(r"\.\d+\.", ".0.", module) for module in modules})
    return "|".join(re.escape(path).replace(r"\.0\.", r"\.\d+\.") for path in paths)
