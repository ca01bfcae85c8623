"""Triton kernels of the captioning engine, for CUDA: what torch does in several passes over memory, in one.

Each computes what the torch code beside its caller in `ops.py` computes, sums in float32, and rounds once where torch
rounds. Only rows of 16-bit floats that lie in memory one behind the other are taken.

Shape legend: B images, N prefix, G admitted rows, R rows of a step, S slots, L cache length, H heads, D head size,
M rows, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NONE, GELU, RELU = 0, 1, 2  # activations


def attend_step(
    qkv_R3HD: Tensor, cache_SL2HD: Tensor, positions_R: Tensor, scale: float, columns: int = 8, warps: int = 1
) -> Tensor:
    """One query a row against its own slot (R, H * D); its key and value are stored at its position on the way.

    A program is a row's head, and reads as many columns as the row has: no mask, nothing of longer neighbours. Captions
    are short, so rows times heads fill a GPU without splitting columns (Flash-Decoding, Dao et al. 2023) any further.
    """
    rows, _, heads, size = qkv_R3HD.shape
    assert qkv_R3HD.is_contiguous() and cache_SL2HD.is_contiguous()
    out_RW = qkv_R3HD.new_empty(rows, heads * size)
    _attend_step[(rows, heads)](
        qkv_R3HD, cache_SL2HD, positions_R, out_RW, scale, cache_SL2HD.stride(0), heads * size,
        D=size, WIDE=triton.next_power_of_2(size), COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return out_RW


@triton.jit
def _attend_step(
    qkv, cache, positions, out, scale, slot_stride, width,
    D: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    place = tl.arange(0, WIDE)
    inside = place < D
    fresh = qkv + row * 3 * width + head * D + place
    q = tl.load(fresh, mask=inside, other=0.0).to(tl.float32) * scale
    key = tl.load(fresh + width, mask=inside, other=0.0)
    value = tl.load(fresh + 2 * width, mask=inside, other=0.0)
    own = cache + row * slot_stride + head * D + place
    tl.store(own + position * 2 * width, key, mask=inside)
    tl.store(own + position * 2 * width + width, value, mask=inside)

    most = tl.sum(q * key.to(tl.float32), axis=0)
    weight = most * 0.0 + 1.0
    mixed = value.to(tl.float32)
    for first in range(0, position, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        seen = columns < position
        tile = own[None, :] + columns[:, None] * 2 * width
        mask = seen[:, None] & inside[None, :]
        keys = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(tile + width, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(keys * q[None, :], axis=1), float("-inf"))
        top = tl.maximum(most, tl.max(scores, axis=0))
        kept, shares = tl.exp(most - top), tl.exp(scores - top)
        weight = weight * kept + tl.sum(shares, axis=0)
        mixed = mixed * kept + tl.sum(values * shares[:, None], axis=0)
        most = top
    tl.store(out + row * width + head * D + place, (mixed / weight).to(out.dtype.element_ty), mask=inside)


def store_prefix(qkv_BN3HD: Tensor, cache_SL2HD: Tensor, source_G: Tensor, slots_G: Tensor) -> None:
    """Keys and values of image `source_G[g]` into slot `slots_G[g]`, in one pass."""
    _, length, _, heads, size = qkv_BN3HD.shape
    assert qkv_BN3HD.is_contiguous() and cache_SL2HD.is_contiguous()
    _store_prefix[(len(slots_G), length)](
        qkv_BN3HD, cache_SL2HD, source_G, slots_G, length, cache_SL2HD.stride(0), heads * size, BLOCK=1024
    )


@triton.jit
def _store_prefix(qkv, cache, source, slots, length, slot_stride, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1)
    taken = qkv + (tl.load(source + row) * length + column) * 3 * width + width
    given = cache + tl.load(slots + row) * slot_stride + column * 2 * width
    for first in range(0, 2 * width, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < 2 * width
        tl.store(given + place, tl.load(taken + place, mask=inside), mask=inside)


def add_norm(x_MW: Tensor, y_MW: Tensor, norm: Any, fp8: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x + y`, and its LayerNorm: in 16 bits, or (`fp8`) as float8_e4m3fn with a scale for every row (M, 1)."""
    assert x_MW.is_contiguous() and y_MW.is_contiguous()
    width = x_MW.shape[-1]
    total_MW = torch.empty_like(x_MW)
    normed_MW = torch.empty_like(x_MW, dtype=torch.float8_e4m3fn if fp8 else x_MW.dtype)
    rows = x_MW.numel() // width
    scales_M1 = x_MW.new_empty(rows if fp8 else 1, 1, dtype=torch.float32)
    _add_norm[(rows,)](
        x_MW, y_MW, norm.weight, norm.bias, total_MW, normed_MW, scales_M1, width, norm.eps,
        FP8=fp8, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return total_MW, normed_MW, scales_M1 if fp8 else None


@triton.jit
def _add_norm(
    x, y, weight, bias, total, normed, scales, width, eps, FP8: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    at = row * width + place
    both = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(y + at, mask=inside, other=0.0).to(
        tl.float32
    )
    rounded = both.to(total.dtype.element_ty)  # what the next layer adds to is what this one normalizes
    tl.store(total + at, rounded, mask=inside)
    values = rounded.to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values, axis=0) / width, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    scaled = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32) * centred * tl.rsqrt(variance + eps)
    result = scaled + tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    if FP8:
        scale = tl.maximum(tl.max(tl.abs(result), axis=0), 1e-12) / 448.0
        tl.store(scales + row, scale)
        result = result * (1.0 / scale)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


def quantize(x_MW: Tensor, activation: int = NONE) -> tuple[Tensor, Tensor]:
    """Rows, after an activation, as float8_e4m3fn and a scale for every row (M, 1): `activation(x) = q * scale`."""
    assert x_MW.is_contiguous()
    width = x_MW.shape[-1]
    rows = x_MW.numel() // width
    quantized_MW = torch.empty_like(x_MW, dtype=torch.float8_e4m3fn)
    scales_M1 = x_MW.new_empty(rows, 1, dtype=torch.float32)
    _quantize[(rows,)](
        x_MW, quantized_MW, scales_M1, width,
        ACTIVATION=activation, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return quantized_MW, scales_M1


@triton.jit
def _quantize(x, quantized, scales, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    values = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 1:  # the tanh form, as x * sigmoid(2 u): eight bits cannot tell, and erf would take twice as long
        inner = 1.5957691216057308 * values * (1.0 + 0.044715 * values * values)
        values = values / (1.0 + tl.exp(-inner))
    if ACTIVATION == 2:
        values = tl.maximum(values, 0.0)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    tl.store(quantized + row * width + place, (values * (1.0 / scale)).to(quantized.dtype.element_ty), mask=inside)


def _warps(width: int) -> int:
    """A thread holds some sixteen numbers."""
    return min(16, max(1, triton.next_power_of_2(width) // 512))
