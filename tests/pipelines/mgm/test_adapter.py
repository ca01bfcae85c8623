"""What is written after training is what PEFT alone restores, of every method, the trained projector included."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.adapters import probe
from pipelines.adapters.check import check_adapter
from pipelines.adapters.unmerged import with_adapter
from pipelines.errors import UserError
from pipelines.mgm.adapter import CONFIG, NON_LORA, WEIGHTS, is_lora, write_adapter
from pipelines.mgm.load import load_model, load_processor
from pipelines.modelfiles import model_identity
from pipelines.train.config import TrainConfig
from pipelines.train.methods import make_learn

TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"


def _config(method: str, model_dir: Path) -> Any:
    from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig

    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(model_dir)}
    if method == "prefix":
        shape = {"num_layers": 2, "num_attention_heads": 1, "token_dim": 8}
        return PrefixTuningConfig(num_virtual_tokens=3, **shape, **common)
    common |= {"lora_alpha": 8, "target_modules": TARGETS}
    if method == "adalora":
        return AdaLoraConfig(init_r=3, target_r=2, total_step=10, **common)
    return LoraConfig(r=2, use_dora=method == "dora", use_rslora=method == "rslora", **common)


@torch.no_grad()
def _tuned(model_dir: Path, method: str) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """A model with PEFT's layers and a projector, all of whose weights moved; those weights; PEFT's configuration."""
    from peft import get_peft_model

    model, config = load_model(model_dir, "float32"), _config(method, model_dir)
    make_learn(model, TrainConfig().phase("align"), TrainConfig())
    whole = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tuned = get_peft_model(model, config)
    named = {name.removeprefix("base_model.").removeprefix("model."): p for name, p in tuned.named_parameters()}
    named |= {name: p for name, p in model.named_parameters() if name in whole}
    learned = {name: p for name, p in named.items() if name in whole or is_lora(name)}
    noise = torch.Generator().manual_seed(1)
    for name, parameter in learned.items():
        if "ranknum" not in name:
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    if method == "adalora":  # as the allocator leaves it: some ranks are zero, and it says which
        pattern = {name: [True, True, False] for name in learned if "lora_E" in name}
        for name in pattern:
            learned[name][2] = 0
        config.rank_pattern = pattern
    return tuned, learned, config


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora", "prefix"])
def test_peft_alone_restores_what_was_trained(model_dir: Path, tmp_path: Path, method: str) -> None:
    """The logits of the trained model to the bit, without a warning; and those of the base are others."""
    from peft import PeftModel

    tuned, learned, config = _tuned(model_dir, method)
    write_adapter(tmp_path / "adapter", learned, config, base=model_identity(model_dir))
    inputs = probe.batch(load_processor(model_dir))
    base = load_model(model_dir, "float32")
    before = probe.logits(base, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        restored = PeftModel.from_pretrained(base, tmp_path / "adapter")
    found, expected = probe.logits(restored, inputs), probe.logits(tuned, inputs)
    assert (found - before).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if method == "adalora" else 0)
    assert all(verdict.passed for verdict in check_adapter(tmp_path / "adapter", model_dir))
    again = probe.logits(with_adapter(model_dir, tmp_path / "adapter"), inputs)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


def test_directories_of_older_versions_load(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """They keep the projector in a file that PEFT does not know; what captune makes of both is the same."""
    old = shutil.copytree(adapter_dir, tmp_path / "old")
    tensors = load_file(old / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if is_lora(name)}, old / WEIGHTS)
    settings = json.loads((old / CONFIG).read_text())
    (old / CONFIG).write_text(json.dumps(settings | {"modules_to_save": None}))
    inputs = probe.batch(load_processor(model_dir))
    found, expected = (probe.logits(with_adapter(model_dir, place), inputs) for place in (old, adapter_dir))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_two_files_that_disagree_are_refused(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """One of them comes from another training."""
    mixed = shutil.copytree(adapter_dir, tmp_path / "mixed")
    tensors = load_file(mixed / NON_LORA)
    name = "model.uni_query.proj.weight"
    save_file(tensors | {name: tensors[name] + 1}, mixed / NON_LORA)
    with pytest.raises(UserError, match=rf"{name} is one thing in {WEIGHTS} and another in {NON_LORA}"):
        with_adapter(model_dir, mixed)
