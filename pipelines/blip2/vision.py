"""BLIP-2's vision tower over transformers' weights: the same layers, with what lies between their products in fewer
passes over memory.

Shape legend: B images, P patches and the class token, H heads, D head size, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.blip2.ops import Product, Rows, add_norm


class VisionTower:
    """A `Blip2VisionModel` as the engine runs it; on a CPU bit for bit what transformers computes.

    Args:
        model: `Blip2VisionModel`, in evaluation mode.
        fp8: the layers' products in float8.
    """

    def __init__(self, model: Any, fp8: bool = False) -> None:
        self._model, self._fp8 = model, fp8
        layers = model.encoder.layers
        self._layers = [_Layer(layer, fp8) for layer in layers]
        self._first = layers[0].layer_norm1
        # the norm behind each layer: the next one's first, or the tower's last
        self._behind = [layer.layer_norm1 for layer in layers[1:]] + [model.post_layernorm]

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalized pixels -> the last hidden states (B, P, d)."""
        x = self._model.embeddings(pixels_BCHW)
        h: Tensor | Rows = self._first(x)
        for layer, behind in zip(self._layers, self._behind, strict=True):
            last = behind is self._behind[-1]
            x, h = add_norm(x, layer.attend(h, x.shape[:2]), layer.norm, self._fp8)
            x, h = add_norm(x, layer.feed_forward(h), behind, self._fp8 and not last)
        assert isinstance(h, Tensor)
        return h


class _Layer:
    def __init__(self, layer: Any, fp8: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm = layer.layer_norm2
        self._heads, self._scale, self._activation = attention.num_heads, attention.scale, mlp.activation_fn
        self._qkv, self._projection = Product.of(attention.qkv, fp8), Product.of(attention.projection, fp8)
        self._fc1, self._fc2 = Product.of(mlp.fc1, fp8), Product.of(mlp.fc2, fp8)

    def attend(self, h: Tensor | Rows, shape: torch.Size) -> Tensor:
        qkv = self._qkv(h).view(*shape, 3, self._heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v, scale=self._scale)
        return self._projection(attended.transpose(1, 2).reshape(*shape, -1))

    def feed_forward(self, h: Tensor | Rows) -> Tensor:
        return self._fc2(self._fc1.activated(h, self._activation))
