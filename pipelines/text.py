"""How texts are measured: what a word is, how texts repeat themselves, how varied they are. The only definition.

A word is what stands between white space, in lower case, without punctuation, symbols or emoji at its ends, whatever
their script. Numbers are words (a price is what a caption says). Chinese, Japanese, Thai, Lao, Khmer and Burmese are
written without spaces; there each character, with the marks that belong to it, is a word: it needs no dictionary and
no model, it is the usual unit for scores of Chinese text, and it shows loops. It makes texts of these languages longer
and less diverse than a person would count, so compare them only with texts of the same language.
"""

from __future__ import annotations

import hashlib
import math
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import regex

if TYPE_CHECKING:
    import numpy as np

WORD_NGRAM = 2
"""Words of a sequence that `word_repetition` looks for. Data-Juicer's default of 10 cannot repeat inside a caption of
ten words."""
CHAR_NGRAM = 10
"""Characters of a sequence that `char_repetition` looks for; Data-Juicer's default."""
MATTR_WINDOW = 500
"""Words per window. Some fifty captions: wide enough to see that captions repeat one another, small enough for a small
dataset."""
_FRESH_WORDS = 1 << 17

_UNSPACED = regex.compile(
    r"(?V1)[[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&\p{L}]"
    r"[\p{M}\N{KATAKANA-HIRAGANA PROLONGED SOUND MARK}]*"
)
_ENDS = regex.compile(r"^[\p{P}\p{S}\p{Cf}\p{M}]+|[\p{P}\p{S}\p{Cf}\p{Me}\N{VARIATION SELECTOR-16}]+$")
_NO_LETTERS = string.punctuation + string.digits


def words_of(text: str) -> list[str]:
    """Words of a text, see above."""
    text = text.lower()
    if text.isascii():  # most captions; all of Unicode's punctuation and symbols below 128 are `string.punctuation`
        tokens = text.split()
        return [w for token in tokens if (w := token if token.isalnum() else token.strip(string.punctuation))]
    spaced = _UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFC", text))
    return [word for token in spaced.split() if (word := _bare(token))]


def has_unspaced(text: str) -> bool:
    """Whether white space alone would not find the words of a text."""
    return not text.isascii() and _UNSPACED.search(text) is not None


@lru_cache(maxsize=1 << 15)
def _bare(token: str) -> str:
    return token if token.isalnum() else _ENDS.sub("", token)


def word_repetition(words: Sequence[str]) -> float:
    """Share of a text's sequences of two words that stand there more than once.

    This is Data-Juicer's `word_rep_ratio`: as there, numbers are left out ("5 stars 6 stars 7 stars" repeats itself).
    """
    words = [w for word in words if (w := word if word.isalpha() else word.strip(_NO_LETTERS))]
    pairs = list(zip(words, words[1:], strict=False))
    if len(set(pairs)) == len(pairs):
        return 0.0
    return sum(count for count in Counter(pairs).values() if count > 1) / len(pairs)


def char_repetition(text: str) -> float:
    """Share of a text's sequences of ten characters that are of its most repeated kinds; Data-Juicer's
    `char_rep_ratio`. Of n different sequences those above the square root of n in rank do not count.
    """
    sequences = [text[start : start + CHAR_NGRAM] for start in range(len(text) - CHAR_NGRAM + 1)]
    if len(set(sequences)) == len(sequences):
        return 0.0
    counts = Counter(sequences)
    repeated = sorted((count for count in counts.values() if count > 1), reverse=True)
    return sum(repeated[: math.isqrt(len(counts))]) / len(sequences)


def mattr(stream: Sequence[int], window: int) -> float | None:
    """Mean of distinct / `window` over all windows of consecutive word numbers, in one sweep; None when the stream is
    shorter.
    """
    if len(stream) < window:
        return None
    inside: Counter[int] = Counter(stream[:window])
    total = distinct = len(inside)
    for leaving, entering in zip(stream, stream[window:], strict=False):
        inside[leaving] -= 1
        distinct -= inside[leaving] == 0
        distinct += inside[entering] == 0
        inside[entering] += 1
        total += distinct
    return round(total / (window * (len(stream) - window + 1)), 6)


class Vocabulary:
    """How many different words there are among many. Those seen lately are kept as they are, the others as 64 bits of
    their digest: of ten million, two have the same with a probability of three in a million.
    """

    def __init__(self) -> None:
        self._fresh: set[str] = set()
        self._digests: list[np.ndarray] = []  # sorted; each is larger than all after it

    def add(self, words: Iterable[str]) -> None:
        """Words that count, however often they come."""
        self._fresh.update(words)
        if len(self._fresh) > _FRESH_WORDS:
            self._fold()

    def merge(self, other: Vocabulary) -> None:
        """Count the words of another one, too."""
        for digests in other._digests:
            self._keep(digests)
        self.add(other._fresh)

    def __len__(self) -> int:
        if not self._digests:
            return len(self._fresh)
        import numpy as np

        self._fold()
        self._digests = [np.unique(np.concatenate(self._digests))]
        return len(self._digests[0])

    def _fold(self) -> None:
        import numpy as np

        digests = b"".join(hashlib.blake2b(word.encode(), digest_size=8).digest() for word in self._fresh)
        self._keep(np.unique(np.frombuffer(digests, np.uint64)))
        self._fresh = set()

    def _keep(self, digests: np.ndarray) -> None:
        """Arrays of like size become one, so that each digest is sorted a few times only."""
        import numpy as np

        while self._digests and len(self._digests[-1]) <= len(digests):
            digests = np.union1d(self._digests.pop(), digests)
        self._digests.append(digests)


class Texts:
    """Counts of many texts, added piece by piece: what is cheap enough for a run over millions."""

    def __init__(self) -> None:
        self.rows = self.texts = self.words = 0
        self.repetition = 0.0
        self.vocabulary = Vocabulary()

    def add(self, texts: Iterable[str | None]) -> None:
        """Count some texts; None is the text of a row that failed, and is no text at all."""
        for text in texts:
            self.rows += 1
            if text is not None:
                words = words_of(text)
                self.texts += 1
                self.words += len(words)
                self.repetition += word_repetition(words)
                self.vocabulary.add(words)

    def merge(self, other: Texts) -> None:
        """Count the texts of another one, too."""
        self.rows += other.rows
        self.texts += other.texts
        self.words += other.words
        self.repetition += other.repetition
        self.vocabulary.merge(other.vocabulary)

    def metrics(self) -> dict[str, Any]:
        """The figures that manifests, `captune stats` and `metrics.json` all hold; 0 where there is nothing to divide
        by.

        Returns:
            rows, and texts: rows that did not fail, which all means are over;
            words, unique_words;
            lexical_diversity: unique words / words. It falls as a corpus grows (Heaps' law), so compare it only at
                like sizes;
            mean_words: words / texts;
            word_rep_ratio: mean of `word_repetition` over the texts, at `word_rep_len` words.
        """
        unique = len(self.vocabulary)
        return {
            "rows": self.rows,
            "texts": self.texts,
            "words": self.words,
            "unique_words": unique,
            "lexical_diversity": _ratio(unique, self.words),
            "mean_words": _ratio(self.words, self.texts),
            "word_rep_ratio": _ratio(self.repetition, self.texts),
            "word_rep_len": WORD_NGRAM,
        }


def text_metrics(texts: Sequence[str | None]) -> dict[str, Any]:
    """All metrics of a list of texts, in its order; None is the text of a row that failed.

    Returns:
        Those of `Texts.metrics`, and
            mattr: lexical diversity at an equal number of words: the mean of unique words / words over every window of
                `mattr_window` consecutive words (moving-average type-token ratio, Covington and McFall 2010). None when
                there are fewer words;
            unique_texts: share of distinct texts among the texts;
            char_rep_ratio: mean of `char_repetition` over the texts, at `char_rep_len` characters.
    """
    found, given = Texts(), [text for text in texts if text is not None]
    found.add(texts)
    numbers: dict[str, int] = {}
    stream = [numbers.setdefault(word, len(numbers)) for text in given for word in words_of(text)]
    return {
        **found.metrics(),
        "mattr": mattr(stream, MATTR_WINDOW),
        "mattr_window": MATTR_WINDOW,
        "unique_texts": _ratio(len(set(given)), len(given)),
        "char_rep_ratio": _ratio(sum(map(char_repetition, given)), len(given)),
        "char_rep_len": CHAR_NGRAM,
    }


def usable_texts(texts: Iterable[str | None], errors: Iterable[str | None]) -> list[str | None]:
    """A column of records as it is measured: None where the row failed, whatever text it has; empty where a good row
    has none.
    """
    return [None if error else text or "" for text, error in zip(texts, errors, strict=True)]


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 6) if whole else 0.0
