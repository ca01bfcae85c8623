from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
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


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lora dropped", "logits differ"),
        ("NaN", "logits differ"),
        ("tower changed", "towers must stay"),
        ("badly written", "was not written as it was merged"),
    ],
)
def test_a_wrong_merge_is_refused_and_leaves_nothing(
    model_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    """Whatever PEFT, torch or a disk may do wrong one day: no directory appears."""
    written, streamed = merge.Merger._written, merge.write_streamed

    def dropped(layer: Any, name: str) -> dict[str, torch.Tensor]:
        weights = dict(layer.get_base_layer().named_parameters())
        return {key: tensor * float("nan") if fault == "NaN" else tensor for key, tensor in weights.items()}

    def tower_changed(self: Any, part: str, *rest: Any) -> torch.Tensor:
        # The tower's class token never reaches the language model: no logit can tell that it changed.
        return written(self, part, *rest) + (0.5 if part == "model.vision_tower.post_layernorm.weight" else 0)

    if fault == "tower changed":
        monkeypatch.setattr(merge.Merger, "_written", tower_changed)
    elif fault == "badly written":
        monkeypatch.setattr(merge, "write_streamed", lambda p, k, tensors: streamed(p, k, (2 * t for t in tensors)))
    else:
        monkeypatch.setattr(merge, "merge_module", dropped)
    with pytest.raises(WorkFailed, match=message):
        merge.run(model_dir, adapter_dir, tmp_path / "merged", MergeConfig())
    assert not (tmp_path / "merged").exists()


TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"


def _peft_config(kind: str) -> Any:
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    lora: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    pattern = {r"mlp\.down_proj": 2}
    return {
        "plain": lambda: LoraConfig(**lora),
        "dora": lambda: LoraConfig(use_dora=True, **lora),
        "rslora": lambda: LoraConfig(use_rslora=True, **lora),
        "patterns": lambda: LoraConfig(rank_pattern=pattern, alpha_pattern=pattern, **lora),
        "pissa": lambda: LoraConfig(init_lora_weights="pissa", **lora),
        "one layer": lambda: LoraConfig(
            r=2, target_modules=["gate_proj"], layers_to_transform=[1], layers_pattern="layers"
        ),
        "module": lambda: LoraConfig(modules_to_save=["multi_modal_projector"], **lora),
        "tokens": lambda: LoraConfig(trainable_token_indices={"embed_tokens": [3, 5]}, **lora),
        "adalora": lambda: AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=TARGETS),
        "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=r".*down_proj"),
        "uni": lambda: LoraConfig(r=2, target_modules=r"model\.uni_(query|key|value)\.proj"),
        # Not to be merged:
        "tower": lambda: LoraConfig(r=2, target_modules=["q_proj"]),
        "tied": lambda: LoraConfig(r=2, target_modules=["lm_head"]),
        "untying": lambda: LoraConfig(modules_to_save=["embed_tokens"], **lora),
        "biases": lambda: LoraConfig(bias="all", **lora),
        "new bias": lambda: LoraConfig(lora_bias=True, **lora),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        *((kind, None) for kind in ("plain", "dora", "rslora", "patterns", "pissa", "one layer", "module", "tokens")),
        *((kind, None) for kind in ("adalora", "ia3", "uni")),
        ("tower", "lies in a tower"),
        ("tied", "lm_head.weight is tied"),
        ("untying", "embed_tokens.weight is tied"),
        ("biases", "belongs to a tower"),
        ("new bias", "base layer has no bias"),
    ],
)
def test_check_passes_exactly_what_merge_merges(
    model_dir: Path, tmp_path: Path, kind: str, refusal: str | None
) -> None:
    """Adapters that PEFT alone wrote: merged to PEFT's own logits and passed, or refused by both for one reason."""
    from peft import PeftModel, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(load_model(model_dir, "float32"), _peft_config(kind))
    with torch.no_grad():
        for parameter in (p for p in tuned.parameters() if p.requires_grad):
            parameter += torch.randn_like(parameter) * 0.1
    tuned.save_pretrained(tmp_path / "adapter")
    failed = [verdict.detail for verdict in check_adapter(tmp_path / "adapter", model_dir) if not verdict.passed]
    if refusal is not None:
        assert any(refusal in detail for detail in failed)
        with pytest.raises(UserError, match=refusal):
            merge.run(model_dir, tmp_path / "adapter", tmp_path / "merged", MergeConfig())
        assert not (tmp_path / "merged").exists()
        return
    assert not failed
    merge.run(model_dir, tmp_path / "adapter", tmp_path / "merged", MergeConfig())
    inputs = probe.batch(load_processor(model_dir))
    base = load_model(model_dir, "float32")
    before = probe.logits(base, inputs)
    expected = probe.logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), inputs)
    assert (expected - before).abs().max() > 1e-3
    found = probe.logits(load_model(tmp_path / "merged", "float32"), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_model_carries_the_prefix_that_it_learned(tiny: Any, tmp_path: Path) -> None:
    """A prefix has no weight to go into. The directory answers as base + adapter does, also in a batch, is another
    model than the base, and nothing is trained or merged on top of it.
    """
    from serve.engine import Engine, Request

    model = tiny.write_model(tmp_path / "model", spread=0.5)
    data = tiny.write_instructions(tmp_path / "i.json")
    adapter = tiny.train_adapter(model, data, tmp_path / "adapter", method="prefix", steps=3)
    manifest = merge.run(model, adapter, tmp_path / "merged", MergeConfig())
    assert manifest["carried"] == "prefix" and model_identity(tmp_path / "merged") != model_identity(model)
    inputs = probe.batch(load_processor(model))
    expected = probe.logits(merge.with_adapter(model, adapter), inputs)
    assert torch.equal(probe.logits(load_model(tmp_path / "merged", "float32"), inputs), expected)
    assert (expected - probe.logits(load_model(model, "float32"), inputs)).abs().max() > 0.05
    assert all(verdict.passed for verdict in check_model(tmp_path / "merged"))
    questions = ("what is this", "which colour has the small square on the left")
    requests = [Request([{"role": "user", "content": [{"type": "text", "text": text}]}]) for text in questions]
    engine = Engine(tmp_path / "merged")
    answers = [answer.text for answer in engine.answer(requests)]
    assert answers == [engine.answer([request])[0].text for request in requests]
    assert answers != [answer.text for answer in Engine(model).answer(requests)]
    with pytest.raises(UserError, match="carries an adapter in adapter/"):
        merge.run(tmp_path / "merged", adapter, tmp_path / "again", MergeConfig())


def test_a_full_fine_tune_replaces_whole_tensors(model_dir: Path, tmp_path: Path) -> None:
    """Without PEFT: every trained tensor is the merged model's, and a tied head follows its embedding."""
    names = ("model.language_model.embed_tokens.weight", "model.language_model.layers.1.mlp.up_proj.weight")
    saved = load_file(model_dir / "model.safetensors")
    weights = {name: saved[name] + 0.1 for name in (*names, "model.multi_modal_projector.0.bias")}
    write_adapter(tmp_path / "adapter", weights, None, base=model_identity(model_dir))
    assert all(verdict.passed for verdict in check_adapter(tmp_path / "adapter", model_dir))
    manifest = merge.run(model_dir, tmp_path / "adapter", tmp_path / "merged", MergeConfig())
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert manifest["merged_tensors"] == 3
    assert all(torch.equal(tensor, weights.get(name, saved[name])) for name, tensor in merged.items())
    model = load_model(tmp_path / "merged", "float32")
    assert torch.equal(model.lm_head.weight, weights[names[0]])


def test_an_adapter_trained_over_nf4_merges_into_the_weights_that_were_quantized(
    model_dir: Path, tmp_path: Path
) -> None:
    """QLoRA: the merged model is the unquantized base with the adapter; into a quantized one nothing can be merged."""
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = load_model(model_dir, "float32", quantization_config=nf4)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, base_model_name_or_path=str(model_dir))
    tuned = get_peft_model(base, config)
    learned = {name: p for name, p in base.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in learned.values():
            parameter += torch.randn_like(parameter) * 0.1
    write_adapter(tmp_path / "adapter", learned, config, base=model_identity(model_dir))
    merge.run(model_dir, tmp_path / "adapter", tmp_path / "merged", MergeConfig())
    inputs = probe.batch(load_processor(model_dir))
    found = probe.logits(load_model(tmp_path / "merged", "float32"), inputs)
    expected = probe.logits(merge.with_adapter(model_dir, tmp_path / "adapter"), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (probe.logits(tuned, inputs) - expected).abs().max() > 1e-3  # what training saw was nf4

    load_model(model_dir, "float32", quantization_config=nf4).save_pretrained(tmp_path / "nf4")
    load_processor(model_dir).save_pretrained(tmp_path / "nf4")
    with pytest.raises(UserError, match="quantized; merge into the model that it was made from"):
        merge.run(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "no", MergeConfig())


@pytest.mark.parametrize("kind", ["shards", "pickled"])
def test_a_base_in_several_files_or_pickled_ones(model_dir: Path, adapter_dir: Path, tmp_path: Path, kind: str) -> None:
    """Merged to the same tensors; files that transformers loads, with an index where there are several."""
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    saved = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    if kind == "shards":
        load_model(model_dir, "float32").save_pretrained(base, max_shard_size="30KB")
    else:
        torch.save(saved, base / "pytorch_model.bin")
    merge.run(base, adapter_dir, tmp_path / "merged", MergeConfig(any_base=True))
    merge.run(model_dir, adapter_dir, tmp_path / "plain", MergeConfig())
    files = sorted(tmp_path.glob("merged/*.safetensors"))
    assert (len(files) > 1) == (kind == "shards") == (tmp_path / "merged" / "model.safetensors.index.json").exists()
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(verdict.passed for verdict in check_model(tmp_path / "merged"))


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_model(tiny: Any, tmp_path: Path) -> None:
    """Anonymous memory: files are mapped and modules come one at a time, so a 13B model merges in 32 GB."""
    from peft import LoraConfig

    model = tiny.write_model(tmp_path / "model", layers=24, hidden=512, dtype="bfloat16")
    size = (model / "model.safetensors").stat().st_size
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", base_model_name_or_path=str(model))
    weights = {}
    for layer in range(24):
        name = f"model.language_model.layers.{layer}.self_attn.q_proj.lora_{{}}.default.weight"
        weights |= {name.format("A"): torch.randn(2, 512), name.format("B"): torch.randn(512, 2) / 100}
    write_adapter(tmp_path / "adapter", weights, config, base=model_identity(model))
    small = tiny.write_model(tmp_path / "small")
    adapter = tiny.train_adapter(small, tiny.write_instructions(tmp_path / "i.json"), tmp_path / "a", steps=1)
    merge.run(small, adapter, tmp_path / "warm", MergeConfig())  # libraries load, allocators take what they need
    with _Peak() as peak:
        merge.run(model, tmp_path / "adapter", tmp_path / "merged", MergeConfig())
    assert size > 50 << 20
    assert peak.grown < 0.4 * size, f"{peak.grown >> 20} MiB for a model of {size >> 20}"


class _Peak:
    """How far this process's anonymous memory grows meanwhile, in bytes."""

    def __enter__(self) -> _Peak:
        self.start = self.peak = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()

    @property
    def grown(self) -> int:
        return self.peak - self.start

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) << 10


LOADED_ELSEWHERE = """
import sys
sys.modules["pipelines"] = None  # as where captune is not installed
from transformers import AutoModelForImageTextToText, AutoProcessor
kinds = (AutoModelForImageTextToText, AutoProcessor)
print(*(type(kind.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__ for kind in kinds))
"""


@pytest.mark.heavy
def test_a_merged_model_loads_without_captune(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """It carries its modelling code, unless it is told not to; a base that has it passes it on in any case."""
    from pipelines.mgm.remote_code import add_remote_code

    merge.run(model_dir, adapter_dir, tmp_path / "merged", MergeConfig())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", LOADED_ELSEWHERE, str(tmp_path / "merged")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["MGMForConditionalGeneration", "MGMProcessor"], done.stderr[-2000:]

    merge.run(model_dir, adapter_dir, tmp_path / "bare", MergeConfig(remote_code=False))
    assert not (tmp_path / "bare" / "modeling.py").exists()
    coded = shutil.copytree(model_dir, tmp_path / "coded")
    add_remote_code(coded)
    merge.run(coded, adapter_dir, tmp_path / "passed on", MergeConfig(remote_code=False, any_base=True))
    assert (tmp_path / "passed on" / "modeling.py").exists()


def test_adapters_of_another_model_are_refused(tiny: Any, model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Other shapes, tensors without a place, half an adapter, an unfinished training: each is named and nothing is
    left.
    """
    other = tiny.write_model(tmp_path / "other", hidden=64)
    with pytest.raises(UserError, match=r"lora_A\.weight is \(4, 64\), model and configuration say \(4, 128\)"):
        merge.run(other, adapter_dir, tmp_path / "merged", MergeConfig(any_base=True))
    assert not (tmp_path / "merged").exists()

    broken = shutil.copytree(adapter_dir, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    lost = tensors.pop(sorted(tensors)[0])
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(UserError, match=r"lora_A\.weight is missing"):
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
    experts = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    weights[experts] = 1 + dict(load_model(mixtral_dir).named_parameters())[experts].detach()
    settings.base_model_name_or_path = str(mixtral_dir)
    write_adapter(tmp_path / "adapter", weights, settings, base=model_identity(mixtral_dir))
    merge.run(mixtral_dir, tmp_path / "adapter", tmp_path / "merged", MergeConfig())
    before, after = (load_file(place / "model.safetensors") for place in (mixtral_dir, tmp_path / "merged"))
    torch.testing.assert_close(after[f"{module}.weight"], before[f"{module}.weight"] + 2)
    assert before.keys() == after.keys()
    # One tensor in memory, two of each expert's three in files.
    moved = {
        f"model.language_model.layers.0.block_sparse_moe.experts.{n}.{w}.weight" for n in (0, 1) for w in ("w1", "w3")
    }
    assert {n for n in after if not torch.equal(after[n], before[n])} == {f"{module}.weight", *moved}
    assert all(torch.equal(after[name], before[name] + 1) for name in moved)
