"""Images to model inputs at MGM-2B's size: one call for all against the original's loop, and the half that is left to
the CPU.

python tests/bench/bench_mgm_preprocess.py [--images 16] [--threads 2]

The loop is the original's data loader: pad, transformers' CLIP processor at 768 pixels, float32 downscale, image by
image. Where a GPU runs the model, only `resize` stays on the CPU, and an image travels as bytes: a quarter of float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessorPil

from pipelines.mgm.image_processing import MGMImageProcessor

SIDE, SMALL = 768, 336


def original(images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's way, one image after another."""
    clip = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    small, large = [], []
    for image in images:
        longer = max(image.size)
        canvas = Image.new("RGB", (longer, longer), (122, 116, 104))
        canvas.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        large.append(clip(canvas, return_tensors="pt")["pixel_values"][0])
        small.append(F.interpolate(large[-1][None], size=[SMALL, SMALL], mode="bilinear", align_corners=False)[0])
    return torch.stack(small), torch.stack(large)


def main() -> None:
    """Print two lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    sizes = [(1024, 683), (640, 480), (480, 640), (1024, 768)]  # TextVQA's are about 1024 pixels wide
    images = [
        Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize((width, height))
        for width, height in (sizes[number % len(sizes)] for number in range(args.images))
    ]
    processor = MGMImageProcessor()
    ours, theirs = processor(images), original(images)
    torch.testing.assert_close(ours["pixel_values"], theirs[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours["pixel_values_aux"], theirs[1], atol=1e-6, rtol=0)

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    rounds = [
        (
            seconds(lambda: original(images)),
            seconds(lambda: processor(images)),
            seconds(lambda: processor.resize(images)),
        )
        for _ in range(args.rounds)
    ]
    loop, call, resize = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b, _ in rounds)
    print(
        f"{args.images} images: loop {loop:.3f} s, one call {call:.3f} s: {ratio:.1f} times as fast "
        f"({args.threads} threads)"
    )
    print(f"of it for CPU workers when the model is on a GPU: {resize:.3f} s ({args.images / resize:.0f} images/s)")


if __name__ == "__main__":
    main()
