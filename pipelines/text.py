"""How texts are measured: words, diversity, repetition; one definition for guards, manifests, metrics and report."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence


class Words:
    """Mean words and lexical diversity (unique words / words) of one text column, over rows without an error."""

    def __init__(self) -> None:
        self.texts = self.words = 0
        self.unique: set[str] = set()

    def add(self, texts: list[str | None]) -> None:
        """Count some texts; None is an empty one."""
        for text in texts:
            words = (text or "").lower().split()
            self.texts += 1
            self.words += len(words)
            self.unique.update(words)

    def summary(self) -> dict[str, float]:
        """mean_words and lexical_diversity; 0 where there are no words."""
        return {
            "mean_words": round(self.words / self.texts, 4) if self.texts else 0.0,
            "lexical_diversity": round(len(self.unique) / self.words, 4) if self.words else 0.0,
        }


def repetition(text: str) -> float:
    """Share of two-word sequences in a text that stand there more than once; Data-Juicer's `word_rep_ratio` at
    `rep_len` 2.
    """
    return _repetition(text.lower().split())


def _repetition(words: list[str]) -> float:
    pairs = Counter(zip(words, words[1:], strict=False))
    return sum(count for count in pairs.values() if count > 1) / max(pairs.total(), 1)


def words_of(text: str) -> list[str]:
    """Words of a text, see above."""
    stripped = (token.strip(string.punctuation) for token in text.lower().split())
    return [word for word in stripped if word]


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
