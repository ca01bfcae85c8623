"""The sample world's questions of other kinds than TextVQA's, in the layouts of VQAv2, POPE and MMBench, about the
first of the same validation pictures.

The small MGM that comes with captune has learned to answer what `language.questions` asks. It has met no yes or no, and
no option letters: its scores here say that the way from question to score works, and little of the model.
"""

from __future__ import annotations

import base64
import csv
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines.sample.language import Question, human_answers, pick_question
from pipelines.sample.scene import COLORS, COUNTS, DIGITS, KINDS, LABEL_WORDS, SHAPES, SIGN_WORDS, Scene, Writing

PICTURES = 100
"""Asked about, or all where there are fewer."""
KINDS_OF_ABSENCE = ("random", "popular", "adversarial")
"""How POPE chooses objects that are not there."""
_FIRST_IMAGE = 42
_OBJECTS = (*KINDS, *SHAPES)
_SPLIT = "val2014"
_COLUMNS = ("index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category")
_ROTATION = 1_000_000


def write_questions(out: Path, scenes: Sequence[Scene], drawn: Path, seed: int) -> dict[str, int]:
    """Write `coco/` (the pictures, as VQAv2 and POPE name them), `vqav2/`, `pope/` and `mmbench/`.

    Args:
        scenes: of the pictures in `drawn`, in the order of their names.

    Returns:
        Benchmark -> number of questions.
    """
    rng, scenes = random.Random(f"questions/{seed}"), scenes[:PICTURES]
    files = sorted(drawn.glob("*.jpg"))[:PICTURES]
    (out / "coco").mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        shutil.copyfile(file, out / "coco" / _picture(number))
    return {
        "vqav2": _write_vqav2(out / "vqav2", scenes, rng),
        "pope": _write_pope(out / "pope", scenes, rng),
        "mmbench": _write_mmbench(out / "mmbench", scenes, files, rng),
    }


def _picture(number: int) -> str:
    return f"COCO_{_SPLIT}_{_FIRST_IMAGE + number:012d}.jpg"


def _write_vqav2(folder: Path, scenes: Sequence[Scene], rng: random.Random) -> int:
    """A question of each kind of answer about every picture."""
    asked, answered = [], []
    for number, scene in enumerate(scenes):
        image_id = _FIRST_IMAGE + number
        for place, (kind, question) in enumerate(_of_each_kind(scene, rng).items()):
            ids = {"image_id": image_id, "question_id": 1000 * image_id + place}
            said = [
                {"answer": answer, "answer_confidence": "yes", "answer_id": person}
                for person, answer in enumerate(human_answers(question, rng), 1)
            ]
            asked.append({**ids, "question": f"{question.text[0].upper()}{question.text[1:]}"})
            answered.append({**ids, "answer_type": kind, "multiple_choice_answer": question.answer, "answers": said})
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"data_type": "mscoco", "data_subtype": _SPLIT, "task_type": "Open-Ended"}
    _write_json(folder / f"v2_OpenEnded_mscoco_{_SPLIT}_questions.json", {**facts, "questions": asked})
    _write_json(folder / f"v2_mscoco_{_SPLIT}_annotations.json", {**facts, "annotations": answered})
    return len(asked)


def _of_each_kind(scene: Scene, rng: random.Random) -> dict[str, Question]:
    """VQAv2's kind of answer -> a question that has it."""
    there, missing = _objects(scene)
    wanted = rng.random() < 0.5
    named = rng.choice(there if wanted else missing)
    things = scene.things
    what, count = ("shapes", things.count) if things else ("things with writing", COUNTS[1])
    other = pick_question(scene, rng, reading_share=0.5)
    while other.answer in COUNTS or other.answer in DIGITS:
        other = pick_question(scene, rng, reading_share=0.2)
    return {
        "yes/no": Question(f"is there a {named} in the picture?", "yes" if wanted else "no", False),
        "number": Question(f"how many {what} are there?", str(COUNTS.index(count) + 1), False),
        "other": other,
    }


def _objects(scene: Scene) -> tuple[list[str], list[str]]:
    """What is in the picture, and what is not."""
    found = {item.kind if isinstance(item, Writing) else item.shape for item in (scene.upper, scene.lower)}
    return [name for name in _OBJECTS if name in found], [name for name in _OBJECTS if name not in found]


def _write_pope(folder: Path, scenes: Sequence[Scene], rng: random.Random) -> int:
    """Both objects of every picture, and as many that are not there: drawn at random, the most frequent of all
    pictures, and those that most often stand beside what is there.
    """
    frequent = Counter(name for scene in scenes for name in _objects(scene)[0])
    beside = {name: Counter[str]() for name in _OBJECTS}
    for scene in scenes:
        one, other = _objects(scene)[0]
        beside[one][other] += 1
        beside[other][one] += 1
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for kind in KINDS_OF_ABSENCE:
        lines: list[dict[str, object]] = []
        for number, scene in enumerate(scenes):
            there, missing = _objects(scene)
            together = sum((beside[name] for name in there), Counter[str]())
            rank = {"random": lambda name: rng.random(), "popular": lambda name: -frequent[name]}.get(
                kind, lambda name, together=together: -together[name]
            )
            absent = sorted(missing, key=rank)[: len(there)]
            for name, label in [(n, "yes") for n in there] + [(n, "no") for n in absent]:
                text = f"Is there a {name} in the image?"
                lines.append({"question_id": len(lines) + 1, "image": _picture(number), "text": text, "label": label})
        (folder / f"coco_pope_{kind}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        total += len(lines)
    return total


def _write_mmbench(folder: Path, scenes: Sequence[Scene], files: Sequence[Path], rng: random.Random) -> int:
    """A question about every picture, and below all of them their copies with rotated options."""
    rows, copies = [], []
    for index, (scene, file) in enumerate(zip(scenes, files, strict=True), 1):
        text, answer, options, category = _choice(scene, rng)
        rng.shuffle(options)
        facts = {"question": text, "category": category, "source": "captune sample"}
        facts["l2-category"] = _FAMILIES[category]
        for shift in range(len(options)):
            turned = options[shift:] + options[:shift]
            row = facts | dict(zip("ABCD", turned, strict=False)) | {"answer": "ABCD"[turned.index(answer)]}
            if shift == 0:
                rows.append(row | {"index": index, "image": base64.b64encode(file.read_bytes()).decode()})
            else:
                copies.append(row | {"index": _ROTATION * shift + index, "image": index})
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mmbench_dev.tsv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, _COLUMNS, restval="", delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows([*rows, *copies])
    return len(rows)


_FAMILIES = {
    "ocr": "finegrained_perception (instance-level)",
    "attribute_recognition": "finegrained_perception (instance-level)",
    "object_localization": "finegrained_perception (instance-level)",
    "spatial_relationship": "finegrained_perception (cross-instance)",
}
"""MMBench's names of the kinds of questions that are asked here, and of the larger kinds they belong to."""


def _choice(scene: Scene, rng: random.Random) -> tuple[str, str, list[str], str]:
    """Question, right option, all options, category."""
    item = rng.choice(scene.writings)
    category = rng.choice(list(_FAMILIES))
    if category == "ocr":
        words = next(each for each in (SIGN_WORDS, LABEL_WORDS, DIGITS, [f"${d}" for d in DIGITS]) if item.text in each)
        return f"What is written on the {item.kind}?", item.text, _with_others(item.text, words, 3, rng), category
    if category == "attribute_recognition":
        return f"What color is the {item.kind}?", item.color, _with_others(item.color, COLORS, 3, rng), category
    if category == "object_localization":
        half = "in the upper half" if item is scene.upper else "in the lower half"
        return f"Where is the {item.kind}?", half, ["in the upper half", "in the lower half"], category
    other = scene.lower if item is scene.upper else scene.upper
    name = other.kind if isinstance(other, Writing) else other.shape
    place = "above" if other is scene.upper else "below"
    return f"What is {place} the {item.kind}?", name, _with_others(name, _objects(scene)[1], 2, rng), category


def _with_others(right: str, names: Iterable[str], number: int, rng: random.Random) -> list[str]:
    return [right, *rng.sample([name for name in names if name != right], number)]


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
