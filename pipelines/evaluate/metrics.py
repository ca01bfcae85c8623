"""TextVQA's answer normalization and ten-answer soft score, equal to the reference evaluator on every input.

The reference is `m4c_evaluator.py` of Pythia/MMF (Singh et al., "Towards VQA Models That Can Read", 2019), which
LLaVA's and MGM's TextVQA scripts use unchanged, and with it every published score. Its oddities are part of the metric
and stand here on purpose:

- Commas and question marks vanish before anything else, so its rule for thousands separators never fires, and it has
  none here.
- A punctuation mark is deleted where it touches a space *anywhere* in the answer, and becomes a space otherwise;
  "anywhere" is judged on the answer as it was before the first mark was replaced.
- Only the first 32 periods go (`re.UNICODE`, which is 32, was passed as the `count` of `Pattern.sub`), and one before a
  digit stays.
- `somebody'd` loses its apostrophe, "none" is 0, and nothing above ten is a number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ANSWERS = 10
"""Human answers per question; the soft score is defined for exactly this many."""

_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_STRIPPED = 32
_MARKS = tuple(';/[]"{}()=+\\_-><@`!')
_VQA_MARKS = tuple(';/[]"{}()=+\\_-><@`,?!')
_SEPARATED = re.compile(r"\d,\d")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

# The apostrophe's place, as the reference's table has it: without apostrophes -> with. `Id've`, `Im` and the like are
# left out because the lookup happens in lower case and never finds them.
_CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
# Two apostrophes: both ways of losing one of them. `hed've` -> `he'd've` <- `he'dve`.
_CONTRACTED_TWICE = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
for _word in _CONTRACTED_TWICE.split():
    _stem, _middle, _end = _word.split("'")
    _CONTRACTIONS[f"{_stem}{_middle}'{_end}"] = _CONTRACTIONS[f"{_stem}'{_middle}{_end}"] = _word
_CONTRACTIONS |= {
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def normalize(answer: str) -> str:
    """The answer as it is compared: lower case, no articles, digits for words, apostrophes where English has them."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _in_words(_strip_marks(text, _MARKS))


def _strip_marks(text: str, marks: Sequence[str], leave_no_space: bool = False) -> str:
    stripped = text
    for mark in marks:
        touches_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if touches_space or leave_no_space else " ")
    return _PERIOD.sub("", stripped, count=_PERIODS_STRIPPED)


def _in_words(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def answer_scores(answers: Sequence[str]) -> dict[str, float]:
    """Soft score of every normalized answer that some human gave: the mean, over leaving out one human at a time, of
    min(1, how many of the other nine said the same / 3).

    Raises:
        ValueError: not ten answers.
    """
    if len(answers) != ANSWERS:
        raise ValueError(f"{len(answers)} answers where the soft score needs {ANSWERS}")
    normalized = [normalize(answer) for answer in answers]
    scores = {}
    for answer in set(normalized):
        count = normalized.count(answer)
        # Summed human by human: in floating point the order decides the last bit, and it is the reference's.
        scores[answer] = sum(min(1, (count - (other == answer)) / 3) for other in normalized) / ANSWERS
    return scores


def soft_score(prediction: str, answers: Sequence[str]) -> float:
    """Score of one answer in [0, 1]."""
    return answer_scores(answers).get(normalize(prediction), 0.0)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's score of one answer in [0, 1], equal to the official evaluator (GT-Vision-Lab/VQA, `vqaEval.py`).

    Its oddities: where all humans say the same, nothing is normalized, so `Yes` is wrong where all say `yes`; question
    marks and commas are marks as any other; a number with a thousands separator loses every mark without a space in its
    place.
    """
    said, *told = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(told)) > 1:
        said, *told = (_normalize_vqa(text) for text in (said, *told))
    same = told.count(said)
    return sum(min(1.0, (same - (other == said)) / 3) for other in told) / len(told)


def _normalize_vqa(answer: str) -> str:
    return _in_words(_strip_marks(answer, _VQA_MARKS, leave_no_space=_SEPARATED.search(answer) is not None))
