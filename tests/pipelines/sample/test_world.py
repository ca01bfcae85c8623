"""The sample world: the same bytes every time, no scene in two splits, layouts that other tools read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.stage import find_images, read_questions
from pipelines.images import BadImage, decode
from pipelines.manifest import identity
from pipelines.sample.config import SampleConfig
from pipelines.sample.scene import SPLITS, draw_scenes
from pipelines.sample.world import write_world

SMALL = SampleConfig(pairs=260, instructions=8, questions=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "world"
    write_world(out, SMALL, models=False)
    return out


def test_the_same_seed_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "again", SMALL, models=False)
    for part in ("dataset.jsonl", "images", "instruct.json", "instruct", "textvqa", "vqav2", "pope", "mmbench"):
        assert identity(tmp_path / "again" / part) == identity(world / part), part


def test_splits_share_no_scene() -> None:
    keys = [scene.key for split in SPLITS for scene in draw_scenes(split, 300, seed=0)]
    assert len(set(keys)) == len(keys)


def test_pairs_are_in_data_juicer_format_and_some_files_are_broken(world: Path) -> None:
    rows = [json.loads(line) for line in (world / "dataset.jsonl").read_text().splitlines()]
    assert len(rows) == SMALL.pairs
    reasons = set()
    for row in rows:
        assert row["text"].startswith("<__dj__image> ")
        path = world / row["images"][0]
        try:
            assert decode(path.read_bytes()).mode == "RGB"
        except FileNotFoundError:
            reasons.add("missing")
        except BadImage as error:
            reasons.add(str(error).split(":")[0])
    assert len(reasons) >= 4, reasons


def test_questions_are_in_textvqa_layout_with_ten_answers(world: Path) -> None:
    data = json.loads((world / "textvqa" / "TextVQA_0.5.1_val.json").read_text())
    assert data["dataset_version"] == "0.5.1"
    assert len({entry["question_id"] for entry in data["data"]}) == SMALL.questions
    for entry in data["data"]:
        assert len(entry["answers"]) == 10
        picture = decode((world / "textvqa" / "train_images" / f"{entry['image_id']}.jpg").read_bytes())
        assert picture.size == (entry["image_width"], entry["image_height"])


def test_other_kinds_of_questions_are_as_published(world: Path) -> None:
    """Each kind of answer, absence and category; every read by its benchmark, with the pictures that it names."""
    coco = str(world / "coco")
    config = EvaluateConfig(
        annotations=str(world / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json"), images=coco
    )
    asked = {
        "vqav2": config,
        "pope": replace(config, annotations=str(world / "pope")),
        "mmbench": replace(config, annotations=str(world / "mmbench" / "mmbench_dev.tsv")),
    }
    asked = {name: replace(each, benchmark=name) for name, each in asked.items()}
    found = {name: read_questions(each) for name, each in asked.items()}
    for name, each in asked.items():
        find_images(each, found[name])
    assert {question.kind for question in found["vqav2"]} == {"yes/no", "number", "other"}
    assert {question.kind for question in found["pope"]} == {"random", "popular", "adversarial"}
    for kind in ("random", "popular", "adversarial"):
        labels = [question.answers[0] for question in found["pope"] if question.kind == kind]
        assert labels.count("yes") == labels.count("no") > 0
    first = [question for question in found["mmbench"] if not question.copy_of]
    assert len(first) == SMALL.questions and len({question.image_id for question in first}) == SMALL.questions
    for question in first:  # the right option is the same in every order
        copies = [each for each in found["mmbench"] if question.id in (each.id, each.copy_of)]
        assert len(copies) == len(question.options)
        assert len({each.options["ABCD".index(each.answers[0])] for each in copies}) == 1


def test_instructions_are_in_llava_format(world: Path) -> None:
    rows = json.loads((world / "instruct.json").read_text())
    assert len(rows) == SMALL.instructions
    for row in rows:
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        assert row["conversations"][0]["value"].startswith("<image>\n")
        assert (world / row["image"]).is_file()


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no captune stage wrote"):
        write_world(tmp_path, SMALL, models=False)
