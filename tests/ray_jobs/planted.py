"""A world with planted defects: captions that are good but for known shares, which loop, are of another picture, or are
one phrase again and again.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from pipelines.sample.config import SampleConfig
from pipelines.sample.language import caption
from pipelines.sample.scene import Scene, draw_scenes, jpeg
from pipelines.sample.world import write_world

PLANTED = {"wrong": 0.05, "looping": 0.5, "duplicate": 0.15}
"""Shares of the pairs."""
CURED = {
    "captions": PLANTED["wrong"] + PLANTED["looping"] + PLANTED["duplicate"],
    "word_repetition_filter": PLANTED["looping"],
    "document_deduplicator": PLANTED["duplicate"],
    "text_length_filter": 0.0,
}
"""Cause -> share of the pairs that it puts right or throws out; the split must name them in this order."""
FILTERS = """
process:
  - text_length_filter: {min_len: 4, max_len: 400}
  - word_repetition_filter: {rep_len: 3, max_ratio: 0.4}
  - document_deduplicator: {}
"""


def write(root: Path, pairs: int, instructions: int, questions: int) -> Path:
    """Models, instructions and questions of the sample, and planted pairs; returns a recipe."""
    world = root / "world"
    write_world(world, SampleConfig(pairs=1, instructions=instructions, questions=questions))
    rng, scenes = random.Random(0), draw_scenes("pairs", pairs, 0)
    bounds, lines = _bounds(pairs), []
    order = rng.sample(range(pairs), pairs)
    for number, scene in enumerate(scenes):
        name = f"planted/{number:05d}.jpg"
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_bytes(jpeg(scene, 0))
        kind = next((kind for kind, until in bounds.items() if order[number] < until), "")
        text = _text(kind, scene, scenes[(number + 1) % pairs])
        lines.append(json.dumps({"text": f"<__dj__image> {text} <|__dj__eoc|>", "images": [name]}))
    (world / "planted.jsonl").write_text("\n".join(lines) + "\n")
    (root / "filters.yaml").write_text(FILTERS)
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=root))
    return recipe


def _bounds(pairs: int) -> dict[str, int]:
    found, until = {}, 0.0
    for kind, share in PLANTED.items():
        until += share
        found[kind] = round(until * pairs)
    return found


def _text(kind: str, scene: Scene, other: Scene) -> str:
    good = caption(scene)
    return {
        "wrong": caption(other),
        "looping": f"{caption(other)} {caption(other)}",
        "duplicate": "a photo of the picture for sale",
    }.get(kind, good)


RECIPE = """
run_dir: {root}/run
dataset: {root}/world/planted.jsonl
caption: {{model: {root}/world/models/blip2, batch_size: 32, max_new_tokens: 24, cpus_per_actor: 0.9}}
arms:
  original: {{text: caption}}
  enhanced: {{text: recaption, recipe: {root}/filters.yaml}}
assemble: {{from_mgm: {root}/world/models/mgm}}
train:
  model: {root}/run/base
  instruct_data: {root}/world/instruct.json
  align: {{template: plain, steps: 64, learning_rate: 2.0e-3, micro_batch: 16, accumulation: 1}}
  instruct: {{steps: 24, learning_rate: 4.0e-4, micro_batch: 16, accumulation: 1}}
  max_length: 128
  gradient_checkpointing: false
  precision: float32
  held_out: 0
  checkpoint_every: 1000
merge: {{dtype: float32}}
serve: {{max_batch_size: 32}}
evaluate:
  annotations: {root}/world/textvqa/TextVQA_0.5.1_val.json
  images: {root}/world/textvqa/train_images
"""
