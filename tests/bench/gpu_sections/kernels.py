"""The engine's Triton kernels: each against float64, then against what torch has for the same work."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .run import Run, agreement


@torch.inference_mode()
def kernels(run: Run) -> None:
    """At the sizes of a step of 256 rows, of a tower over 64 images and of a prefill of 64."""
    if run.device.type != "cuda":
        run.note("kernels", skipped="Triton needs a GPU")
        return
    _attention(run)
    _norm(run, 64 * 257, 1408)
    _norm(run, 256, 2560)
    _activation(run, 64 * 257, 1408, 6144)
    _prefix(run)


def _attention(run: Run) -> None:
    from pipelines.blip2 import kernels

    rows, heads, size, length = 256, 32, 80, 64
    caches = [_noise(run, rows, length, 2, heads, size) for _ in range(8)]  # 670 MB: not what the cache holds
    qkv, scale = _noise(run, rows, 3, heads, size), size**-0.5
    positions = torch.randint(32, 53, (rows,), device=run.device)
    steps, seen = torch.arange(rows, device=run.device), torch.arange(length, device=run.device)

    def by_torch(cache: Tensor, query: Tensor) -> Tensor:
        cache[steps, positions] = query[:, 1:].to(cache.dtype)
        k, v = cache.permute(2, 0, 3, 1, 4).unbind()
        mask = torch.where(seen <= positions[:, None], 0.0, float("-inf")).to(query.dtype)[:, None, None]
        return F.scaled_dot_product_attention(query[:, 0, :, None], k, v, attn_mask=mask, scale=scale).flatten(1)

    wanted = by_torch(caches[0].double(), qkv.double())
    got = kernels.attend_step(qkv, caches[0], positions, scale)
    run.note(
        "kernels.attend_step.equal", kernel=agreement(got, wanted), torch=agreement(by_torch(caches[0], qkv), wanted)
    )
    moved = 2 * 2 * heads * size * int(positions.sum() + rows)
    for columns, warps in ((8, 1), (4, 1), (16, 1), (64, 2)):

        def ours(columns: int = columns, warps: int = warps) -> None:
            for cache in caches:
                kernels.attend_step(qkv, cache, positions, scale, columns, warps)

        seconds = _replayed(run, ours) / len(caches)
        run.note("kernels.attend_step", columns=columns, warps=warps, us=1e6 * seconds, tb_s=moved / seconds / 1e12)
    seconds = _replayed(run, lambda: [by_torch(cache, qkv) for cache in caches]) / len(caches)
    run.note("kernels.attend_step by torch", us=1e6 * seconds)


def _norm(run: Run, rows: int, width: int) -> None:
    from pipelines.blip2 import kernels

    x, y, norm = _noise(run, rows, width), _noise(run, rows, width), nn.LayerNorm(width, device=run.device)
    norm = norm.to(run.dtype)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    total, normed, _ = kernels.add_norm(x, y, norm, False)
    eight, scales = kernels.add_norm(x, y, norm, True)[1:]
    assert torch.equal(total, x + y)
    wanted = F.layer_norm(total.double(), (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    run.note(
        "kernels.add_norm",
        rows=rows,
        width=width,
        kernel=agreement(normed, wanted),
        torch=agreement(norm(x + y), wanted),
        fp8=agreement(eight.float() * scales, wanted),
        us=1e6 * _replayed(run, lambda: kernels.add_norm(x, y, norm, False)),
        us_fp8=1e6 * _replayed(run, lambda: kernels.add_norm(x, y, norm, True)),
        us_torch=1e6 * _replayed(run, lambda: norm(x + y)),
    )


def _activation(run: Run, rows: int, width: int, inner: int) -> None:
    from pipelines.blip2 import kernels

    x, weight, bias = _noise(run, rows, width), 0.03 * _noise(run, inner, width), _noise(run, inner)
    plain = F.linear(x, weight, bias)
    wanted = F.gelu(F.linear(x[:256].double(), weight.double(), bias.double()))
    epilogue = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    eight, scales = kernels.quantize(plain, kernels.GELU)
    run.note(
        "kernels.gelu",
        epilogue=agreement(epilogue[:256], wanted),
        torch=agreement(F.gelu(plain)[:256], wanted),
        fp8=agreement(eight[:256].float() * scales[:256], wanted),
        us_product=1e6 * _replayed(run, lambda: F.linear(x, weight, bias)),
        us_epilogue=1e6 * _replayed(run, lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True)),
        us_gelu=1e6 * _replayed(run, lambda: F.gelu(plain)),
        us_gelu_to_fp8=1e6 * _replayed(run, lambda: kernels.quantize(plain, kernels.GELU)),
    )


def _prefix(run: Run) -> None:
    from pipelines.blip2 import kernels

    qkv, cache = _noise(run, 64, 33, 3, 32, 80), torch.zeros(256, 64, 2, 32, 80, device=run.device, dtype=run.dtype)
    source, slots = torch.arange(64, device=run.device), torch.randperm(256, device=run.device)[:64]
    other = cache.clone()
    kernels.store_prefix(qkv, cache, source, slots)

    def by_torch() -> None:
        other[slots, :33] = qkv[source, :, 1:]

    by_torch()
    assert torch.equal(cache, other)
    ours = _replayed(run, lambda: kernels.store_prefix(qkv, cache, source, slots))
    run.note("kernels.store_prefix", equal=True, us=1e6 * ours, us_torch=1e6 * _replayed(run, by_torch))


def _noise(run: Run, *shape: int) -> Tensor:
    return torch.randn(shape, device=run.device).to(run.dtype)


def _replayed(run: Run, work: Callable[[], object]) -> float:
    """Seconds of one replay of ten, captured: launches cost nothing."""
    work()
    run.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            work()
    return run.median(graph.replay, 5, 2) / 10
