"""Images per second of processor time on one thread: the engine, plain `generate`, and Data-Juicer's operator against
ours.

python tests/bench/bench_caption_engine_cpu.py [--images 192]

Processor time and not the clock's, so that a busy machine measures too; the best of two rounds. Without Ray: what Ray,
files and several processes add is `bench_caption_vs_datajuicer.py`'s business. The second model is the same with a
vocabulary of real size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_caption_vs_datajuicer import prepare

from pipelines.blip2.config import DecodingConfig
from pipelines.blip2.engine import BlipCaptioner
from pipelines.caption.config import CaptionConfig
from pipelines.images import decode
from pipelines.refine.operators import load_data_juicer
from pipelines.sample.world import MODELS

BATCHES = (8, 32, 64)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--operator-images", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        prepare(work, args.images)
        files = sorted((work / "images").iterdir())
        for model, name in ((MODELS / "blip2", "691 tokens"), (work / "blip2", "50,266 tokens")):
            for method in ("greedy", "sample"):
                compare(model, f"{name}, {method}", method, files)
        compare_operators(work / "blip2", files[: args.operator_images])


def compare(model: Path, name: str, method: str, files: list[Path]) -> None:
    """The engine against `generate` at several batch sizes."""
    decoding = DecodingConfig(method=method, top_k=50, top_p=1.0)
    engine = BlipCaptioner(model, CaptionConfig(max_new_tokens=64, batch_size=64, decoding=decoding))
    pixels = engine.preprocess([decode(file.read_bytes()) for file in files])
    ours = len(files) / _processor_seconds(lambda: engine.caption(pixels))
    theirs = {
        batch: len(files) / _processor_seconds(lambda batch=batch: _generate(engine, pixels, batch, method == "sample"))
        for batch in BATCHES
    }
    rates = ", ".join(f"{rate:.0f} at {batch}" for batch, rate in theirs.items())
    best = max(theirs.values())
    print(
        f"{name}: engine {ours:.0f} images/s, generate {rates}: {ours / best:.2f} times its best, "
        f"{ours / theirs[8]:.2f} times 8",
        flush=True,
    )


def _generate(engine: BlipCaptioner, pixels: np.ndarray, batch: int, sample: bool) -> None:
    options: dict[str, Any] = {"do_sample": True, "top_k": 50} if sample else {"do_sample": False}
    for first in range(0, len(pixels), batch):
        values = engine.normalize(torch.from_numpy(pixels[first : first + batch]))
        found = engine.model.generate(pixel_values=values, max_new_tokens=64, **options)
        engine.tokenizer.batch_decode(found, skip_special_tokens=True)


def compare_operators(model: Path, files: list[Path]) -> None:
    """Data-Juicer's operator and ours on one batch of samples, each with its defaults, files and text around it
    included.
    """
    operators = load_data_juicer()
    from pipelines.caption import datajuicer_op

    samples = {"text": ["<__dj__image> poor <|__dj__eoc|>"] * len(files), "images": [[str(file)] for file in files]}
    rates = {}
    for name in (datajuicer_op.OP_NAME, "image_captioning_mapper"):
        operator = operators[name](hf_img2seq=str(model), keep_original_sample=False)
        operator.process_batched({key: values[:2] for key, values in samples.items()})
        rates[name] = len(files) / _processor_seconds(lambda operator=operator: operator.process_batched(samples))
    ours, theirs = rates.values()
    print(f"operators: {ours:.0f} images/s against {theirs:.1f}: {ours / theirs:.1f} times")


def _processor_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(2):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
