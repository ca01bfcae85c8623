"""What one CPU decodes for a captioning replica: JPEG bytes to 224 x 224 pixels, the numbers behind `FEEDER_CPUS` in
k8s/needs.py.

`python tests/bench/bench_decode.py` prints images per second of CPU time (so that a busy machine does not change it),
by size of the picture, with torch's resize and with Pillow's; and the milliseconds of the resize alone.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageFilter

from pipelines.blip2.pixels import RESIZES, PixelSpec
from pipelines.images import decode

SPECS = {
    name: PixelSpec(224, 224, Image.Resampling.BICUBIC, 1 / 255, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), name)
    for name in RESIZES
}


def picture(width: int, height: int) -> bytes:
    """A JPEG about as hard to decode as a photograph: coarse shapes with fine noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).filter(ImageFilter.GaussianBlur(1))
    out = io.BytesIO()
    Image.blend(coarse, noise, 0.2).save(out, "JPEG", quality=88)
    return out.getvalue()


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call: the median of five rounds of twenty."""
    times = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(20):
            work()
        times.append((time.process_time() - started) / 20)
    return sorted(times)[2]


def main() -> None:
    """One line per size."""
    torch.set_num_threads(1)
    for width, height in ((320, 240), (640, 480), (1024, 768), (2048, 1536)):
        data, told = picture(width, height), []
        for name, spec in SPECS.items():
            decoded = decode(data, max_side=spec.draft_side)
            alone = seconds(partial(spec.pixels, decoded))
            whole = alone + seconds(partial(decode, data, max_side=spec.draft_side))
            told.append(f"{name} {1 / whole:5.0f} images/s of one CPU, resize {1e3 * alone:5.2f} ms")
        print(f"{width:>5} x {height:<5} {len(data) / 1024:5.0f} KiB  {';  '.join(told)}")


if __name__ == "__main__":
    main()
