"""CIDEr-D of captions against several references (Vedantam et al. 2015, arXiv:1411.5726), equal to `pycocoevalcap`'s.

Its oddities: the length that the penalty is about is counted in pairs of words; and brackets stay as the tokens of the
Penn Treebank, because they are looked for in capitals after all has been made small.

The tokens there come from Stanford's tokenizer, a Java program of thousands of rules. Those that English captions meet
stand here; tests/pipelines/evaluate/reference_cider.json has what it says to a table of oddities. A text beyond those
may be cut differently.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

LARGEST = 10.0
"""CIDEr-D of a caption that is its references. Papers report 100 times the value."""
_ORDERS, _SIGMA = 4, 6.0
_TOKEN = re.compile(
    r"""
    <[a-z/!][^<>\s]*>                            # a tag
    | (?:[a-z]\.){2,}                            # u.s.
    | (?:dr|mr|mrs|ms|st|ave|etc|inc|vs|jr|sr|co|corp|ltd|no(?=\.\s\d))\.
    | '\d\d(?!\d) | '(?:s|re|ve|ll|d|m)(?!\w) | 'n' | n't(?!\w)
    | can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b)
    | \w+?(?=n't(?!\w))                          # do n't
    | c(?:\#|\+\+)(?!\w) | @\w+ | (?-i:[A-Z]+(?:&[A-Z]+)+)
    | (?:[odl]'(?=\w\w))?\w+(?:[-/.]\w+|(?<=\d)[,:]\d+)*
    | [?!]{2,} | \.{2,} | -- | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_DROPPED = frozenset(("'", "`", '"', ".", "?", "!", ",", ":", "-", "--", "..", "...", ";"))
_WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "€": "$"}

Vector = dict[tuple[str, ...], float]


def tokens(text: str) -> list[str]:
    """Words and marks as the score counts them."""
    found = (_WRITTEN.get(token, token).lower() for token in _TOKEN.findall(text))
    return [token for token in found if token not in _DROPPED]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, in [0, 10]. How rare a phrase is, all references together say: those of a part of a
    benchmark give other scores.

    Args:
        references: of each caption's picture.
    """
    counted = [[_phrases(text) for text in texts] for texts in references]
    pictures_with = Counter(phrase for texts in counted for phrase in {phrase for text in texts for phrase in text})
    total = math.log(max(len(references), 1))

    def weigh(counts: Counter[tuple[str, ...]]) -> tuple[list[Vector], list[float], int]:
        vectors: list[Vector] = [{} for _ in range(_ORDERS)]
        for phrase, count in counts.items():
            vectors[len(phrase) - 1][phrase] = count * (total - math.log(max(1, pictures_with[phrase])))
        norms = [math.sqrt(math.fsum(weight**2 for weight in vector.values())) for vector in vectors]
        return vectors, norms, sum(count for phrase, count in counts.items() if len(phrase) == 2)

    scores = []
    for caption, texts in zip(captions, counted, strict=True):
        said = weigh(_phrases(caption))
        alike = [_alike(said, weigh(text)) for text in texts]
        scores.append(LARGEST * math.fsum(alike) / len(alike) if alike else 0.0)
    return scores


def _phrases(text: str) -> Counter[tuple[str, ...]]:
    words = tokens(text)
    return Counter(
        tuple(words[at : at + order]) for order in range(1, _ORDERS + 1) for at in range(len(words) - order + 1)
    )


def _alike(said: tuple[list[Vector], list[float], int], told: tuple[list[Vector], list[float], int]) -> float:
    """Mean over the orders of the clipped cosine, less for captions of another length."""
    penalty = math.exp(-((said[2] - told[2]) ** 2) / (2 * _SIGMA**2))
    total = 0.0
    for ours, theirs, norm, other in zip(said[0], told[0], said[1], told[1], strict=True):
        if norm and other:
            shared = (
                min(weight, theirs[phrase]) * theirs[phrase] for phrase, weight in ours.items() if phrase in theirs
            )
            total += math.fsum(shared) / (norm * other)
    return penalty * total / _ORDERS
