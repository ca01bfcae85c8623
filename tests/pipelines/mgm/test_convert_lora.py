"""What the original's trainer leaves behind becomes an adapter that changes the base model as LoRA says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from pipelines.errors import UserError
from pipelines.mgm import register
from pipelines.mgm.convert_lora import convert_lora

register()
PREFIX = "base_model.model.model."
RANK, ALPHA = 2, 8


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """As PEFT 0.4 and the original's trainer write it for the reference checkpoint's model."""
    directory = tmp_path / "lora"
    directory.mkdir()
    lora = {}
    for layer in range(3):
        for module, rows, columns in (("self_attn.q_proj", 48, 48), ("mlp.down_proj", 48, 96)):
            name = f"{PREFIX}layers.{layer}.{module}"
            lora[f"{name}.lora_A.weight"] = torch.randn(RANK, columns)
            lora[f"{name}.lora_B.weight"] = torch.randn(rows, RANK)
    other = {
        f"{PREFIX}mm_projector.0.bias": torch.randn(48),
        f"{PREFIX}vlm_uni_query_projector.1.bias": torch.randn(32),
    }
    torch.save(lora, directory / "adapter_model.bin")
    torch.save(other, directory / "non_lora_trainables.bin")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none"}
    config |= {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "inference_mode": True}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_adapter_changes_the_model_as_lora_says(
    adapter: Path, converted: Path, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    convert_lora(adapter, converted, tmp_path / "out")
    base = AutoModelForImageTextToText.from_pretrained(converted)
    weight = base.model.language_model.layers[1].self_attn.q_proj.weight.detach().clone()
    tower = base.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight.detach().clone()
    base.load_state_dict(load_file(tmp_path / "out" / "non_lora_trainables.safetensors"), strict=False)
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    saved = torch.load(adapter / "adapter_model.bin", weights_only=True)
    a, b = (saved[f"{PREFIX}layers.1.self_attn.q_proj.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(
        merged.model.language_model.layers[1].self_attn.q_proj.weight, weight + b @ a * ALPHA / RANK
    )
    assert torch.equal(merged.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight, tower)
    other = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    assert torch.equal(merged.model.multi_modal_projector[0].bias, other[f"{PREFIX}mm_projector.0.bias"])
    assert torch.equal(merged.model.uni_query.proj.bias, other[f"{PREFIX}vlm_uni_query_projector.1.bias"])


@pytest.mark.parametrize(
    ("switches", "scale"),
    [
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"alpha_pattern": {"self_attn.q_proj": 3}}, 3 / RANK),
        ({"alpha_pattern": {r"layers\.1\..*q_proj": 3, "q_proj": 5}}, 3 / RANK),
        ({"alpha_pattern": {"down_proj": 3}}, ALPHA / RANK),
    ],
)
def test_scaling_switches_travel(
    adapter: Path, converted: Path, tmp_path: Path, switches: dict[str, Any], scale: float
) -> None:
    """They change every number of the update, and nothing in the tensors tells of them."""
    saved = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(saved | switches))
    convert_lora(adapter, converted, tmp_path / "out")
    base = AutoModelForImageTextToText.from_pretrained(converted)
    weight = base.model.language_model.layers[1].self_attn.q_proj.weight.detach().clone()
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    tensors = torch.load(adapter / "adapter_model.bin", weights_only=True)
    a, b = (tensors[f"{PREFIX}layers.1.self_attn.q_proj.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged.model.language_model.layers[1].self_attn.q_proj.weight, weight + b @ a * scale)


def test_a_switch_that_is_not_carried_over_is_refused(adapter: Path, converted: Path, tmp_path: Path) -> None:
    saved = json.loads((adapter / "adapter_config.json").read_text())
    for switch in ({"use_dora": True}, {"bias": "all"}, {"trainable_token_indices": [1]}):
        (adapter / "adapter_config.json").write_text(json.dumps(saved | switch))
        with pytest.raises(UserError, match=f"{next(iter(switch))} is .* not known here"):
            convert_lora(adapter, converted, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "tensors", "message"),
    [
        (
            "adapter_model.bin",
            {f"{PREFIX}layers.0.mlp.up_proj.lora_A.weight": torch.ones(RANK, 48)},
            "only one of lora_A",
        ),
        ("adapter_model.bin", {f"{PREFIX}layers.9.mlp.up_proj.lora_A.weight": torch.ones(RANK, 48)}, "no place for it"),
        (
            "adapter_model.bin",
            {f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 48)},
            r"\(3, 48\) instead",
        ),
        ("non_lora_trainables.bin", {f"{PREFIX}mm_projector.0.weight": torch.ones(0)}, "not gathered"),
        ("non_lora_trainables.bin", {"surprise": torch.ones(1)}, "surprise: the base model has no place"),
    ],
)
def test_tensors_without_a_place_are_listed(
    adapter: Path, converted: Path, tmp_path: Path, file: str, tensors: dict[str, torch.Tensor], message: str
) -> None:
    torch.save(torch.load(adapter / file, weights_only=True) | tensors, adapter / file)
    with pytest.raises(UserError, match=message):
        convert_lora(adapter, converted, tmp_path / "out")
    (adapter / file).unlink()
    with pytest.raises(UserError, match="has neither"):
        convert_lora(adapter, converted, tmp_path / "out")
