"""One batch of 16 questions against 16 single calls of the same model: seconds and their ratio, measured in turn.

python tests/bench/bench_mgm_batch.py [--model DIR] [--threads 2] [--tokens 16]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipelines.mgm import register
from pipelines.sample.language import SHORT_ANSWER
from pipelines.sample.scene import draw_scenes, render
from pipelines.sample.world import MODELS


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODELS / "mgm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of every answer")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    register()
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    pictures = [render(scene, random.Random(0)) for scene in draw_scenes("validation", args.batch, 9)]

    def answer(images: list[Image.Image]) -> torch.Tensor:
        content = [{"type": "text", "text": f"what does the sign say?\n{SHORT_ANSWER}"}]
        chats = [[{"role": "user", "content": [{"type": "image", "image": image}, *content]}] for image in images]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        with torch.inference_mode():
            return model.generate(**inputs, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    answer(pictures)
    pairs = [
        (seconds(lambda: [answer([image]) for image in pictures]), seconds(lambda: answer(pictures)))
        for _ in range(args.rounds)
    ]
    ratio = statistics.median(single / batch for single, batch in pairs)
    single, batch = (statistics.median(values) for values in zip(*pairs, strict=True))
    print(
        f"{args.batch} single calls {single:.3f} s, one batch {batch:.3f} s: {ratio:.1f} times as fast "
        f"({args.tokens} new tokens, {args.threads} threads)"
    )


if __name__ == "__main__":
    main()
