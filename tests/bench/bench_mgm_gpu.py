"""MGM-2B's true geometry with random weights on one GPU: questions a second, share of the matrix peak, peak memory.

python tests/bench/bench_mgm_gpu.py [--batches 1 16 64] [--static] [--attention flash_attention_2] [--json FILE]
python tests/bench/bench_mgm_gpu.py --tiny   # the same code on a CPU, in seconds; its numbers mean nothing

A question is what TextVQA asks: one image of 768 pixels (uint8, in pinned host memory), 100 text tokens, 8 new tokens,
all of them generated. The matrix peak is measured on the same card by one large product. Arithmetic is counted, not
estimated (torch's FlopCounterMode: matrix products, convolutions and attention). Needs torch and transformers only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # the repository: on a bare GPU machine nothing is installed

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from pipelines.mgm import register
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.image_processing import MGMImageProcessor

TINY = {
    "text_config": {
        "model_type": "gemma",
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    },
    "vision_config_aux": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "image_token_id": 500,
    "image_size_aux": 128,
}


class Clock:
    """Seconds of device work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Wait for what was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median(self, work: Callable[[], object], rounds: int) -> float:
        """The median of `rounds` runs, after the caller warmed up."""
        seconds = []
        for _ in range(rounds):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


def matrix_peak(clock: Clock, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of one square product of `size`, the fastest of ten."""
    a = torch.randn(size, size, device=clock.device).to(dtype)
    b = torch.randn(size, size, device=clock.device).to(dtype)
    for _ in range(3):
        a @ b
    return 2 * size**3 / min(clock.median(lambda: a @ b, 1) for _ in range(10))


class Bench:
    """The model, and one batch of questions at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device("cpu" if args.tiny else "cuda")
        self.dtype = torch.float32 if args.tiny else torch.bfloat16
        self.new, self.static, self.text = args.new_tokens, args.static, args.text_tokens
        register()
        torch.manual_seed(0)
        config = MGMConfig(**(TINY if args.tiny else {}))  # the defaults are MGM-2B's geometry
        with self.device:
            self.model: Any = AutoModelForImageTextToText.from_config(
                config, dtype=self.dtype, attn_implementation=args.attention
            )
        self.model.eval().requires_grad_(False)
        self.model.generation_config.eos_token_id = None  # random weights may end anywhere; every answer is full length
        self.model.generation_config.pad_token_id = 0
        self.processor = MGMImageProcessor.from_config(config)
        self.clock = Clock(self.device)

    def questions(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (batch, tokens) on the device, and pixels (batch, 3, S, S) uint8 on the host."""
        config, half = self.model.config, self.text // 2
        generator = torch.Generator().manual_seed(batch)
        text = torch.randint(3, config.text_config.vocab_size, (batch, self.text), generator=generator)
        image = torch.full((batch, config.num_image_tokens), config.image_token_id)
        ids = torch.cat([text[:, :half], image, text[:, half:]], dim=1)
        side = config.image_size_aux
        pixels = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
        return ids.to(self.device), pixels.pin_memory() if self.device.type == "cuda" else pixels

    def pixels(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Normalized on the device."""
        views, aux = self.processor.normalize(pixels.to(self.device, non_blocking=True))
        return {"pixel_values": views, "pixel_values_aux": aux}

    def answer(self, ids: torch.Tensor, pixels: torch.Tensor, new: int, static: bool) -> torch.Tensor:
        """Pixels and prompts to (batch, tokens + new)."""
        cache = {"cache_implementation": "static"} if static else {}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.pixels(pixels)}
        return self.model.generate(**inputs, **cache, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    def measure(self, batch: int, rounds: int, peak: float) -> dict[str, float]:
        """One row of the table."""
        ids, pixels = self.questions(batch)
        with FlopCounterMode(display=False) as counter:
            out = self.answer(ids, pixels, self.new, static=False)  # compiled code hides its arithmetic
        assert out.shape == (batch, ids.shape[1] + self.new)
        for new in (self.new, self.new, 1):  # warm up, or compile
            self.answer(ids, pixels, new, self.static)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        whole = self.clock.median(lambda: self.answer(ids, pixels, self.new, self.static), rounds)
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        images = self.clock.median(lambda: self.model.get_image_features(**self.pixels(pixels)), rounds)
        first = self.clock.median(lambda: self.answer(ids, pixels, 1, self.static), rounds)
        return {
            "batch": batch,
            "questions_per_second": batch / whole,
            "seconds": whole,
            "seconds_images": images,
            "seconds_prefill": max(first - images, 0.0),
            "seconds_decode": max(whole - first, 0.0),
            "tflop_per_question": counter.get_total_flops() / batch / 1e12,
            "share_of_matrix_peak": counter.get_total_flops() / whole / peak,
            "peak_memory_gib": memory / 2**30,
        }


@torch.no_grad()
def main() -> None:
    """Print a line for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--text-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--static", action="store_true", help="static cache, whose decode step transformers compiles")
    parser.add_argument("--attention", default="sdpa", help="sdpa, eager or flash_attention_2")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try this script")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --tiny runs on a CPU")
    bench = Bench(args)
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    peak = matrix_peak(bench.clock, bench.dtype, 256 if args.tiny else 8192)
    parameters = sum(p.numel() for p in bench.model.parameters()) / 1e9
    print(f"{name}, torch {torch.__version__}: {parameters:.2f}B parameters, matrix peak {peak / 1e12:.1f} TFLOP/s")
    print("batch  questions/s  images s  prefill s  decode s  TFLOP/question  of peak  memory GiB")
    rows = []
    for batch in args.batches:
        try:
            row = bench.measure(batch, args.rounds, peak)
        except torch.OutOfMemoryError:
            print(f"{batch:5d}  out of memory")
            torch.cuda.empty_cache()
            continue
        rows.append(row)
        print(
            f"{batch:5d}  {row['questions_per_second']:11.2f}  {row['seconds_images']:8.4f}  "
            f"{row['seconds_prefill']:9.4f}"
            f"  {row['seconds_decode']:8.4f}  {row['tflop_per_question']:14.3f}  {row['share_of_matrix_peak']:7.1%}"
            f"  {row['peak_memory_gib']:10.1f}"
        )
    if args.json:
        facts = {"device": name, "torch": torch.__version__, "matrix_peak_tflops": peak / 1e12, "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
