"""A sample recipe and a dataset small enough for drills; everything that decides the result is the embedded sample's
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def write_recipe(root: Path, **sections: dict[str, Any]) -> Path:
    """`root/recipe.yaml`: the sample recipe with one arm, few pairs and few steps, all below `root`; `sections` change
    keys of it.
    """
    world = root / "world"
    recipe: dict[str, Any] = {
        "base": "sample",
        "run_dir": str(root / "run"),
        "dataset": str(world / "dataset.jsonl"),
        "sample": {"out": str(world), "pairs": 40, "instructions": 12, "questions": 12},
        "assemble": {"from_mgm": str(world / "models" / "mgm")},
        "caption": {"model": str(world / "models" / "blip2")},
        "arms": {"enhanced": {"text": "recaption", "recipe": "refine_captions.yaml"}},
        "compare": {"baseline": "enhanced"},
        "train": {
            "model": str(root / "run" / "base"),
            "instruct_data": str(world / "instruct.json"),
            "align": {"steps": 6, "micro_batch": 8},
            "instruct": {"steps": 4, "micro_batch": 4},
            "checkpoint_every": 2,
        },
        "evaluate": {
            "annotations": str(world / "textvqa" / "TextVQA_0.5.1_val.json"),
            "images": str(world / "textvqa" / "train_images"),
        },
    }
    for name, keys in sections.items():
        recipe[name] = {**recipe.get(name, {}), **keys}
    path = root / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def draw_world(root: Path, pairs: int, instructions: int = 1) -> Path:
    """The sample world with so many pairs."""
    from pipelines.sample.config import SampleConfig
    from pipelines.sample.world import write_world

    write_world(root, SampleConfig(pairs=pairs, instructions=instructions, questions=1))
    return root


def captioned_ids(output: Path) -> list[str]:
    """Ids in the finished shards of a captioning run, in order, as often as they stand there."""
    import pyarrow.parquet as pq

    return [key for file in sorted(output.glob("*.parquet")) for key in pq.read_table(file)["sample_id"].to_pylist()]
