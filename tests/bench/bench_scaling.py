"""From costs to a plan: GPUs, hours, bytes and memory for a million, ten million and a billion images; k8s/SCALING.md
explains the columns.

`python tests/bench/bench_scaling.py` measures what can be measured without a GPU (checkpoint ids in memory, in Ray
Data's own representation) and computes the rest from the constants below, each with its source.
"""

from __future__ import annotations

import time

import numpy as np
import psutil
import pyarrow as pa

# Captioning. FLOP of BLIP-2 OPT-2.7B on a 224 x 224 image with a caption of 20 tokens, by adding up its layers: ViT-g
# 521 G, Q-Former 13 G, prefill 166 G, decode 20 x 5.3 G.
CAPTION_TFLOP = 0.521 + 0.013 + 0.166 + 20 * 0.0053
# Training. Forward, recomputation and backward of MGM-2B's 2.5 G parameters on 700 tokens (576 of them visual), frozen
# weights, so 2 FLOP each way and no weight gradients; both towers once.
TRAIN_TFLOP = 3 * 2 * 2.5e9 * 700 / 1e12 + 0.8
# What a card sustains: dense bf16 from its data sheet or a matrix product (H200: 790 measured), times the share that a
# tuned engine gets.
CARDS = {"L4 (24 GB)": 121.0, "H100/H200 (80 GB)": 790.0}
SHARE = 0.4
JPEG_BYTES, ROW_BYTES = 65 * 1024, 1024  # a photograph of 640 x 480 (bench_decode.py), and a record without its image
PIXEL_BYTES = 3 * 224 * 224
DECODES_PER_CPU = 200.0  # bench_decode.py, 640 x 480
CAPTION_CARDS, TRAIN_CARDS = {1_000_000: 8, 10_000_000: 8, 1_000_000_000: 64}, 4


def id_bytes(count: int = 1_000_000) -> tuple[float, float]:
    """Bytes and seconds per million ids that Ray Data's checkpoint filter holds and sorts: an array of Python strings
    of 32 characters.
    """
    rng = np.random.default_rng(0)
    ids = pa.array([value.tobytes().hex() for value in rng.integers(0, 256, (count, 16), np.uint8)])
    process = psutil.Process()
    before, started = process.memory_info().rss, time.process_time()
    held = np.sort(ids.to_numpy(zero_copy_only=False))  # what ray.data.checkpoint.checkpoint_filter does
    seconds = time.process_time() - started
    assert len(held) == count
    return (process.memory_info().rss - before) / count, seconds


def main() -> None:
    """The numbers of k8s/SCALING.md."""
    size, seconds = id_bytes()
    print(f"checkpoint ids: {size:.0f} bytes each in memory, {seconds:.1f} s of CPU to sort a million\n")
    print("card                images/s   training samples/s   CPUs to decode for it")
    for name, tflops in CARDS.items():
        speed = SHARE * tflops / CAPTION_TFLOP
        print(f"{name:<18} {speed:9.0f} {SHARE * tflops / TRAIN_TFLOP:20.1f} {speed / DECODES_PER_CPU:23.1f}")
    print("\nimages          cards   hours   read     through the object store   records   ids in memory")
    fast = SHARE * CARDS["H100/H200 (80 GB)"] / CAPTION_TFLOP
    for images, cards in CAPTION_CARDS.items():
        numbers = (images * JPEG_BYTES, images * PIXEL_BYTES, images * ROW_BYTES, images * size)
        read, store, records, ids = (
            f"{value / 2**30:,.0f} GiB" if value < 2**40 else f"{value / 2**40:,.1f} TiB" for value in numbers
        )
        print(
            f"{images:<15,} {cards:5} {images / fast / cards / 3600:7.1f}   {read:<10} {store:<24} {records:<9} {ids}"
        )
    samples = 2 * 4560 * 128  # mgm2b_1m: two phases, 4 workers x micro-batch x accumulation = 128
    hours = samples / (TRAIN_CARDS * SHARE * CARDS["H100/H200 (80 GB)"] / TRAIN_TFLOP) / 3600
    print(f"\ntraining, mgm2b_1m: {samples:,} samples an arm, {hours:.1f} hours an arm on {TRAIN_CARDS} cards of 80 GB")


if __name__ == "__main__":
    main()
