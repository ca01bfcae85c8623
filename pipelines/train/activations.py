"""Bytes that a forward pass leaves to the backward pass, operation by operation, from shapes alone.

Each function adds up the tensors that autograd keeps (of views, the storage; of parameters, nothing). What is counted
is what eager PyTorch keeps; a compiler keeps no more. Shapes: N tokens, D the language model's width, I its MLP's, V
visual tokens, C CLIP's width, A ConvNeXt's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipelines.mgm.configuration import MGMConfig

_HALF, _FULL, _INDEX = 2, 4, 8
"""Bytes of a bfloat16, a float32, an int64."""


@dataclass(frozen=True)
class Micro:
    """A micro-batch.

    Attributes:
        rows: in it.
        length: tokens of the longest row, visual ones included.
        targets: tokens of all rows that the loss sees.
        images: of all rows.
        encoded: the images go through the towers, and do not come from the feature cache.
        padded: the rows are of unequal length, so that attention needs a mask.
    """

    rows: int
    length: int
    targets: int
    images: int
    encoded: bool = True
    padded: bool = True

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Numbers:
    """How a step computes.

    Attributes:
        compute: bytes of an activation: 2 (bf16) or 4.
        autocast: weights are cast where they are used (ddp in bf16); without it the model itself was cast.
        stream: bytes of a number of the residual stream: as the embedding's weights are, if they are not cast.
        cuda: on a card, where dropout keeps its mask as bytes and LayerNorm computes in float32 under autocast.
    """

    compute: int
    autocast: bool
    stream: int
    cuda: bool = True


def decoder_layer(layer: Any, config: Any, micro: Micro, numbers: Numbers) -> int:
    """Saved by a layer of Gemma, Llama or Mixtral that learns by any of LoRA's kind, in full or not at all.

    Args:
        layer: on any device, `meta` too; PEFT may have wrapped its linear layers.
        config: the language model's.
    """
    attention, tokens = layer.self_attn, micro.tokens
    saved = sum(norm(each, tokens, numbers) for each in (layer.input_layernorm, layer.post_attention_layernorm))
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
    saved += linears(inputs, tokens, numbers, from_stream=True) + sdpa(config, micro, numbers)
    saved += linears([attention.o_proj], tokens, numbers, kept=True)
    if not hasattr(layer.mlp, "gate_proj"):
        return saved + experts(config, layer.mlp.gate.weight, tokens, numbers)
    # Kept: the gate before its activation, and both factors of the product.
    saved += 3 * tokens * config.intermediate_size * numbers.compute
    saved += linears([layer.mlp.gate_proj, layer.mlp.up_proj], tokens, numbers, from_stream=True)
    return saved + linears([layer.mlp.down_proj], tokens, numbers)


def norm(module: Any, tokens: int, numbers: Numbers) -> int:
    """RMSNorm in float32: its input, the inverse root and, of Gemma, 1 + weight."""
    width, gemma = module.weight.numel(), "Gemma" in type(module).__name__
    saved = tokens * (width + 1) * _FULL + gemma * width * _FULL
    if module.weight.requires_grad:
        saved += tokens * width * (_FULL if gemma else numbers.stream)
    return saved


def linears(modules: list[Any], tokens: int, numbers: Numbers, *, from_stream: bool = False, kept: bool = False) -> int:
    """Linear layers with one input.

    Args:
        from_stream: the input has the residual stream's dtype.
        kept: something else keeps the input anyway.
    """
    saved, raw = 0, False
    width = getattr(modules[0], "base_layer", modules[0]).in_features
    casts = numbers.autocast and from_stream and numbers.stream == _FULL  # a copy for each layer
    for module in modules:
        base = getattr(module, "base_layer", module)
        if numbers.autocast and base.weight.dtype == torch.float32:
            saved += base.weight.numel() * _HALF
        if base.weight.requires_grad:
            saved, raw = saved + casts * tokens * width * _HALF, raw or not casts
        if hasattr(module, "lora_A"):
            own = _lora(module, tokens, numbers)
            saved += own
            raw = raw or not (_dropout(module) or numbers.autocast)
    return saved + (raw and not kept) * tokens * width * numbers.compute


def _lora(module: Any, tokens: int, numbers: Numbers) -> int:
    """The adapter of a linear layer: PEFT hands it its input in the adapter's own float32."""
    first, second = (_weight(module.lora_A), _weight(module.lora_B))
    rank, width = first.shape
    saved = tokens * rank * numbers.compute
    if _dropout(module):
        saved += tokens * width * (1 if numbers.cuda else _FULL if numbers.autocast else numbers.compute)
    if _dropout(module) or numbers.autocast:
        saved += tokens * width * numbers.compute
    if numbers.autocast:
        saved += (first.numel() + second.numel()) * _HALF
    if getattr(module, "lora_magnitude_vector", None):  # DoRA scales both outputs by numbers that learn
        saved += 2 * tokens * second.shape[0] * numbers.compute
    return saved


def _weight(parts: Any) -> torch.Tensor:
    """Of LoRA a linear layer, of AdaLoRA the matrix itself."""
    part = next(iter(parts.values()))
    return part if isinstance(part, torch.Tensor) else part.weight


def _dropout(module: Any) -> float:
    return float(getattr(next(iter(module.lora_dropout.values())), "p", 0.0))


def sdpa(config: Any, micro: Micro, numbers: Numbers) -> int:
    """Fused attention: queries, keys, values, output and the logarithms of the softmax's sums; never the scores."""
    heads, pairs = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    # With a mask keys and values are repeated for all heads, by a view where there is one of them; which becomes a copy
    # where rotated keys are float32 and autocast has to cast them.
    values = heads if micro.padded and pairs > 1 else pairs
    keys = heads if micro.padded and numbers.autocast and numbers.stream == _FULL else values
    saved = micro.tokens * ((2 * heads + keys + values) * width * numbers.compute + heads * _FULL)
    return saved + micro.padded * micro.rows * micro.length**2 * numbers.compute


def experts(config: Any, router: torch.Tensor, tokens: int, numbers: Numbers) -> int:
    """Mixtral's frozen experts: a token goes through some of them; the router's scores and orders."""
    count, taken = config.num_local_experts, tokens * config.num_experts_per_tok
    saved = tokens * (count + 1) * _FULL + taken * (2 * _FULL + 4 * _INDEX) + count * _FULL
    if numbers.autocast and router.dtype == torch.float32:
        saved += router.numel() * _HALF
    # Their product is none of those that autocast casts.
    return saved + taken * (3 * config.intermediate_size + config.hidden_size) * numbers.stream


def rotation(config: Any, micro: Micro, numbers: Numbers) -> int:
    """Sine and cosine of the positions, one for all layers."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * micro.length * width * numbers.stream


def mining(config: MGMConfig, micro: Micro, numbers: Numbers) -> int:
    """Patch info mining and projector on the towers' outputs, which stay, too; all of them learn."""
    tokens, compute = micro.images * config.num_image_tokens, numbers.compute
    clip, text = config.vision_config.hidden_size, config.text_config.hidden_size
    widths = sum(config.vision_config_aux.hidden_sizes)
    hidden = 2 * text * max(0, _projector_depth(config) - 1)
    saved = tokens * (4 * clip + 3 * widths + 2 * positions(config) + hidden) * compute + tokens * 2 * _FULL
    if numbers.autocast and numbers.cuda:
        saved += tokens * clip * _FULL
    return saved + micro.images * detail(config) * compute


def _projector_depth(config: MGMConfig) -> int:
    return int(config.mm_projector_type.removeprefix("mlp")[0]) if config.mm_projector_type.startswith("mlp") else 1


def positions(config: MGMConfig) -> int:
    """ConvNeXt positions that one visual token looks at."""
    side = config.image_size_aux // config.vision_config_aux.patch_size
    return int((side // (config.image_grid * config.patches_per_side)) ** 2)


def detail(config: MGMConfig) -> int:
    """Numbers of an image's high-resolution features as mining sees them."""
    return int(config.num_image_tokens * positions(config) * sum(config.vision_config_aux.hidden_sizes))


def towers(config: MGMConfig, micro: Micro, numbers: Numbers) -> int:
    """Most that is alive while the frozen towers encode the images; nothing of it is kept but their outputs.

    On a card under autocast the half of mining's LayerNorm that has no parameters is the largest: features in bf16,
    their float32 copy, and the float32 result. Elsewhere it is two copies, and the maps while they are put together.
    """
    numbers_of_image, compute = detail(config), numbers.compute
    aux, side = config.vision_config_aux, config.image_size_aux // config.vision_config_aux.patch_size
    autocast = numbers.autocast and numbers.cuda
    mined = numbers_of_image * (_HALF + 2 * _FULL if autocast else 2 * compute)
    maps = sum(width * (side >> stage) ** 2 for stage, width in enumerate(aux.hidden_sizes))
    joined = (maps + (2 * sum(aux.hidden_sizes) - aux.hidden_sizes[0]) * side**2) * compute
    pixels = 3 * config.image_size_aux**2 * (1 + _FULL)
    pixels += config.num_views * 3 * config.vision_config.image_size**2 * _FULL
    tokens = config.num_image_tokens * config.vision_config.hidden_size * compute
    return micro.images * (max(mined, joined) + pixels + tokens)
