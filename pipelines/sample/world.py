"""Draw the sample world: image-text pairs as poor as web alt-text, an instruction set, and TextVQA-style validation
questions.

Everything is a pure function of the seed, so that two machines write the same bytes.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

from pipelines.manifest import open_stage
from pipelines.progress import Progress
from pipelines.sample.config import SampleConfig
from pipelines.sample.language import SHORT_ANSWER, human_answers, ocr_tokens, pick_question, poor_caption
from pipelines.sample.questions import write_questions
from pipelines.sample.scene import Scene, draw_scenes, jpeg

MODELS = Path(__file__).parent / "models"
"""The small trained models that come with captune; see `training/README.md`."""

_BROKEN = ("truncated", "empty", "not an image", "missing", "bomb")
_UNUSUAL = ("cmyk", "palette", "animated", "grey", "transparent")
_JUNK = ("icon", "banner", "flat tile")


def write_world(out: Path | str, config: SampleConfig, *, models: bool = True, restart: bool = False) -> dict[str, Any]:
    """Write the sample world to `out` in the layout that the README promises; returns the manifest.

    Raises:
        UserError: `out` holds something else.
    """
    output = open_stage(out, "sample", inputs(config, models), restart=restart)
    if output.complete:
        return output.manifest
    out = Path(out)
    total = config.pairs + config.instructions + config.questions
    with Progress(total, "sample", "pictures") as progress:
        counts = {
            "pairs": _write_pairs(out, config, progress),
            "instructions": _write_instructions(out, config, progress),
            "questions": _write_questions(out, config, progress),
        }
    scenes = draw_scenes("validation", config.questions, config.seed)
    counts |= write_questions(out, scenes, out / "textvqa" / "train_images", config.seed)
    if models:
        for model in ("blip2", "mgm"):
            shutil.copytree(MODELS / model, out / "models" / model, dirs_exist_ok=True)
    return output.finish(counts=counts)


def inputs(config: SampleConfig, models: bool = True) -> dict[str, Any]:
    """Everything that decides what is drawn."""
    return {
        "sample": {**vars(config), "out": None},
        "models": models,
        "benchmarks": ["vqav2", "pope", "mmbench"],
        "alt_text": 2,
    }


def _write_pairs(out: Path, config: SampleConfig, progress: Progress) -> int:
    """`dataset.jsonl` in Data-Juicer's format beside `images/`.

    Of fifty files one is broken, one comes in an unusual mode or format, and two are what a scraper takes along by
    mistake.
    """
    rng = random.Random(f"pairs/{config.seed}")
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(draw_scenes("pairs", config.pairs, config.seed)):
        name = f"{number:06d}.jpg"
        data = _as_found(jpeg(scene, config.seed), number, rng)
        if data is not None:
            (images / name).write_bytes(data)
        text = f"<__dj__image> {poor_caption(scene, rng)} <|__dj__eoc|>"
        lines.append(json.dumps({"id": f"pair-{number:06d}", "text": text, "images": [f"images/{name}"]}))
        progress.update()
    (out / "dataset.jsonl").write_text("\n".join(lines) + "\n")
    return len(lines)


def _as_found(data: bytes, number: int, rng: random.Random) -> bytes | None:
    """The file as a scraper brings it home; None when it is not there."""
    if number % 50 == 7:
        return _broken(data, _BROKEN[number // 50 % len(_BROKEN)])
    if number % 50 == 23:
        return _unusual(data, _UNUSUAL[number // 50 % len(_UNUSUAL)])
    if number % 25 == 11:
        return _junk(_JUNK[number // 25 % len(_JUNK)], rng)
    return data


def _broken(data: bytes, how: str) -> bytes | None:
    """What download scripts leave behind; None is a file that is not there."""
    if how == "bomb":
        return _png_header(60_000, 60_000)
    return {
        "truncated": data[: len(data) // 3],
        "empty": b"",
        "not an image": b"<html>404 Not Found</html>",
        "missing": None,
    }[how]


def _png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be gigantic: a decompression bomb."""
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def _unusual(data: bytes, how: str) -> bytes:
    """The same picture in a mode or format that careless code cannot read."""
    from PIL import Image

    picture, stream = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    if how == "cmyk":
        picture.convert("CMYK").save(stream, "JPEG", quality=90)
    elif how == "palette":
        picture.quantize(128).save(stream, "PNG")
    elif how == "animated":
        picture.save(stream, "GIF", save_all=True, append_images=[picture.rotate(180)])
    elif how == "grey":
        picture.convert("L").save(stream, "JPEG", quality=90)
    else:
        picture.putalpha(255)
        picture.save(stream, "PNG")
    return stream.getvalue()


def _junk(what: str, rng: random.Random) -> bytes:
    """A picture that decodes well and is worth nothing: an icon, a banner, a placeholder of one colour."""
    from PIL import Image

    size = {"icon": (32, 32), "banner": (728, 90), "flat tile": (80, 80)}[what]
    color = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "JPEG", quality=60)
    return stream.getvalue()


def _write_instructions(out: Path, config: SampleConfig, progress: Progress) -> int:
    """`instruct.json` in LLaVA's format; pictures in `instruct/`."""
    rng = random.Random(f"instruct/{config.seed}")
    (out / "instruct").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, scene in enumerate(draw_scenes("instruct", config.instructions, config.seed)):
        name = f"instruct/{number:06d}.jpg"
        (out / name).write_bytes(jpeg(scene, config.seed))
        rows.append({"id": f"instruct-{number:06d}", "image": name, "conversations": _conversation(scene, rng)})
        progress.update()
    (out / "instruct.json").write_text(json.dumps(rows, indent=1) + "\n")
    return len(rows)


def _conversation(scene: Scene, rng: random.Random) -> list[dict[str, str]]:
    question = pick_question(scene, rng)
    return [
        {"from": "human", "value": f"<image>\n{question.text}\n{SHORT_ANSWER}"},
        {"from": "gpt", "value": question.answer},
    ]


def _write_questions(out: Path, config: SampleConfig, progress: Progress) -> int:
    """`textvqa/` in the layout of TextVQA 0.5.1, whose OCR tokens stand in the Rosetta file alone."""
    rng = random.Random(f"validation/{config.seed}")
    images = out / "textvqa" / "train_images"
    images.mkdir(parents=True, exist_ok=True)
    entries, ocr = [], []
    for number, scene in enumerate(draw_scenes("validation", config.questions, config.seed)):
        image_id = f"{number:016x}"
        (images / f"{image_id}.jpg").write_bytes(jpeg(scene, config.seed))
        question, tokens = pick_question(scene, rng, reading_share=0.75), ocr_tokens(scene, rng)
        entries.append(
            {
                "question_id": 34602 + number,
                "image_id": image_id,
                "question": question.text,
                "question_tokens": question.text.rstrip("?").split(),
                "image_width": scene.size[0],
                "image_height": scene.size[1],
                "image_classes": [item.kind for item in scene.writings],
                "answers": human_answers(question, rng),
                "set_name": "val",
            }
        )
        ocr.append({"image_id": image_id, "ocr_tokens": tokens})
        progress.update()
    facts = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    (out / "textvqa" / "TextVQA_0.5.1_val.json").write_text(json.dumps({**facts, "data": entries}, indent=1) + "\n")
    (out / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(
        json.dumps({**facts, "data": ocr}, indent=1) + "\n"
    )
    return len(entries)
