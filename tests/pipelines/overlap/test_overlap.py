"""`captune overlap`: copies of a benchmark's pictures in training data are found whatever was done to them, and nothing
else; what follows from it, rows left out and a verdict without such questions, goes through the commands.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.records import new_record, read_shards, write_shard
from pipelines.sample.config import SampleConfig
from pipelines.sample.scene import draw_scenes, jpeg
from pipelines.sample.world import write_world
from ray_jobs import cli
from tests.pipelines.report.synthetic_run import build

Change = Callable[[Image.Image], bytes]
PAIRS = 60


def encoded(picture: Image.Image, form: str = "JPEG", quality: int = 75) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, quality=quality)
    return stream.getvalue()


def scaled(factor: float, quality: int) -> Change:
    def change(picture: Image.Image) -> bytes:
        width, height = picture.size
        return encoded(picture.resize((round(width * factor), round(height * factor))), quality=quality)

    return change


CHANGES: dict[str, Change] = {
    "half, quality 50": scaled(0.5, 50),
    "twice, quality 30": scaled(2, 30),
    "squared": lambda picture: encoded(picture.resize((96, 96)), quality=60),
    "quality 10": lambda picture: encoded(picture, quality=10),
    "webp": lambda picture: encoded(picture, "WEBP", 40),
    "png": lambda picture: encoded(picture, "PNG"),
    "a little brighter": lambda picture: encoded(picture.point(lambda value: min(255, round(1.08 * value)))),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample world with copies of the first questions' pictures among pairs and instructions."""
    root = tmp_path_factory.mktemp("world")
    write_world(root, SampleConfig(pairs=1, instructions=20, questions=40))
    data = json.loads((root / "textvqa" / "TextVQA_0.5.1_val.json").read_text())["data"]
    lines = []
    for number, scene in enumerate(draw_scenes("pairs", PAIRS, 0)):
        (root / f"{number}.jpg").write_bytes(jpeg(scene, 0))
        lines.append({"text": "<__dj__image> a sign <|__dj__eoc|>", "images": [f"{number}.jpg"]})
    for number, (name, change) in enumerate(CHANGES.items()):
        with Image.open(root / "textvqa" / "train_images" / f"{data[number]['image_id']}.jpg") as picture:
            (root / f"copy{number}").write_bytes(change(picture.convert("RGB")))
        lines.append({"text": f"<__dj__image> copied, {name} <|__dj__eoc|>", "images": [f"copy{number}"]})
    lines.append({"text": "<__dj__image> gone <|__dj__eoc|>", "images": ["gone.jpg"]})
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    instructions = json.loads((root / "instruct.json").read_text())
    turns = [{"from": "human", "value": f"<image>\n{data[0]['question']}"}, {"from": "gpt", "value": "it is"}]
    instructions.append({"id": "copied", "image": "copy0", "conversations": turns})
    (root / "instruct.json").write_text(json.dumps(instructions))
    return root


def overlap(world: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    benchmark = ("--annotations", str(world / "textvqa" / "TextVQA_0.5.1_val.json"))
    benchmark += ("--images", str(world / "textvqa" / "train_images"))
    assert cli.main(["overlap", *words, *benchmark, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_copies_are_found_and_nothing_else(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In pairs and in instructions; the page shows both pictures and loads nothing."""
    pairs, instructions = str(world / "pairs.jsonl"), str(world / "instruct.json")
    found = overlap(world, capsys, pairs, instructions, "--output", str(tmp_path / "overlap"))
    assert found == json.loads((tmp_path / "overlap" / "overlap.json").read_text())
    data = json.loads((world / "textvqa" / "TextVQA_0.5.1_val.json").read_text())["data"]
    copied = [(f"pairs.jsonl:{PAIRS + number + 1}", data[number]["image_id"]) for number in range(len(CHANGES))]
    assert [(row["row"], row["image_id"]) for row in found["rows"][:-1]] == copied
    last = found["rows"][-1]
    assert (last["dataset"], last["image_id"], last["words"]) == (instructions, data[0]["image_id"], True)
    assert found["contaminated"] == [str(entry["question_id"]) for entry in data[: len(CHANGES)]]
    first, second = found["datasets"]
    assert (first["rows"], first["same_picture"], first["unreadable"]) == (PAIRS + len(CHANGES) + 1, len(CHANGES), 1)
    assert second["same_words"] > second["same_picture"] == 1, "drawn questions are worded alike"
    page = (tmp_path / "overlap" / "index.html").read_text()
    assert page.count("data:image/jpeg") == 2 * len(found["rows"]) and not re.search(r"(?:src|href)=\"(?!data:)", page)
    table = world / "table.csv"
    table.write_text("file,prompt\ncopy0,a copy\n0.jpg,a sign\n")
    named = overlap(world, capsys, str(table), "--columns", "image=file", "--columns", "caption=prompt")
    assert [row["image_id"] for row in named["rows"]] == [data[0]["image_id"]]
    few = overlap(world, capsys, pairs, "--overlap.correlation", "0.9999")
    assert len(few["rows"]) < len(CHANGES)


@pytest.mark.heavy  # workers of Ray
@pytest.mark.usefixtures("ray_cluster")
def test_refine_leaves_such_rows_out(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the benchmark's picture as the reason, whether the records or the data that they come from were looked at;
    every row is in one place or the other.
    """
    records: list[Any] = []
    for number in range(4):
        records.append(new_record("a sign", image=(world / f"{number}.jpg").read_bytes()) | {"recaption": "a red sign"})
    for number, name in enumerate(CHANGES):
        content = (world / f"copy{number}").read_bytes()
        records.append(new_record(f"copied, {name}", image=content) | {"recaption": "a copy"})
    write_shard(tmp_path / "captions" / "part-0.parquet", records)
    for looked_at in (str(tmp_path / "captions"), str(world / "pairs.jsonl")):
        out = tmp_path / Path(looked_at).stem
        overlap(world, capsys, looked_at, "--output", str(out / "overlap"))
        words = ("--output", str(out / "refined"), "--refine.without", str(out / "overlap"))
        assert cli.main(["refine", str(tmp_path / "captions"), *words]) == 0
        assert read_shards(out / "refined").num_rows == 4
        reasons = read_shards(out / "refined" / "rejects")["reject_reason"].to_pylist()
        assert len(reasons) == len(CHANGES) and all(reason.startswith("benchmark: textvqa ") for reason in reasons)
        funnel = json.loads((out / "refined" / "metrics.json").read_text())["funnel"]
        assert [step["rejected"] for step in funnel if step["step"] == "benchmark"] == [len(CHANGES)]


def test_the_verdict_is_also_given_without_known_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As if they had never been asked; of another benchmark's overlap nothing is said."""
    run = build(tmp_path, rows=8, questions=40)
    arms = [f"{arm}={run / arm / 'predictions' / 'textvqa'}" for arm in ("original", "enhanced")]
    scores = {
        arm: json.loads((run / arm / "predictions/textvqa/scores.json").read_text()) for arm in ("original", "enhanced")
    }
    ids = [row["question_id"] for row in scores["original"]["questions"]]
    file = tmp_path / "overlap.json"

    def compared(known: list[str], benchmark: str = "textvqa") -> dict[str, Any]:
        file.write_text(json.dumps({"benchmark": benchmark, "rows": [], "contaminated": known}))
        words = ("--output", str(tmp_path / "compared"), "--compare.overlap", str(file))
        assert cli.main(["compare", *arms, *words, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    found = compared(ids[:10])
    clean = found["clean"]
    assert (clean["left_out"], clean["count"]) == (10, 30)
    mean = {
        arm: sum(row["score"] for row in each["questions"] if row["question_id"] in ids[10:]) / 30
        for arm, each in scores.items()
    }
    assert clean["differences"]["enhanced"]["difference"] == pytest.approx(mean["enhanced"] - mean["original"])
    assert found["differences"]["enhanced"] == compared([])["differences"]["enhanced"]
    assert compared([])["clean"] == {"left_out": 0, "count": 40} and "clean" not in compared(ids, "vqav2")
    compared(ids[:10])
    assert cli.main(["compare", *arms, "--output", str(tmp_path / "c"), "--compare.overlap", str(file)]) == 0
    assert "without the 10 questions whose picture was trained on" in capsys.readouterr().out


def test_mistakes_are_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert cli.main(list(words)) == 2
        return capsys.readouterr().err

    annotations = ("--annotations", str(world / "textvqa" / "TextVQA_0.5.1_val.json"))
    pictures = ("--images", str(world / "textvqa" / "train_images"))
    assert "none.jsonl" in refused("overlap", str(tmp_path / "none.jsonl"), *annotations, *pictures)
    assert "evaluate.images" in refused("overlap", str(world / "pairs.jsonl"), *annotations, "--images", str(tmp_path))
    assert "overlap.distance" in refused("overlap", "x", *annotations, *pictures, "--overlap.distance", "40")
    write_shard(tmp_path / "captions" / "part-0.parquet", [new_record("x", image=b"x")])
    refine = ("refine", str(tmp_path / "captions"), "--output", str(tmp_path / "out"))
    assert "captune overlap writes it" in refused(*refine, "--refine.without", str(tmp_path / "none.json"))
    (tmp_path / "other.json").write_text("[]")
    assert "not what captune overlap writes" in refused(*refine, "--refine.without", str(tmp_path / "other.json"))


def test_a_run_is_refused_before_it_begins_where_the_file_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    missing = f"{{without: {tmp_path}/none.json}}"
    arms = f"arms: {{original: {{text: caption}}, enhanced: {missing}}}"
    recipe.write_text(f"base: sample\nrun_dir: {tmp_path}/run\n{arms}\ntrain: {missing}\n")
    assert cli.main(["run", str(recipe), "--dry-run", "--compare.overlap", str(tmp_path / "none.json")]) == 2
    said = capsys.readouterr().err
    for key in ("train.without", "compare.overlap", "arms.enhanced.without"):
        assert f"{key}: {tmp_path}/none.json: no such file" in said
