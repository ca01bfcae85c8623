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
    another_scene,
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


_FOREIGN = (
    "cartel rojo",
    "ein blaues Schild",
    "étiquette verte",
    "cartello giallo",
    "preço do dia",
    "値札",
    "camiseta",
)


def poor_caption(scene: Scene, rng: random.Random) -> str:
    """Alt-text as the web has it. But for other languages it is made of words that the small language model learned in
    good captions: what is wrong with it is what it says.

    Of a hundred: 22 are a file's name, 16 a site's, 30 name the thing and little else (a colour of it may be wrong), 13
    belong to another picture, 8 are words for search engines, 5 are of another language, and 6 are right.
    """
    draw, writing = rng.random(), rng.choice(scene.writings)
    if draw < 0.22:
        return f"{writing.kind} {' '.join(rng.choices(DIGITS, k=rng.randint(1, 3)))}"
    if draw < 0.38:
        return " ".join(rng.sample([*SIGN_WORDS, *LABEL_WORDS], rng.randint(2, 4)))
    if draw < 0.68:
        return _half_true(scene, writing, rng)
    if draw < 0.81:
        return caption(another_scene("pairs", rng))
    if draw < 0.89:
        return " ".join([rng.choice((*KINDS, *COLORS, "sale", "shoes", "toys"))] * rng.randint(5, 12))
    if draw < 0.94:
        return rng.choice(_FOREIGN)
    return caption(scene)


def _half_true(scene: Scene, writing: Writing, rng: random.Random) -> str:
    """The right thing in a colour that is right every other time; and perhaps a shape, as often right. Never what is
    written.
    """
    color = writing.color if rng.random() < 0.5 else rng.choice([*COLORS])
    said = f"a {color} {writing.kind}"
    if scene.things is not None and rng.random() < 0.4:
        shape = scene.things.shape if rng.random() < 0.5 else rng.choice(SHAPES)
        said += f" {rng.choice(('above', 'below'))} a {shape}"
    return said


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


_SEEN_BY_TOKENIZERS = (
    "image of a photo of a picture of the image",
    "photo of a picture of the image for sale",
    "picture of a photo of the picture",
    "image of the photo of the photo for sale",
    "a photo of the picture of a photo of a photo",
    "the picture of the image of a picture of the photo for sale",
    "image",
    "photo photo photo photo photo photo",
    "image image image image image",
    "!!! ??? !!!",
    "for sale for sale",
)
"""The alt-text that the tokenizers which come with captune were trained on; others would have other tokens."""


def vocabulary_text() -> list[str]:
    """Sentences that hold every word and prompt of the world, for training the tokenizers."""
    words = [*SIGN_WORDS, *LABEL_WORDS, *COLORS, *SHAPES, *(s + "s" for s in SHAPES), "crosses", *COUNTS, *KINDS]
    lines = [" ".join(words), " ".join(f"${d}" for d in DIGITS), " ".join(DIGITS)]
    lines += ["a an that says that reads of with number above below and in the picture"]
    lines += [*_SEEN_BY_TOKENIZERS, SHORT_ANSWER, "dollars unanswerable unknown none nothing written empty"]
    lines += [question for questions_of in _READING.values() for question in questions_of]
    lines += [f"what color is the {kind}? how many shapes are above below the {kind}? what shape" for kind in KINDS]
    return lines
