"""Every malformed request gets a 4xx that says why, and nothing that cannot be honoured is silently ignored."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from serve.api import ApiError, parse
from serve.config import ServeConfig

CONFIG = ServeConfig(max_new_tokens=32, max_images=2, max_image_bytes=50_000, max_image_pixels=10_000)
Body = Callable[..., dict[str, Any]]


def encoded(size: tuple[int, int], kind: str = "PNG", mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind)
    return stream.getvalue()


def with_url(url: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def png_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


REFUSED = {
    "no model": ({"model": None}, 400, "model"),
    "unknown model": ({"model": "gpt-4o"}, 404, "gpt-4o"),
    "no messages": ({"messages": []}, 400, "messages"),
    "messages no list": ({"messages": "hello"}, 400, "messages"),
    "unknown role": ({"messages": [{"role": "root", "content": "x"}]}, 400, "messages.0.role"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    "empty content": ({"messages": [{"role": "user", "content": []}]}, 400, "messages.0.content"),
    "last is assistant": ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "last message"),
    "unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        400,
        "messages.0.content.0",
    ),
    "url missing": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages.0.content.0.image_url.url",
    ),
    "remote picture": (with_url("http://169.254.169.254/latest/meta-data"), 400, "never fetched"),
    "local picture": (with_url("file:///etc/passwd"), 400, "data URL"),
    "data without base64": (with_url("data:image/png,abc"), 400, "data URL"),
    "other media type": (with_url("data:text/html;base64,aGk="), 400, "data URL"),
    "broken base64": (with_url("data:image/png;base64,@@@@"), 400, "base64"),
    "no picture": (with_url(png_url(b"hello, this is text")), 400, "not an image"),
    "empty picture": (with_url("data:image/png;base64,"), 400, "empty"),
    "truncated picture": (with_url(png_url(encoded((90, 90), "JPEG")[:300])), 400, "broken image"),
    "too many pixels": (with_url(png_url(encoded((200, 200)))), 400, "too large"),
    "too elongated": (with_url(png_url(encoded((2000, 2)))), 400, "too large"),
    "too many bytes": (with_url("data:image/png;base64," + "A" * 70_000), 413, "50,000 bytes"),
    "max_tokens 0": ({"max_tokens": 0}, 400, "max_tokens"),
    "max_tokens too many": ({"max_tokens": 33}, 400, "limit here is 32"),
    "max_tokens text": ({"max_tokens": "8"}, 400, "max_tokens"),
    "hot": ({"temperature": 2.1}, 400, "temperature"),
    "cold": ({"temperature": -1}, 400, "temperature"),
    "stream": ({"stream": True}, 400, "stream"),
    "two choices": ({"n": 2}, 400, "n: only 1"),
    "nucleus": ({"top_p": 0.9}, 400, "top_p"),
    "stop words": ({"stop": ["\n"]}, 400, "stop"),
    "logprobs": ({"logprobs": True}, 400, "logprobs"),
    "unknown field": ({"tools": []}, 400, "tools"),
    "huge seed": ({"seed": 2**64}, 400, "seed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str, chat_body: Body) -> None:
    fields, status, words = REFUSED[name]
    with pytest.raises(ApiError) as refusal:
        parse(json.dumps(chat_body() | fields).encode(), "captune", CONFIG)
    assert refusal.value.status == status
    body = refusal.value.body()["error"]
    assert words in body["message"] and body["type"] == "invalid_request_error" and set(body) >= {"param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_a_body_that_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError, match="body") as refusal:
        parse(body, "captune", CONFIG)
    assert refusal.value.status == 400


def test_too_many_pictures(chat_body: Body) -> None:
    with pytest.raises(ApiError, match="more than 2 pictures"):
        parse(json.dumps(chat_body("x", *[encoded((9, 9))] * 3)).encode(), "captune", CONFIG)


def test_defaults_that_clients_send_are_accepted_and_pictures_arrive_in_order(chat_body: Body) -> None:
    defaults = {
        "n": 1,
        "stream": False,
        "top_p": 1,
        "stop": None,
        "presence_penalty": 0,
        "logprobs": False,
        "user": "me",
    }
    body = chat_body("look", encoded((8, 9)), encoded((5, 6), "PNG", "P"), **defaults, seed=5, temperature=0.5)
    chat, request = parse(json.dumps(body).encode(), "captune", CONFIG)
    assert [(image.size, image.mode) for image in request.images] == [((8, 9), "RGB"), ((5, 6), "RGB")]
    kinds = [part["type"] for part in request.messages[0]["content"]]
    assert kinds == ["image", "image", "text"]
    assert (request.max_tokens, request.temperature, request.seed, chat.model) == (8, 0.5, 5, "captune")


def test_plain_text_content_and_missing_limits(chat_body: Body) -> None:
    body = chat_body() | {"messages": [{"role": "user", "content": "hello"}], "max_tokens": None}
    _, request = parse(json.dumps(body).encode(), "captune", CONFIG)
    assert request.messages == [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert request.max_tokens == CONFIG.max_new_tokens
