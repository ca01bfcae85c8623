"""What the card can do at most: products, and bytes moved."""

from __future__ import annotations

import torch

from .run import Run


def ceilings(run: Run) -> None:
    """Large square products in 16 and in 8 bits, a copy inside the device, copies to it."""
    side, cuda = (256, False) if run.tiny else (8192, True)
    a, b = (torch.randn(side, side, device=run.device).to(run.dtype) for _ in range(2))
    run.peak_flops = 2 * side**3 / run.median(lambda: a @ b, 10, 3)
    source = torch.empty((1 << 20) if run.tiny else (4 << 30), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copied = run.median(lambda: target.copy_(source))
    eight = None
    if cuda:
        x, w = a.to(torch.float8_e4m3fn), b.t().contiguous().t().to(torch.float8_e4m3fn)
        ones, row = torch.ones(side, 1, device=run.device), torch.ones(1, side, device=run.device)
        product = lambda: torch._scaled_mm(x, w, ones, row, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
        eight = 2 * side**3 / run.median(product, 10, 3) / 1e12
    run.note(
        "ceilings",
        card=torch.cuda.get_device_name() if cuda else "CPU",
        torch=torch.__version__,
        tflops=run.peak_flops / 1e12,
        fp8_rowwise_tflops=eight,
        copy_tb_s=2 * source.numel() / copied / 1e12,
    )
