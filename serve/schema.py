"""OpenAI's chat completions request: what is honoured, what is let pass because it changes nothing, what is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "refusal": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "name": (),
}
"""Values that ask for nothing, which clients send all the same; null is one everywhere. Any other would change the
answer in a way that is not built, and is refused."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _WithNeutral(_Strict):
    @field_validator(*_NEUTRAL, check_fields=False)
    @classmethod
    def _neutral(cls, value: Any, info: Any) -> Any:
        allowed = _NEUTRAL[info.field_name]
        if value is None or any(value == each and type(value) in (type(each), float) for each in allowed):
            return value
        said = " or ".join(json.dumps(each) for each in (None, *allowed))
        raise ValueError(f"only {said} is supported, not {json.dumps(value)[:80]}")


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """`detail` is accepted and has no effect: the model has one resolution."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """A picture inside a message, as a data URL."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_WithNeutral):
    """One turn of the conversation; also an answer as the `openai` client dumps it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts, however it was sent."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(_Strict):
    """`include_obfuscation` pads events against whoever counts bytes on the wire; here it has no effect."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_WithNeutral):
    """The subset of OpenAI's request that this service honours. What it cannot honour is refused, never ignored."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    # Labels for the operator of a service: they change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    logit_bias: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    store: Any = None
    service_tier: Any = None
    verbosity: Any = None
    repetition_penalty: Any = None
    length_penalty: Any = None
    min_p: Any = None
    min_tokens: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    ignore_eos: Any = None
    skip_special_tokens: Any = None

    @model_validator(mode="after")
    def _belong_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer; an empty one ends nothing."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in found if text)
