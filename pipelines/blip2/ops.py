"""What the layers of towers and language model are made of, each as one call.

Plain torch defines it, and runs on any device and dtype. 16-bit floats on CUDA take the Triton kernels in `kernels.py`
and the epilogues of cuBLAS instead, which pass over memory fewer times; they differ in the last bits.

Shape legend: M rows, K and W widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation

_E4M3_MOST = 448.0  # the largest number of float8_e4m3fn


class Rows(NamedTuple):
    """Quantized activations: `values * scale_M1` is what they stand for.

    Attributes:
        values: float8_e4m3fn (..., K).
        scale_M1: float32, one for every row.
    """

    values: Tensor
    scale_M1: Tensor


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels in `kernels.py` take it."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def add_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm, fp8: bool = False) -> tuple[Tensor, Tensor | Rows]:
    """`x + y` and its LayerNorm, quantized where a product in float8 comes next."""
    if has_kernels(x):
        from pipelines.blip2 import kernels

        total, normed, scale = kernels.add_norm(x, y, norm, fp8)
        return total, normed if scale is None else Rows(normed, scale)
    total = x + y
    return total, quantize(norm(total)) if fp8 else norm(total)


def quantize(x: Tensor, activation: nn.Module | None = None) -> Rows:
    """Rows of `activation(x)` in float8, each scaled to its own largest number."""
    if has_kernels(x):
        from pipelines.blip2 import kernels

        return Rows(*kernels.quantize(x, _kind(activation)))
    wide = (x if activation is None else activation(x)).float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _E4M3_MOST
    return Rows((wide / scale).to(torch.float8_e4m3fn), scale.view(-1, 1))


class Product:
    """A linear layer: a product with its weights, with or without the activation behind it.

    Args:
        weight: (W, K).
        bias: (W,), or None.
        fp8: products in float8_e4m3fn, row-wise scales on both sides; sums and results stay as they are. The weights
            are kept a second time, in 8 bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, fp8: bool = False) -> None:
        self._weight, self._bias, self._fp8 = weight, bias, fp8
        if fp8:
            quantized = quantize(weight.detach())
            self._weight, self._scale_1W = quantized.values, quantized.scale_M1.t()

    @classmethod
    def of(cls, layer: nn.Linear, fp8: bool = False) -> Product:
        """The product of a layer."""
        return cls(layer.weight, layer.bias, fp8)

    def __call__(self, x: Tensor | Rows) -> Tensor:
        """(..., K) -> (..., W)."""
        if self._fp8:
            return self._in_fp8(x if isinstance(x, Rows) else quantize(x))
        assert isinstance(x, Tensor)
        return F.linear(x, self._weight, self._bias)

    def activated(self, x: Tensor | Rows, activation: nn.Module) -> Tensor | Rows:
        """The same and the activation; quantized where the product is."""
        if self._fp8:
            return quantize(self(x), activation)
        assert isinstance(x, Tensor)
        if not has_kernels(x) or self._bias is None or not isinstance(activation, (GELUActivation, nn.ReLU)):
            return activation(self(x))
        # cuBLAS activates while the result is still in registers; its GELU is the tanh form, nearer than bfloat16 tells
        gelu = isinstance(activation, GELUActivation)
        flat = torch._addmm_activation(self._bias, x.flatten(0, -2), self._weight.t(), use_gelu=gelu)
        return flat.view(*x.shape[:-1], -1)

    def _in_fp8(self, x: Rows) -> Tensor:
        rows = x.values.flatten(0, -2)
        if rows.is_cuda:
            rows, scale_M1 = _enough(rows, x.scale_M1)
            flat = torch._scaled_mm(
                rows, self._weight.t(), scale_M1, self._scale_1W, bias=self._bias, out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )[: len(x.scale_M1)]  # fmt: skip
        else:
            flat = ((rows.float() * x.scale_M1) @ (self._weight.float() * self._scale_1W.t()).t()).to(torch.bfloat16)
            flat = flat if self._bias is None else flat + self._bias
        return flat.view(*x.values.shape[:-1], -1)


def _enough(rows: Tensor, scale_M1: Tensor) -> tuple[Tensor, Tensor]:
    """As many rows as cuBLAS takes in float8 at any width, with zeros where there are none. Up to 256 cost what one
    does: reading the weights.
    """
    lacking = max(256 - len(rows), -len(rows) % 64)
    if not lacking:
        return rows, scale_M1
    more = rows.view(torch.uint8).new_zeros(lacking, rows.shape[1])
    return torch.cat([rows.view(torch.uint8), more]).view(rows.dtype), F.pad(scale_M1, (0, 0, 0, lacking))


def _kind(activation: nn.Module | None) -> int:
    from pipelines.blip2 import kernels

    if activation is None:
        return kernels.NONE
    assert isinstance(activation, (GELUActivation, nn.ReLU)), f"no kernel has {activation}"
    return kernels.GELU if isinstance(activation, GELUActivation) else kernels.RELU
