"""What becomes of one row's tokens while they come: text, its end, and the pieces that a stream sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Hear = Callable[[str, "Sequence[Spoken]"], None]
"""Takes the next piece of an answer's text and the tokens since the last piece; called in the generating thread."""


@dataclass
class Spoken:
    """One token of an answer: its text, the logarithm of its probability, and the likeliest others with theirs."""

    text: str
    logprob: float
    others: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Logprobs:
    """Natural logarithms of one step: that of the token taken, and the likeliest tokens with theirs."""

    chosen: float
    top: list[tuple[int, float]]


class Writer:
    """Follows one row.

    Args:
        stop_ids: tokens that end an answer and are no part of its text.
        stops: texts that do so.
        limit: most tokens.
        hear: gets the text piece by piece. What may still become a stop text, half a character, or white space at the
            answer's end waits; all pieces together are `text`.
        sent: characters and tokens that `hear` got when this row was written before, in a batch that had to be halved.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        stops: Sequence[str],
        limit: int,
        hear: Hear | None = None,
        sent: tuple[int, int] = (0, 0),
    ) -> None:
        self.tokenizer, self.stop_ids, self.stops, self.limit, self.hear = tokenizer, stop_ids, stops, limit, hear
        self.tokens: list[int] = []
        self.spoken: list[Spoken] = []
        self.count = 0
        self.finish_reason = ""
        self._raw = ""
        self._sent, self._sent_tokens = sent

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return bool(self.finish_reason)

    @property
    def sent(self) -> tuple[int, int]:
        """For the `sent` of another one."""
        return self._sent, self._sent_tokens

    @property
    def text(self) -> str:
        """The answer so far, without white space around it."""
        if not (self.stops or self.hear):
            self._raw = self._decode(self.tokens)
        return self._raw.strip()

    def push(self, token: int, logprobs: Logprobs | None = None) -> bool:
        """The row's next token; true once the answer is complete, and then nothing more is taken."""
        if self.done:
            return True
        self.count += 1
        if token in self.stop_ids:
            self.finish_reason = "stop"
        else:
            if logprobs is not None:
                self._speak(token, logprobs)
            self.tokens.append(token)
            self._look_for_stops()
            if not self.done and self.count == self.limit:
                self.finish_reason = "length"
        self._tell()
        return self.done

    def _look_for_stops(self) -> None:
        if not (self.stops or self.hear):
            return
        self._raw = self._decode(self.tokens)
        found = [place for stop in self.stops if (place := self._raw.find(stop)) >= 0]
        if found:
            self._raw = self._raw[: min(found)]
            self.finish_reason = "stop"

    def _tell(self) -> None:
        if self.hear is None:
            return
        ready = self._raw.lstrip() if self.done else self._raw[: len(self._raw) - self._unsettled()].lstrip()
        ready = ready.rstrip()
        if len(ready) > self._sent or (self.done and len(self.spoken) > self._sent_tokens):
            self.hear(ready[self._sent :], self.spoken[self._sent_tokens :])
            self._sent, self._sent_tokens = max(len(ready), self._sent), len(self.spoken)

    def _unsettled(self) -> int:
        """Characters at the end that the next token may still change or take away."""
        broken = len(self._raw) - len(_whole(self._raw))
        begun = [
            length
            for stop in self.stops
            for length in range(1, min(len(stop), len(self._raw) + 1))
            if self._raw.endswith(stop[:length])
        ]
        return max([broken, *begun])

    def _speak(self, token: int, logprobs: Logprobs) -> None:
        """The text that a token adds; of a character that several tokens spell, the last one has it."""
        before = _whole(self._decode(self.tokens))

        def piece(each: int) -> str:
            return _whole(self._decode([*self.tokens, each]))[len(before) :]

        others = [(piece(each), value) for each, value in logprobs.top]
        self.spoken.append(Spoken(piece(token), logprobs.chosen, others))

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def _whole(text: str) -> str:
    """Without what may be half a character at the end."""
    return text.rstrip("\ufffd")
