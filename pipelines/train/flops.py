"""Arithmetic that training has to do, from shapes, and which share of a card's peak it makes (MFU).

Model FLOPs, as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): matrix products, convolutions and
attention, two for a multiplication with its addition, attention over whole squares. What checkpointing computes again
is not counted: it is no work that training needs.

    language model: forward, as much again for the gradients of its inputs, and again for every weight that learns;
        attention three times its forward pass, because both factors of its products have gradients
    projector and mining: three times their forward pass (their inputs have no gradient, which is little of it)
    towers: forward only, of the images that are not in the feature cache
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipelines.mgm.configuration import MGMConfig
from pipelines.train.activations import positions
from pipelines.train.step import Counts

PEAKS = (
    ("H100 PCIe", 756e12), ("H200", 989e12), ("H100", 989e12), ("B200", 2250e12), ("A100", 312e12), ("L40S", 362e12),
    ("L4", 121e12), ("A10G", 70e12), ("A10", 125e12), ("RTX 4090", 165e12), ("RTX 3090", 71e12),
)  # fmt: skip
"""bf16 products a second without sparsity, by NVIDIA's data sheets; the first name that a card's contains counts."""


def step_flops(model: Any, counts: Counts) -> float:
    """Of everything that `counts` say was trained on.

    Args:
        model: the `MGMForConditionalGeneration` that learns, on any device.
    """
    config: MGMConfig = model.config
    text, layers = config.text_config, model.model.language_model.layers
    frozen, learning = _weights(layers, text)
    squares = counts.tokens**2 / max(counts.samples, 1)  # rows as long as their mean
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 4 * squares * text.num_attention_heads * width * text.num_hidden_layers
    head = 2 * counts.targets * model.lm_head.weight.shape[0] * text.hidden_size
    language = 2 * (2 * counts.tokens * (frozen + learning) + head) + 2 * counts.tokens * learning + 3 * attention
    language += head * model.lm_head.weight.requires_grad
    return language + 3 * counts.images * _mining(config) + counts.encoded * towers(config)


def _weights(layers: nn.Module, text: Any) -> tuple[float, float]:
    """Frozen weights that a token meets in the decoder layers, and those that learn."""
    found = [0.0, 0.0]
    for name, parameter in layers.named_parameters():
        if parameter.ndim >= 2:
            met = text.num_experts_per_tok / text.num_local_experts if ".experts." in name else 1.0
            size = getattr(parameter, "ds_numel", parameter.numel())
            packed = 2 if parameter.dtype == torch.uint8 else 1  # two of bitsandbytes' 4-bit weights a byte
            found[parameter.requires_grad] += met * size * packed
    return found[0], found[1]


def _mining(config: MGMConfig) -> float:
    """Patch info mining, folded, and the projector, forward, of one image."""
    clip, widths, text = config.vision_config.hidden_size, _widths(config), config.text_config.hidden_size
    token = clip * clip + 2 * clip * widths + 2 * positions(config) * widths
    if config.mm_projector_type.startswith("mlp"):
        token += clip * text + (int(config.mm_projector_type[3]) - 1) * text * text
    elif config.mm_projector_type == "linear":
        token += clip * text
    return 2.0 * config.num_image_tokens * token


def _widths(config: MGMConfig) -> int:
    return int(sum(config.vision_config_aux.hidden_sizes))


def towers(config: MGMConfig) -> float:
    """Both towers, forward, of one image."""
    clip, aux = config.vision_config, config.vision_config_aux
    tokens = config.patches_per_side**2 + 1
    select = config.vision_select_layer
    layers = select if select >= 0 else clip.num_hidden_layers + 1 + select
    weights = 4 * clip.hidden_size**2 + 2 * clip.hidden_size * clip.intermediate_size
    views = layers * (2 * tokens * weights + 4 * tokens**2 * clip.hidden_size)
    views += 2 * (tokens - 1) * 3 * clip.patch_size**2 * clip.hidden_size
    side, before, maps = config.image_size_aux // aux.patch_size, 0, 0
    for stage, (width, depth) in enumerate(zip(aux.hidden_sizes, aux.depths, strict=True)):
        here = (side >> stage) ** 2
        smaller = 4 * before * width if stage else 3 * aux.patch_size**2 * width
        maps += 2 * here * (smaller + depth * (8 * width**2 + 49 * width))
        before = width
    return float(config.num_views * views + maps)


def peak_flops(device: torch.device) -> float | None:
    """bf16 products a second of the card; None for a CPU, and for a card that is not in `PEAKS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS if known in name), None)
