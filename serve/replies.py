"""Answers in OpenAI's form: whole, as a stream of chunks, and the list of models."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.engine import Answer
    from serve.writing import Spoken

DONE = "data: [DONE]\n\n"
"""Ends every stream."""


def completion(model: str, answers: Sequence[Answer], identity: str, logprobs: bool = False) -> dict[str, Any]:
    """Finished answers to one request as `chat.completion`; its `system_fingerprint` is the model's `identity`."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "finish_reason": answer.finish_reason,
            "logprobs": _logprobs(answer.spoken) if logprobs else None,
        }
        for index, answer in enumerate(answers)
    ]
    head = _head("chat.completion", model, identity)
    return head | {"choices": choices, "usage": usage(answers)}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens of one request with all its answers; they share their prompt."""
    prompt, said = answers[0].prompt_tokens, sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


class Chunks:
    """Events of one streamed request, as `data:` lines; the last one before `DONE` has the usage, when asked for."""

    def __init__(self, model: str, identity: str, *, include_usage: bool, logprobs: bool) -> None:
        self.head = _head("chat.completion.chunk", model, identity)
        self.include_usage, self.logprobs = include_usage, logprobs

    def begin(self, index: int) -> str:
        """Who speaks."""
        return self._choice(index, {"role": "assistant", "content": "", "refusal": None})

    def text(self, index: int, text: str, spoken: Sequence[Spoken]) -> str:
        """A piece of the answer with the tokens that it was made of."""
        return self._choice(index, {"content": text}, spoken=spoken)

    def end(self, index: int, finish_reason: str) -> str:
        """Why this answer ends."""
        return self._choice(index, {}, finish_reason=finish_reason)

    def usage(self, answers: Sequence[Answer]) -> str:
        """The count of tokens, with no choice; nothing where it was not asked for."""
        return event(self.head | {"choices": [], "usage": usage(answers)}) if self.include_usage else ""

    def _choice(
        self, index: int, delta: dict[str, Any], spoken: Sequence[Spoken] = (), finish_reason: str | None = None
    ) -> str:
        logprobs = _logprobs(spoken) if self.logprobs and "content" in delta else None
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        return event(self.head | {"choices": [choice]} | ({"usage": None} if self.include_usage else {}))


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def model_entry(model: str, created: int, identity: str) -> dict[str, Any]:
    """One model; beside OpenAI's fields, `identity` says which directory answers (`model_identity`)."""
    return {"id": model, "object": "model", "created": created, "owned_by": "captune", "identity": identity}


def _head(kind: str, model: str, identity: str) -> dict[str, Any]:
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {
        "id": name,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": identity,
    }


def _logprobs(spoken: Sequence[Spoken]) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        entry(token.text, token.logprob) | {"top_logprobs": [entry(text, value) for text, value in token.others]}
        for token in spoken
    ]
    return {"content": content, "refusal": None}
