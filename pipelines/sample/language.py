"""What is said about a scene: a good caption, the alt-text that the web would carry instead, questions and ten
human-like answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pipelines.sample.scene import (
    COLORS,
    COUNTS,
    DIGITS,
    KINDS,
    LABEL_WORDS,
    SHAPES,
    SIGN_WORDS,
    Scene,
    Things,
    Writing,
)

SHORT_ANSWER = "Answer the question using a single word or phrase."


def caption(scene: Scene) -> str:
    """The description a good captioner gives, e.g. `a yellow sign that says cafe above two red circles`."""
    upper, lower = scene.upper, scene.lower
    if isinstance(upper, Writing):
        return f"{phrase(upper)} above {phrase(lower)}"
    return f"{phrase(lower)} below {phrase(upper)}"


def phrase(item: Writing | Things) -> str:
    """One item of a scene in words."""
    if isinstance(item, Things):
        return f"{item.count} {item.color} {_plural(item)}"
    a = "an" if item.color == "orange" else "a"
    said = {
        "sign": f"sign that says {item.text}",
        "label": f"label that reads {item.text}",
        "price tag": f"price tag of {item.text}",
        "jersey": f"jersey with number {item.text}",
    }[item.kind]
    return f"{a} {item.color} {said}"


def _plural(item: Things) -> str:
    if len(item.columns) == 1:
        return item.shape
    return item.shape + ("es" if item.shape == "cross" else "s")


_BOILERPLATE = (
    "image of a photo of a picture of the image",
    "photo of a picture of the image for sale",
    "picture of a photo of the picture",
    "image of the photo of the photo for sale",
    "a photo of the picture of a photo of a photo",
    "the picture of the image of a picture of the photo for sale",
)
_JUNK = (
    "image",
    "photo photo photo photo photo photo",
    "image image image image image",
    "!!! ??? !!!",
    "for sale for sale",
)


def poor_caption(scene: Scene, rng: random.Random) -> str:
    """Web alt-text: boilerplate, repetition, a true word now and then, a wrong one as often; what is written is never
    transcribed.
    """
    draw = rng.random()
    boilerplate = rng.choice(_BOILERPLATE)
    if draw < 0.50:
        return boilerplate
    if draw < 0.70:  # right, but only what kind of thing it is
        return f"{boilerplate} of a {scene.writings[0].kind}"
    if draw < 0.85:  # wrong: written for another picture
        return f"photo of a {rng.choice(KINDS)} and the image of a {rng.choice(KINDS)}"
    if draw < 0.93:
        return " ".join([rng.choice(("photo", "image", "picture"))] * rng.randint(6, 14))
    return rng.choice(_JUNK)


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and whether reading is needed."""

    text: str
    answer: str
    reading: bool


def questions(scene: Scene) -> list[Question]:
    """Everything that is asked about a scene; reading first."""
    asked = []
    for item in scene.writings:
        asked += [Question(text, item.text, True) for text in _READING[item.kind]]
    for item in scene.writings:
        asked.append(Question(f"what color is the {item.kind}?", item.color, False))
    if (things := scene.things) is not None:
        place = "above" if isinstance(scene.upper, Things) else "below"
        kind = scene.writings[0].kind
        asked.append(Question(f"how many shapes are {place} the {kind}?", things.count, False))
        asked.append(Question(f"what shape is {place} the {kind}?", things.shape, False))
        asked.append(Question(f"what color is the {things.shape}?", things.color, False))
    return asked


_READING = {
    "sign": ("what does the sign say?", "what word is on the sign?"),
    "label": ("what does the label say?", "what word is on the label?"),
    "price tag": ("what is the price?", "how much does it cost?"),
    "jersey": ("what number is on the jersey?", "what is the number of the player?"),
}


def pick_question(scene: Scene, rng: random.Random, reading_share: float = 0.7) -> Question:
    """One question; `reading_share` of them need reading."""
    wanted = rng.random() < reading_share
    return rng.choice([question for question in questions(scene) if question.reading == wanted])


def human_answers(question: Question, rng: random.Random) -> list[str]:
    """Ten answers as ten people give them: most agree, some say it their way, one or two are off."""
    variants = {question.answer, question.answer.upper()}
    if question.answer in COUNTS:
        variants.add(str(COUNTS.index(question.answer) + 1))
    elif question.answer.startswith("$"):
        variants |= {f"{question.answer}.00", f"{question.answer[1:]} dollars"}
    elif question.answer in DIGITS:
        variants.add(f"number {question.answer}")
    elif question.reading:
        variants.add(f"the {question.answer}")
    others = sorted(variants - {question.answer})
    answers = []
    for _ in range(10):
        draw = rng.random()
        if draw < 0.80:
            answers.append(question.answer)
        elif draw < 0.93:
            answers.append(rng.choice(others))
        else:
            answers.append(rng.choice(("unanswerable", "unknown", _slip(question.answer, rng))))
    # A question whose own answer nobody gave would measure the annotators, not the model.
    return answers if answers.count(question.answer) >= 4 else [question.answer] * 6 + answers[:4]


def _slip(answer: str, rng: random.Random) -> str:
    """A typing slip: one character left out."""
    at = rng.randrange(len(answer))
    return answer[:at] + answer[at + 1 :] or "?"


def ocr_tokens(scene: Scene, rng: random.Random) -> list[str]:
    """What an OCR system gives along with TextVQA: mostly right, one token in ten misread."""
    tokens = [item.text.upper() for item in scene.writings]
    return [_slip(token, rng) if rng.random() < 0.1 and len(token) > 2 else token for token in tokens]


def vocabulary_text() -> list[str]:
    """Sentences that hold every word and prompt of the world, for training the tokenizers."""
    words = [*SIGN_WORDS, *LABEL_WORDS, *COLORS, *SHAPES, *(s + "s" for s in SHAPES), "crosses", *COUNTS, *KINDS]
    lines = [" ".join(words), " ".join(f"${d}" for d in DIGITS), " ".join(DIGITS)]
    lines += ["a an that says that reads of with number above below and in the picture"]
    lines += [*_BOILERPLATE, *_JUNK, SHORT_ANSWER, "dollars unanswerable unknown none nothing written empty"]
    lines += [question for questions_of in _READING.values() for question in questions_of]
    lines += [f"what color is the {kind}? how many shapes are above below the {kind}? what shape" for kind in KINDS]
    return lines
