"""OpenAI's chat completions: what is accepted, what is refused and why, the shape of answers and of errors."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import secrets
import time
import uuid
import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipelines.images import BadImage, decode
from serve.config import ServeConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from serve.engine import Answer, Request

_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w.+=-]+)*;base64,", re.ASCII | re.IGNORECASE)
_MAX_ELONGATION = 4
"""The model pads to a square: a picture whose square has more than this many times `max_image_pixels` is refused."""


class ApiError(Exception):
    """A refusal that reaches the client as an OpenAI error body."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}` as OpenAI's clients expect it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


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


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None


class ChatRequest(_Strict):
    """The subset of OpenAI's request that this service honours. What it cannot honour is refused, never ignored."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = None
    stream: bool | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: bool | None = None
    user: str | None = None

    @field_validator("n", "stream", "top_p", "stop", "presence_penalty", "frequency_penalty", "logprobs")
    @classmethod
    def _only_the_default(cls, value: Any, info: Any) -> Any:
        """Clients send these with their defaults; anything else would change the answer in a way that is not built."""
        default = {"n": 1, "stream": False, "top_p": 1, "stop": [], "logprobs": False}.get(info.field_name, 0)
        if value is not None and value != default:
            raise ValueError(f"only {json.dumps(default)} is supported, not {json.dumps(value)}")
        return value


def parse(body: bytes, model: str, config: ServeConfig) -> tuple[ChatRequest, Request]:
    """Request body -> the validated request and what the engine needs, pictures decoded.

    Raises:
        ApiError: 404 for another model, 413 for a picture too large in bytes, 400 for everything else that is wrong
            with it.
    """
    from serve.engine import Request

    chat = _validate(body)
    if chat.model != model:
        raise ApiError(
            404,
            f"the model '{chat.model}' does not exist here; this is '{model}'",
            param="model",
            code="model_not_found",
        )
    limit = chat.max_completion_tokens or chat.max_tokens or config.max_new_tokens
    if limit > config.max_new_tokens:
        key = "max_completion_tokens" if chat.max_completion_tokens else "max_tokens"
        raise ApiError(400, f"{key} is {limit}, the limit here is {config.max_new_tokens}", param=key)
    if chat.messages[-1].role != "user":
        raise ApiError(400, "the last message must be the user's", param=f"messages.{len(chat.messages) - 1}.role")
    messages, images = _unpack(chat.messages, config)
    seed = chat.seed if chat.seed is not None else secrets.randbits(63)
    temperature = 1.0 if chat.temperature is None else chat.temperature
    return chat, Request(messages, images, limit, temperature, seed)


def completion(chat: ChatRequest, answer: Answer, identity: str) -> dict[str, Any]:
    """A finished answer as `chat.completion`; its `system_fingerprint` is the model's `identity`."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": chat.model,
        "system_fingerprint": identity,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish_reason,
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
    }


def models(model: str, created: int, identity: str) -> dict[str, Any]:
    """`GET /v1/models`; beside OpenAI's fields, `identity` says which directory answers (`model_identity`)."""
    entry = {"id": model, "object": "model", "created": created, "owned_by": "captune", "identity": identity}
    return {"object": "list", "data": [entry]}


def _validate(body: bytes) -> ChatRequest:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return ChatRequest.model_validate(content)
    except ValidationError as error:
        # `content` may be a text or a list: the deeper complaint is about the one that was meant.
        worst = max(error.errors(), key=lambda entry: len(entry["loc"]))
        param = _param(worst["loc"])
        code = "unknown_parameter" if worst["type"] == "extra_forbidden" else None
        raise ApiError(400, f"{param}: {worst['msg'].removeprefix('Value error, ')}", param=param, code=code) from None


def _param(location: tuple[str | int, ...]) -> str:
    """`messages.0.content.1.image_url.url`: pydantic's path without the names of union members."""
    path = [str(step) for step in location if not (isinstance(step, str) and "[" in step)]
    if len(path) > 3 and path[2] == "content":
        if path[3] == "str":
            del path[3]
        elif len(path) > 4:
            del path[4]  # the kind of part
    return ".".join(path)


def _unpack(messages: list[Message], config: ServeConfig) -> tuple[list[dict[str, Any]], list[Image]]:
    unpacked: list[dict[str, Any]] = []
    images: list[Image] = []
    for turn, message in enumerate(messages):
        parts: list[dict[str, Any]] = []
        for place, part in enumerate(
            [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        ):
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            if len(images) == config.max_images:
                raise ApiError(400, f"more than {config.max_images} pictures in one request", param="messages")
            images.append(_picture(part.image_url.url, f"messages.{turn}.content.{place}.image_url.url", config))
            parts.append({"type": "image"})
        unpacked.append({"role": message.role, "content": parts})
    return unpacked, images


def _picture(url: str, param: str, config: ServeConfig) -> Image:
    head = _DATA_URL.match(url)
    if head is None:
        said = "" if url.startswith("data:") else "; pictures are never fetched from elsewhere"
        raise ApiError(400, f"{param} must be a data URL, data:image/...;base64,...{said}", param=param)
    if (len(url) - head.end()) * 3 // 4 > config.max_image_bytes:
        raise ApiError(413, f"{param}: the picture is larger than {config.max_image_bytes:,} bytes", param=param)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param}: not valid base64 ({error})", param=param) from None
    try:
        _check_size(data, config.max_image_pixels)
        return decode(data)
    except BadImage as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from None


def _check_size(data: bytes, max_pixels: int) -> None:
    """Refuse by the header, before any pixel is decoded. What has no readable header is left to `decode` to refuse."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = Image.open(io.BytesIO(data)).size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return
    if width * height > max_pixels or max(width, height) ** 2 > _MAX_ELONGATION * max_pixels:
        raise BadImage(f"too large: {width}x{height} pixels (limit {max_pixels:,})")
