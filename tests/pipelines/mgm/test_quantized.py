"""4-bit and 8-bit loading on the CPU: nobody names modules, and only the language model is quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GemmaConfig,
    PreTrainedTokenizerFast,
)

from pipelines.mgm.load import load_model
from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.processing import MGMProcessor

from .conftest import chat, noise_image

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
EIGHT = {"load_in_8bit": True}
TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@pytest.fixture
def model(
    make_model: Callable[..., MGMForConditionalGeneration], tokenizer: PreTrainedTokenizerFast
) -> MGMForConditionalGeneration:
    """Wide enough for a block of 64 values that share a scale."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return make_model(text_config=GemmaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes, **heads))


@pytest.fixture
def saved(model: MGMForConditionalGeneration, processor: MGMProcessor, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(directory: Path, **kwargs: Any) -> Any:
    return load_model(directory, "bfloat16", quantization_config=BitsAndBytesConfig(**kwargs))


def inputs(processor: MGMProcessor, count: int = 2) -> dict[str, Any]:
    chats = [chat("What is written on the sign?", noise_image(seed)) for seed in range(count)]
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize(("kwargs", "kind"), [(FOUR, bnb.nn.Linear4bit), (EIGHT, bnb.nn.Linear8bitLt)])
@torch.no_grad()
def test_only_the_language_model_is_quantized(
    model: MGMForConditionalGeneration, processor: MGMProcessor, saved: Path, kwargs: dict[str, Any], kind: type
) -> None:
    quantized = load(saved, **kwargs)
    modules = {name for name, module in quantized.named_modules() if isinstance(module, kind)}
    layers = model.config.text_config.num_hidden_layers
    assert len(modules) == 7 * layers and all(name.startswith("model.language_model.layers.") for name in modules)
    rest = {p.dtype for name, p in quantized.named_parameters() if ".layers." not in name or "vision_tower" in name}
    assert rest == {torch.bfloat16}
    assert quantized.model.uni_key.foldable  # mining keeps its fast path
    quantized.save_pretrained(saved.parent / "quantized")
    processor.save_pretrained(saved.parent / "quantized")
    again = load_model(saved.parent / "quantized")
    assert {name for name, module in again.named_modules() if isinstance(module, kind)} == modules

    batch = inputs(processor)
    expected, actual = model(**batch).logits, quantized(**batch).logits.float()
    assert torch.isfinite(actual).all()
    assert torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.8  # random weights, four bits
    assert torch.equal(again(**batch).logits, quantized(**batch).logits)
    # The towers' work is that of the same weights in bfloat16, to the bit.
    half = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.bfloat16)
    pixels = {name: batch[name] for name in ("pixel_values", "pixel_values_aux")}
    assert torch.equal(quantized.get_image_features(**pixels), half.get_image_features(**pixels))
    new = quantized.generate(**batch, max_new_tokens=3, do_sample=False)
    assert new.shape[1] == batch["input_ids"].shape[1] + 3


def test_modules_named_by_the_user_come_on_top(saved: Path) -> None:
    quantized = load(saved, **FOUR, llm_int8_skip_modules=["lm_head", "model.language_model.layers.0"])
    modules = [name for name, module in quantized.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(modules) == 7 and all(name.startswith("model.language_model.layers.1.") for name in modules)
    settings = BitsAndBytesConfig(**FOUR)
    # Without head, where names have no "model." in front.
    base = AutoModel.from_pretrained(saved, quantization_config=settings, device_map={"": "cpu"})
    names = [name for name, module in base.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(names) == 14 and all(name.startswith("language_model.layers.") for name in names)


def test_a_step_of_qlora_lowers_the_loss(processor: MGMProcessor, saved: Path) -> None:
    model = prepare_model_for_kbit_training(load(saved, **FOUR))  # gradient checkpointing, norms in float32
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".language_model." in name for name in trained)
    batch = dict(inputs(processor))
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, -100)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    adapted.train()
    losses = []
    for _ in range(3):
        loss = adapted(**batch).loss
        loss.backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
