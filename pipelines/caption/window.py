"""What was said lately: the last rows of a run, and what their captions are like."""

from __future__ import annotations

from collections import Counter, deque

from pipelines.text import word_repetition, words_of


class Window:
    """The last `size` rows. Sums go along with what enters and leaves, since every batch of every replica asks for
    them.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # caption (None: failed), its words and repetition
        self._rows: deque[tuple[str | None, list[str], float]] = deque()
        self._vocabulary: Counter[str] = Counter()
        self._captions = self._words = 0
        self._repetition = 0.0

    def add(self, text: str | None) -> None:
        """One more row: its caption, None when it failed."""
        words = words_of(text or "")
        self._rows.append((text, words, word_repetition(words)))
        self._count(self._rows[-1], 1)
        if len(self._rows) > self._size:
            self._count(self._rows.popleft(), -1)

    @property
    def rows(self) -> int:
        """Rows in the window, failed ones among them."""
        return len(self._rows)

    @property
    def error_share(self) -> float:
        """Share of the rows that failed."""
        return (self.rows - self._captions) / max(self.rows, 1)

    @property
    def mean_words(self) -> float:
        """Words per caption."""
        return self._words / max(self._captions, 1)

    @property
    def lexical_diversity(self) -> float:
        """Unique words / words."""
        return len(self._vocabulary) / max(self._words, 1)

    @property
    def repetition(self) -> float:
        """Mean of `word_repetition` over the captions."""
        return self._repetition / max(self._captions, 1)

    def most_repetitive(self) -> str:
        """The caption that repeats itself most."""
        return max(self._rows, key=lambda row: row[2])[0] or ""

    def _count(self, row: tuple[str | None, list[str], float], sign: int) -> None:
        text, words, repeated = row
        self._captions += sign * (text is not None)
        self._words += sign * len(words)
        self._repetition += sign * repeated
        for word in words:
            self._vocabulary[word] += sign
            if not self._vocabulary[word]:
                del self._vocabulary[word]
