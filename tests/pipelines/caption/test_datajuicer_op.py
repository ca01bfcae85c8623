"""The Data-Juicer operator: the same rows as Data-Juicer's own captioner would make of the same captions, also by its
own executor.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.refine.operators import load_data_juicer
from pipelines.sample.scene import draw_scenes, render
from pipelines.sample.world import MODELS

load_data_juicer()  # first: without Data-Juicer's side effects

from pipelines.caption import datajuicer_op  # noqa: E402

IMAGE, EOC = "<__dj__image>", "<|__dj__eoc|>"
OPERATOR = Path(datajuicer_op.__file__)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("scenes")
    for number, scene in enumerate(draw_scenes("validation", 6, 9)):
        render(scene, random.Random(number)).save(folder / f"{number}.jpg", quality=90)
    return [str(folder / f"{number}.jpg") for number in range(6)]


def batch(scenes: list[str]) -> dict[str, list[Any]]:
    """One image; two chunks, one of them without an image; no image at all; two images in a chunk; a broken one."""
    return {
        "text": [
            f"{IMAGE} a big green sign that says toys {EOC}",
            f"{IMAGE} one {EOC} words alone {EOC}{IMAGE} two",
            "no picture here",
            f"{IMAGE}{IMAGE} a pair {EOC}",
            f"{IMAGE} broken {EOC}",
        ],
        "images": [scenes[:1], scenes[1:3], [], scenes[3:5], ["/nowhere.jpg"]],
        "id": [0, 1, 2, 3, 4],
    }


def operator(**parameters: Any) -> Any:
    return load_data_juicer()["captune_image_captioning_mapper"](
        hf_img2seq=str(MODELS / "blip2"), max_new_tokens=24, **parameters
    )


def captions(text: str) -> list[str]:
    return [part.strip() for part in re.split(re.escape(IMAGE) + "|" + re.escape(EOC), text) if part.strip()]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("mode", ["random_any", "similar_one_simhash", "all"])
def test_rows_are_laid_out_as_by_data_juicer(scenes: list[str], mode: str, keep: bool) -> None:
    """Data-Juicer's own code puts the same captions into the same rows, tokens and order (where a chunk has one image
    at most).
    """
    samples = {key: values[:3] for key, values in batch(scenes).items()}
    op = operator(caption_num=3, keep_candidate_mode=mode, keep_original_sample=keep)
    found = op.process_batched(samples)

    theirs = object.__new__(load_data_juicer()["image_captioning_mapper"])
    theirs.__dict__ |= {
        "image_key": "images", "text_key": "text", "keep_original_sample": keep, "caption_num": 3,
        "num_newly_generated_samples": 3 if mode == "all" else 1,
        "keep_candidate_mode": "all" if mode == "all" else "random_any",
    }  # fmt: skip
    rows = [dict(zip(samples, values, strict=True)) for values in zip(*samples.values(), strict=True)]
    new = [text for text, row in zip(found["text"], found["id"], strict=True) if text not in samples["text"]]
    per_image = 3 if mode == "all" else 1
    first, second = new[:per_image], new[per_image:]
    texts = [[captions(text)[0] for text in first]] + [[captions(text)[i] for text in second] for i in range(2)]
    if mode != "all":
        texts = [[text[0]] * 3 for text in texts]
    expected = theirs._distribute_captions(texts, [(0, 0, 0), (1, 0, 0), (1, 2, 0)], rows)
    assert [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)] == expected
    assert all(text for image in texts for text in image)


def test_every_image_token_gets_its_own_caption(scenes: list[str]) -> None:
    """Two images in a chunk; a sample with a broken image keeps its original and takes nobody else's rows with it."""
    found = operator(method="greedy").process_batched(batch(scenes))
    assert found["id"] == [0, 0, 1, 1, 2, 3, 3, 4]
    single = operator(method="greedy", keep_original_sample=False)
    alone = [captions(single.process_batched({"text": [IMAGE], "images": [[scene]]})["text"][0])[0] for scene in scenes]
    assert len(set(alone)) == 6
    assert captions(found["text"][1]) == alone[:1] and captions(found["text"][3]) == alone[1:3]
    assert found["text"][6] == f"{IMAGE} {alone[3]} {IMAGE} {alone[4]} {EOC}"


def test_prompts_and_bytes(scenes: list[str]) -> None:
    """A sample's own prompt goes before the recipe's; OPT captions repeat it; bytes stand in for a file."""
    data = Path(scenes[0]).read_bytes()
    samples = {
        "text": [IMAGE, IMAGE], "images": [["bytes"], scenes[1:2]], "image_bytes": [[data], []],
        "ask": ["a " "green", None]
    }  # fmt: skip
    op = operator(method="greedy", prompt="a", prompt_key="ask", keep_original_sample=False)
    texts = [captions(text)[0] for text in op.process_batched(samples)["text"]]
    assert texts[0].startswith("a green ") and texts[1].startswith("a ")
    bare = operator(method="greedy", prompt="a", repeat_prompt=False, keep_original_sample=False)
    assert texts[1] == "a " + captions(bare.process_batched(samples)["text"][1])[0]


@pytest.mark.heavy
def test_a_data_juicer_recipe_changes_one_name(scenes: list[str], tmp_path: Path) -> None:
    """`dj-process` finds the operator by its path; in another process, alone in a batch or not, sampling says the
    same.
    """
    lines = [json.dumps({"text": f"{IMAGE} poor {EOC}", "images": [scene]}) for scene in scenes]
    (tmp_path / "set.jsonl").write_text("\n".join(lines) + "\n")
    parameters = {"hf_img2seq": str(MODELS / "blip2"), "keep_original_sample": False, "max_new_tokens": 24}
    recipe = {
        "dataset_path": str(tmp_path / "set.jsonl"), "export_path": str(tmp_path / "out.jsonl"), "np": 1,
        "work_dir": str(tmp_path), "use_cache": False, "custom_operator_paths": [str(OPERATOR)],
        "process": [{"captune_image_captioning_mapper": parameters}],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "data_juicer.tools.process_data", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    op = operator(keep_original_sample=False)
    assert texts == [op.process_batched({"text": [IMAGE + EOC], "images": [[scene]]})["text"][0] for scene in scenes]
    assert all(captions(text) and "poor" not in text for text in texts)
