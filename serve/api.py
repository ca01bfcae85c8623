"""A request's body -> what the engine needs, or a refusal that says what is wrong with it.

What costs little is looked at first: the form, then lengths and headers of pictures, and only then is a pixel decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import secrets
import warnings
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipelines.images import BadImage, decode
from serve.config import ServeConfig
from serve.errors import ApiError
from serve.schema import ChatRequest, ImagePart, Message, TextPart

if TYPE_CHECKING:
    from PIL.Image import Image

    from serve.engine import Request

_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w.+=-]+)*;base64,", re.ASCII | re.IGNORECASE)
_MAX_ELONGATION = 4
"""The model pads to a square: a picture whose square has more than this many times `max_image_pixels` is refused."""


def require_json(content_type: str) -> None:
    """Refuse a body that is not declared as JSON: text and forms are what any web page may send to this machine's own
    ports from its visitor's browser, without asking.

    Raises:
        ApiError: 415.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        said = f"'{content_type[:80]}'" if content_type else "missing"
        raise ApiError(415, f"the header Content-Type must be application/json, it is {said}")


def parse(
    body: bytes,
    model: str,
    config: ServeConfig,
    *,
    max_characters: int | None = None,
    see: Callable[[Image], Any] = lambda picture: picture,
) -> tuple[ChatRequest, Request]:
    """Request body -> the validated request and what the engine needs.

    Args:
        max_characters: of all texts together; more cannot fit the model's context.
        see: what is kept of a decoded picture. One is decoded after the other, so that a small one takes the place of
            a large one before the next is decoded.

    Raises:
        ApiError: 404 for another model, 413 for a body, text or picture that is too large, 400 for everything else
            that is wrong with it.
    """
    from serve.engine import Request

    if len(body) > config.max_body_bytes:
        raise ApiError(413, f"the body has {len(body):,} bytes, the limit here is {config.max_body_bytes:,}")
    chat = _validate(body)
    if chat.model != model:
        raise ApiError(
            404,
            f"the model '{chat.model}' does not exist here; this is '{model}'",
            param="model",
            code="model_not_found",
        )
    if (chat.n or 1) > config.max_batch_size:
        raise ApiError(400, f"n is {chat.n}, the limit here is {config.max_batch_size}", param="n")
    _check_turns(chat.messages)
    _check_length(chat.messages, max_characters)
    images = [see(decode_or_refuse()) for decode_or_refuse in _pictures(chat.messages, config)]
    limit = min(chat.max_completion_tokens or chat.max_tokens or config.max_new_tokens, config.max_new_tokens)
    request = Request(
        _turns(chat.messages),
        images,
        limit,
        temperature=1.0 if chat.temperature is None else chat.temperature,
        seed=chat.seed if chat.seed is not None else secrets.randbits(63),
        top_p=1.0 if chat.top_p is None else chat.top_p,
        top_k=max(chat.top_k or 0, 0),
        presence_penalty=chat.presence_penalty or 0.0,
        frequency_penalty=chat.frequency_penalty or 0.0,
        stops=chat.stops,
        top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
    )
    return chat, request


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
        said = worst["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param}: {said}" if param else said, param=param or None, code=code) from None


def _param(location: tuple[str | int, ...]) -> str:
    """`messages.0.content.1.image_url.url`: pydantic's path without the names of union members."""
    path = [str(step) for step in location if not (isinstance(step, str) and "[" in step)]
    if len(path) > 3 and path[2] == "content":
        if path[3] == "str":
            del path[3]
        elif len(path) > 4:
            del path[4]  # the kind of part
    return ".".join(path)


def _check_turns(messages: list[Message]) -> None:
    """What a chat template would leave out, or put elsewhere, is refused."""
    last = len(messages) - 1
    if messages[last].role != "user":
        raise ApiError(400, "the last message must be the user's", param=f"messages.{last}.role")
    begun = False
    for turn, message in enumerate(messages):
        system = message.role in ("system", "developer")
        if system and begun:
            raise ApiError(
                400, "system messages come before all others; the model knows none later", param=f"messages.{turn}.role"
            )
        begun = begun or not system
        if message.role != "user" and any(isinstance(part, ImagePart) for part in message.parts):
            raise ApiError(
                400, f"pictures are the user's to send, not the {message.role}'s", param=f"messages.{turn}.content"
            )


def _check_length(messages: list[Message], most: int | None) -> None:
    characters = sum(len(part.text) for m in messages for part in m.parts if isinstance(part, TextPart))
    if most is not None and characters > most:
        raise ApiError(
            413,
            f"the messages have {characters:,} characters; more than {most:,} cannot fit the model's context",
            param="messages",
            code="context_length_exceeded",
        )


def _turns(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them, with all system messages in one."""
    turns: list[dict[str, Any]] = []
    system = [_text(message) for message in messages if message.role in ("system", "developer")]
    if system:
        turns.append({"role": "system", "content": [{"type": "text", "text": "\n\n".join(system)}]})
    for message in messages[len(system) :]:
        turns.append({"role": message.role, "content": _in_order(message.parts)})
    return turns


def _text(message: Message) -> str:
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def _in_order(parts: list[TextPart | ImagePart]) -> list[dict[str, Any]]:
    """Parts as they stand, texts that follow one another as lines. Pictures that all stand behind the words, as in
    "What is this? <picture>", go in front of them: so the models were trained, and it changes no reference.
    """
    found: list[dict[str, Any]] = []
    for kind, group in groupby(parts, lambda part: part.type):
        if kind == "text":
            found.append({"type": "text", "text": "\n".join(part.text for part in group)})  # type: ignore[union-attr]
        else:
            found += [{"type": "image"} for _ in group]
    texts = sum(part["type"] == "text" for part in found)
    return found[1:] + found[:1] if texts == 1 and found[0]["type"] == "text" else found


def _pictures(messages: list[Message], config: ServeConfig) -> list[Callable[[], Image]]:
    """One function for each picture, in reading order, that decodes it; what headers tell is refused here."""
    found: list[Callable[[], Image]] = []
    pixels = 0
    for turn, message in enumerate(messages):
        for place, part in enumerate(message.parts):
            if isinstance(part, TextPart):
                continue
            if len(found) == config.max_images:
                raise ApiError(400, f"more than {config.max_images} pictures in one request", param="messages")
            param = f"messages.{turn}.content.{place}.image_url.url"
            data = _bytes(part.image_url.url, param, config.max_image_bytes)
            pixels += _pixels(data, param, config.max_image_pixels)
            if pixels > config.max_request_pixels:
                raise ApiError(
                    400,
                    f"the pictures have more than {config.max_request_pixels:,} pixels together",
                    param="messages",
                    code="invalid_image",
                )
            found.append(_decoding(data, param))
    return found


def _bytes(url: str, param: str, most: int) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        said = "" if url.startswith("data:") else "; pictures are never fetched from elsewhere"
        raise ApiError(400, f"{param} must be a data URL, data:image/...;base64,...{said}", param=param)
    if (len(url) - head.end()) * 3 // 4 > most:
        raise ApiError(413, f"{param}: the picture is larger than {most:,} bytes", param=param)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param}: not valid base64 ({error})", param=param) from None


def _decoding(data: bytes, param: str) -> Callable[[], Image]:
    def run() -> Image:
        try:
            return decode(data)
        except BadImage as error:
            raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from None

    return run


def _pixels(data: bytes, param: str, most: int) -> int:
    """How many pixels the header promises; what has no readable one is left to `decode` to refuse."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = Image.open(io.BytesIO(data)).size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return 0
    if width * height > most or max(width, height) ** 2 > _MAX_ELONGATION * most:
        said = f"too large: {width}x{height} pixels (limit {most:,})"
        raise ApiError(400, f"{param}: {said}", param=param, code="invalid_image")
    return width * height
