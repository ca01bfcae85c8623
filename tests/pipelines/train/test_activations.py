"""What autograd keeps, counted by formula, against the tensors that it does keep."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.train import activations
from pipelines.train.activations import Micro, Numbers

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 160,
    "max_position_embeddings": 256,
}  # fmt: skip
TARGETS = r".*(q|k|v|o|gate|up|down)_proj"


def _language_model(kind: str, pairs: int) -> Any:
    from transformers import AutoModel, GemmaConfig, LlamaConfig, MixtralConfig

    more = {"gemma": {"head_dim": 16}, "llama": {}, "mixtral": {"num_local_experts": 4}}[kind]
    made = {"gemma": GemmaConfig, "llama": LlamaConfig, "mixtral": MixtralConfig}[kind]
    return AutoModel.from_config(made(num_key_value_heads=pairs, **SIZES, **more)).requires_grad_(False).train()


class Kept:
    """Bytes of the storages that autograd saves within the block, those of parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        self.known = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        self.storages: dict[int, Any] = {}

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage  # held, so that no address comes twice
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("precision", ["bf16", "float32", "cast"])
@pytest.mark.parametrize("learns", ["lora", "lora without dropout", "nothing", "everything"])
@pytest.mark.parametrize(("kind", "pairs"), [("gemma", 1), ("llama", 2), ("llama", 4), ("mixtral", 2)])
def test_a_decoder_layer_keeps_what_the_formula_says(kind: str, pairs: int, learns: str, precision: str) -> None:
    """To the byte: with and without padding, at two shapes, on weights of either width (`cast`: DeepSpeed's model)."""
    if kind == "mixtral" and learns == "everything":
        pytest.skip("experts are counted as frozen")
    for frozen in [torch.bfloat16, torch.float32] if precision == "bf16" and learns != "everything" else [None]:
        model = _language_model(kind, pairs)
        _learn(model, learns, precision, frozen)
        for rows, length, padded in ((2, 10, False), (3, 7, True)):
            numbers = _numbers(model, precision)
            micro = Micro(rows, length, targets=0, images=0, padded=padded)
            with Kept(model) as kept:
                _forward(model, micro, precision, numbers)
            assert kept.bytes == _expected(model, micro, numbers), (frozen, micro)


def _learn(model: Any, learns: str, precision: str, frozen: torch.dtype | None) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model.to(frozen or {"bf16": torch.float32, "float32": torch.float32, "cast": torch.bfloat16}[precision])
    if learns == "everything":
        model.requires_grad_(True)
    elif learns != "nothing":
        dropout = 0.0 if "without" in learns else 0.1
        inject_adapter_in_model(LoraConfig(r=4, lora_dropout=dropout, target_modules=TARGETS), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name and precision == "bf16":
                parameter.data = parameter.data.float()


def _numbers(model: Any, precision: str) -> Numbers:
    stream = 4 if model.embed_tokens.weight.dtype == torch.float32 else 2
    return Numbers(4 if precision == "float32" else 2, precision == "bf16", stream, cuda=False)


def _forward(model: Any, micro: Micro, precision: str, numbers: Numbers) -> None:
    dtype = torch.float32 if numbers.stream == 4 else torch.bfloat16
    embeds = torch.randn(micro.rows, micro.length, SIZES["hidden_size"], dtype=dtype, requires_grad=True)
    mask = torch.ones(micro.rows, micro.length, dtype=torch.long)
    if micro.padded:
        mask[1, 5:] = 0
    context = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with context:
        model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)


def _expected(model: Any, micro: Micro, numbers: Numbers) -> int:
    layers = sum(activations.decoder_layer(layer, model.config, micro, numbers) for layer in model.layers)
    rotation = activations.rotation(model.config, micro, numbers)
    return layers + rotation + activations.norm(model.norm, micro.tokens, numbers)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_mining_keeps_what_the_formula_says(tiny: Any, model_dir: Path, precision: str) -> None:
    """Projector and uni-modules behind the towers' outputs; the copies of their weights under autocast are beside."""
    from pipelines.train.features import image_features

    model, _ = tiny.learning(model_dir, "align")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tokens, detail = torch.randn(3, 16, 32, dtype=dtype), torch.randn(3, 16, 16, 24, dtype=dtype)
    assert activations.positions(model.config) == 16
    context = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with context, Kept(model) as kept:
        image_features(model.model, (tokens, detail))
    numbers = Numbers(4 if precision == "float32" else 2, precision == "bf16", 4, cuda=False)
    expected = activations.mining(model.config, Micro(3, 0, 0, 3), numbers)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad) * 2 if numbers.autocast else 0
    assert expected <= kept.bytes <= expected + weights + 512
