from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.adapters import merge, probe
from pipelines.adapters.check import check_adapter, check_model
from pipelines.adapters.config import MergeConfig
from pipelines.errors import UserError, WorkFailed
from pipelines.mgm.adapter import NON_LORA, WEIGHTS, trained_on, write_adapter
from pipelines.mgm.convert_lora import convert_lora
from pipelines.mgm.load import load_model, load_processor
from pipelines.modelfiles import model_identity


def test_merged_model_gives_the_logits_of_base_and_adapter(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """A plain directory whose logits are those of base + adapter, not those of the base; towers and names are the
    base's.
    """
    manifest = merge.run(model_dir, adapter_dir, tmp_path / "merged", MergeConfig())
    assert manifest["max_logit_difference_as_written"] <= 1e-3 and manifest["lora"]
    inputs = probe.batch(load_processor(tmp_path / "merged"))
    merged = probe.logits(load_model(tmp_path / "merged", "float32"), inputs)
    torch.testing.assert_close(
        merged, probe.logits(merge.with_adapter(model_dir, adapter_dir), inputs), rtol=0, atol=1e-3
    )
    assert (merged - probe.logits(load_model(model_dir, "float32"), inputs)).abs().max() > 0.05
    before, after = load_file(model_dir / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(after[name], before[name]) for name in before if "vision_tower" in name)
    assert merge.run(model_dir, adapter_dir, tmp_path / "merged", MergeConfig()) == manifest  # done already


def test_tied_and_untied_embeddings_survive(tiny: Any, tmp_path: Path) -> None:
    """A tied head stays tied in file and memory; an untied one keeps weights of its own."""
    for tie in (True, False):
        model = tiny.write_model(tmp_path / f"model-{tie}", tie=tie)
        data = tiny.write_instructions(tmp_path / f"{tie}" / "instruct.json")
        adapter = tiny.train_adapter(model, data, tmp_path / f"adapter-{tie}", steps=1)
        merge.run(model, adapter, tmp_path / f"merged-{tie}", MergeConfig())
        merged = load_model(tmp_path / f"merged-{tie}", "float32")
        assert (merged.lm_head.weight.data_ptr() == merged.model.language_model.embed_tokens.weight.data_ptr()) == tie
        assert ("lm_head.weight" in load_file(tmp_path / f"merged-{tie}" / "model.safetensors")) != tie


def test_bf16_base_stays_bf16(tiny: Any, tmp_path: Path) -> None:
    """`auto` writes the base's dtype; every tensor is the float32 merge rounded once."""
    model = tiny.write_model(tmp_path / "model", dtype="bfloat16")
    adapter = tiny.train_adapter(model, tiny.write_instructions(tmp_path / "i.json"), tmp_path / "adapter", steps=2)
    manifest = merge.run(model, adapter, tmp_path / "merged", MergeConfig())
    assert manifest["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_projector_alone_can_be_merged(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Training without an instruct phase leaves no PEFT adapter; its projector still becomes a model."""
    data = tiny.write_dataset(tmp_path / "data")
    adapter = tiny.train_adapter(model_dir, data, tmp_path / "adapter", lora=False)
    assert not (adapter / WEIGHTS).exists()
    manifest = merge.run(model_dir, adapter, tmp_path / "merged", MergeConfig())
    trained, merged = load_file(adapter / NON_LORA), load_file(tmp_path / "merged" / "model.safetensors")
    assert manifest["merged_tensors"] > 0 and all(torch.equal(merged[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("fault", ["lora dropped", "tower changed", "NaN"])
def test_a_wrong_merge_is_refused_and_leaves_nothing(
    model_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Whatever PEFT or transformers may do wrong one day: no directory appears."""

    def corrupted(tuned: Any) -> Any:
        if fault == "lora dropped":
            return tuned.unload()
        merged = tuned.merge_and_unload()
        parameters = dict(merged.named_parameters())
        # The tower's class token never reaches the language model: no logit can tell that it changed.
        name = "model.vision_tower.post_layernorm.weight" if fault == "tower changed" else "model.uni_value.proj.weight"
        parameters[name].data.fill_(0.5 if fault == "tower changed" else float("nan"))
        return merged

    monkeypatch.setattr(merge, "merge_lora", corrupted)
    with pytest.raises(WorkFailed, match="towers must stay" if fault == "tower changed" else "logits differ"):
        merge.run(model_dir, adapter_dir, tmp_path / "merged", MergeConfig())
    assert not (tmp_path / "merged").exists()


def test_adapters_of_another_model_are_refused(tiny: Any, model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Other shapes, tensors without a place, half an adapter, an unfinished training: each is named and nothing is
    left.
    """
    other = tiny.write_model(tmp_path / "other", hidden=64)
    with pytest.raises(UserError, match="multi_modal_projector"):
        merge.run(other, adapter_dir, tmp_path / "merged", MergeConfig(any_base=True))
    assert not (tmp_path / "merged").exists()

    broken = shutil.copytree(adapter_dir, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    lost = tensors.pop(sorted(tensors)[0])
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(UserError, match="1 adapter tensors missing"):
        merge.run(model_dir, broken, tmp_path / "merged", MergeConfig())
    (broken / WEIGHTS).unlink()
    with pytest.raises(UserError, match="half an adapter"):
        merge.run(model_dir, broken, tmp_path / "merged", MergeConfig())
    (broken / ".stage.json").write_text('{"stage": "train"}')
    with pytest.raises(UserError, match="captune train has not finished"):
        merge.run(model_dir, broken, tmp_path / "merged", MergeConfig())
    with pytest.raises(UserError, match="not an adapter directory"):
        merge.run(model_dir, tmp_path, tmp_path / "merged", MergeConfig())
    assert lost.numel()


def test_another_base_of_equal_shape_is_refused(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Same shapes, other weights: such a merge gives a model that looks right. A note beside the base is no other
    base, and who means the other model can say so.
    """
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    (copy / "README.md").write_text("moved here, and a note")
    assert all(verdict.passed for verdict in check_adapter(adapter_dir, copy))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.language_model.norm.weight"] += 0.01
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert [verdict.name for verdict in check_adapter(adapter_dir, copy) if not verdict.passed] == ["base"]
    with pytest.raises(UserError, match=r"trained on another model than .*--merge\.any_base true"):
        merge.run(copy, adapter_dir, tmp_path / "merged", MergeConfig())
    assert not (tmp_path / "merged").exists()
    assert merge.run(copy, adapter_dir, tmp_path / "merged", MergeConfig(any_base=True))["lora"]


def test_an_adapter_that_does_not_say_its_base(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """PEFT loads what captune wrote; what PEFT alone wrote is merged as before; halves of two adapters are refused."""
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(load_model(model_dir, "float32"), adapter_dir)
    tuned.save_pretrained(tmp_path / "foreign")
    shutil.copytree(tmp_path / "foreign", tmp_path / "half")
    assert trained_on(tmp_path / "foreign") is None
    assert all(verdict.passed for verdict in check_adapter(tmp_path / "foreign", model_dir))
    assert merge.run(model_dir, tmp_path / "foreign", tmp_path / "merged", MergeConfig())["lora"]
    for name, base in ((WEIGHTS, "1" * 32), (NON_LORA, "2" * 32)):
        save_file(load_file(adapter_dir / name), tmp_path / "half" / name, metadata={"base": base})
    with pytest.raises(UserError, match="two different models"):
        merge.run(model_dir, tmp_path / "half", tmp_path / "merged-too", MergeConfig())


def test_empty_shards_are_never_written(tmp_path: Path) -> None:
    """The ZeRO-3 accident: a tensor that nobody gathered has no elements; the adapter is refused."""
    weights = {"model.multi_modal_projector.0.weight": torch.empty(0)}
    with pytest.raises(WorkFailed, match="not gathered"):
        write_adapter(tmp_path / "adapter", weights, None, base="0" * 32)
    assert not (tmp_path / "adapter").exists()


def test_the_original_trainers_lora_merges(model_dir: Path, tmp_path: Path) -> None:
    """Names of the original and PEFT 0.4, projector and a tower layer trained beside: converted, checked, merged."""
    saved, prefix = load_file(model_dir / "model.safetensors"), "base_model.model.model."
    (tmp_path / "original").mkdir()
    lora, torch_seed = {}, torch.Generator().manual_seed(0)
    for layer in range(2):
        rows, columns = saved[f"model.language_model.layers.{layer}.mlp.up_proj.weight"].shape
        lora[f"{prefix}layers.{layer}.mlp.up_proj.lora_A.weight"] = torch.randn(2, columns, generator=torch_seed)
        lora[f"{prefix}layers.{layer}.mlp.up_proj.lora_B.weight"] = torch.randn(rows, 2, generator=torch_seed)
    norm = "vision_model.encoder.layers.1.layer_norm1.bias"
    other = {f"{prefix}mm_projector.0.bias": torch.randn(32, generator=torch_seed)}
    other[f"{prefix}vision_tower.vision_tower.{norm}"] = torch.full((32,), 0.25)
    torch.save(lora, tmp_path / "original" / "adapter_model.bin")
    torch.save(other, tmp_path / "original" / "non_lora_trainables.bin")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.05, "target_modules": ["up_proj"]}
    (tmp_path / "original" / "adapter_config.json").write_text(json.dumps(settings))

    convert_lora(tmp_path / "original", model_dir, tmp_path / "adapter")
    assert all(verdict.passed for verdict in check_adapter(tmp_path / "adapter", model_dir))
    merge.run(model_dir, tmp_path / "adapter", tmp_path / "merged", MergeConfig())
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    a, b = (lora[f"{prefix}layers.1.mlp.up_proj.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged[name], saved[name] + b @ a * 2)
    assert torch.equal(merged["model.multi_modal_projector.0.bias"], other[f"{prefix}mm_projector.0.bias"])
    tower = "model.vision_tower.encoder.layers.1.layer_norm1.bias"
    assert (merged[tower] == 0.25).all()
    changed = {key for key, tensor in merged.items() if not torch.equal(tensor, saved[key])}
    assert changed == {name, name.replace("layers.1.", "layers.0."), "model.multi_modal_projector.0.bias", tower}
    assert all(verdict.passed for verdict in check_model(tmp_path / "merged"))


def test_a_mixtral_merges(mixtral_dir: Path, tmp_path: Path) -> None:
    """Its files name every expert, its memory does not: what was written is still compared tensor by tensor."""
    from peft import LoraConfig

    module = "model.language_model.layers.0.self_attn.q_proj"
    weights = {
        f"{module}.lora_A.default.weight": torch.ones(2, 32),
        f"{module}.lora_B.default.weight": torch.ones(32, 2),
    }
    settings = LoraConfig(r=2, lora_alpha=2, target_modules=module.replace(".", r"\."), task_type="CAUSAL_LM")
    write_adapter(tmp_path / "adapter", weights, settings, base=model_identity(mixtral_dir))
    merge.run(mixtral_dir, tmp_path / "adapter", tmp_path / "merged", MergeConfig())
    before, after = (load_file(place / "model.safetensors") for place in (mixtral_dir, tmp_path / "merged"))
    torch.testing.assert_close(after[f"{module}.weight"], before[f"{module}.weight"] + 2)
    assert before.keys() == after.keys()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {f"{module}.weight"}
