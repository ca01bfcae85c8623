"""Every malformed request gets a 4xx that says why, and nothing that cannot be honoured is silently ignored."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from serve.api import parse, require_json
from serve.config import ServeConfig
from serve.errors import ApiError

CONFIG = ServeConfig(
    max_new_tokens=32, max_images=3, max_image_bytes=50_000, max_image_pixels=10_000, max_request_pixels=15_000
)
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
    "max_tokens text": ({"max_tokens": "8"}, 400, "max_tokens"),
    "hot": ({"temperature": 2.1}, 400, "temperature"),
    "cold": ({"temperature": -1}, 400, "temperature"),
    "too many answers": ({"n": 17}, 400, "limit here is 16"),
    "no answer": ({"n": 0}, 400, "n"),
    "all of it": ({"top_p": 0}, 400, "top_p"),
    "five stops": ({"stop": list("abcde")}, 400, "stop"),
    "others of nothing": ({"top_logprobs": 2}, 400, "needs logprobs"),
    "usage of no stream": ({"stream_options": {"include_usage": True}}, 400, "needs stream"),
    "a tool": ({"tools": [{"type": "function"}]}, 400, "tools: only null or []"),
    "JSON asked for": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "bias": ({"logit_bias": {"7": 100}}, 400, "logit_bias"),
    "kept": ({"store": True}, 400, "store"),
    "unknown field": ({"colour": "red"}, 400, "colour"),
    "a name": ({"messages": [{"role": "user", "name": "Ann", "content": "x"}]}, 400, "messages.0.name"),
    "late system": (
        {"messages": [{"role": role, "content": "x"} for role in ("user", "system", "user")]},
        400,
        "system messages come before",
    ),
    "picture of the system": (
        {
            "messages": [
                {"role": "system", **with_url("x")["messages"][0] | {"role": "system"}},
                {"role": "user", "content": "x"},
            ]
        },
        400,
        "pictures are the user's",
    ),
    "pixels together": (
        {
            "messages": [
                {"role": "user", "content": [with_url(png_url(encoded((90, 90))))["messages"][0]["content"][0]] * 2}
            ]
        },
        400,
        "15,000 pixels together",
    ),
    "more text than any context": ({"messages": [{"role": "user", "content": "x" * 1001}]}, 413, "1,000"),
    "huge seed": ({"seed": 2**64}, 400, "seed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str, chat_body: Body) -> None:
    fields, status, words = REFUSED[name]
    with pytest.raises(ApiError) as refusal:
        parse(json.dumps(chat_body() | fields).encode(), "captune", CONFIG, max_characters=1000)
    assert refusal.value.status == status
    body = refusal.value.body()["error"]
    assert words in body["message"] and body["type"] == "invalid_request_error" and set(body) >= {"param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_a_body_that_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError, match="body") as refusal:
        parse(body, "captune", CONFIG)
    assert refusal.value.status == 400


def test_too_many_pictures(chat_body: Body) -> None:
    with pytest.raises(ApiError, match="more than 3 pictures"):
        parse(json.dumps(chat_body("x", *[encoded((9, 9))] * 4)).encode(), "captune", CONFIG)


def test_pictures_arrive_in_order_and_small_ones_take_their_place(chat_body: Body) -> None:
    """`see` has a picture before the next is decoded: a broken one behind is found after it."""
    body = chat_body("look", encoded((8, 9)), encoded((5, 6), "PNG", "P"), seed=5, temperature=0.5, user="me")
    seen: list[Any] = []
    chat, request = parse(
        json.dumps(body).encode(), "captune", CONFIG, see=lambda image: seen.append(image.size) or image
    )
    assert [(image.size, image.mode) for image in request.images] == [((8, 9), "RGB"), ((5, 6), "RGB")]
    kinds = [part["type"] for part in request.messages[0]["content"]]
    assert kinds == ["image", "image", "text"]
    assert (request.max_tokens, request.temperature, request.seed, chat.model) == (8, 0.5, 5, "captune")
    torn = chat_body("look", encoded((8, 9)), encoded((90, 90), "JPEG")[:300])
    with pytest.raises(ApiError, match="messages.0.content.1.image_url.url: broken"):
        parse(json.dumps(torn).encode(), "captune", CONFIG, see=lambda image: seen.append(image.size))
    assert seen == [(8, 9), (5, 6), (8, 9)]


NEUTRAL = {
    "n": (1,), "stream": (False,), "top_p": (1, 1.0), "stop": ([], ""), "presence_penalty": (0, 0.0), "tools": ([],),
    "logprobs": (False,), "tool_choice": ("auto", "none"), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "top_logprobs": (0,), "stream_options": (), "parallel_tool_calls": (True,), "metadata": ({},), "store": (False,),
    "repetition_penalty": (1.0,), "top_k": (-1, 0), "service_tier": ("auto",), "functions": ([],), "min_p": (0.0,),
}  # fmt: skip


@pytest.mark.parametrize("field", NEUTRAL)
def test_what_asks_for_nothing_is_let_pass(field: str, chat_body: Body) -> None:
    expected = parse(json.dumps(chat_body(seed=1)).encode(), "captune", CONFIG)[1]
    for value in (None, *NEUTRAL[field]):
        assert parse(json.dumps(chat_body(seed=1, **{field: value})).encode(), "captune", CONFIG)[1] == expected


def test_sampling_reaches_the_engine_and_max_tokens_above_the_limit_is_the_limit(chat_body: Body) -> None:
    asked = {"max_completion_tokens": 4096, "stop": ["\n", ""], "top_p": 0.5, "top_k": 7, "presence_penalty": -1}
    body = chat_body(**asked, frequency_penalty=0.5, logprobs=True, top_logprobs=3)
    found = parse(json.dumps(body).encode(), "captune", CONFIG)[1]
    assert (found.max_tokens, found.stops, found.top_p, found.top_k) == (32, ("\n",), 0.5, 7)
    assert (found.presence_penalty, found.frequency_penalty, found.top_logprobs) == (-1, 0.5, 3)


def test_an_answer_as_clients_dump_it_is_a_turn(chat_body: Body) -> None:
    said = {
        "role": "assistant",
        "content": "stop",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
    }
    user = {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "now?"}]}
    body = chat_body() | {"messages": [*chat_body("first")["messages"], said, user]}
    turns = parse(json.dumps(body).encode(), "captune", CONFIG)[1].messages
    assert [(turn["role"], turn["content"][0]["text"]) for turn in turns] == [
        ("user", "first"), ("assistant", "stop"), ("user", "and\nnow?")
    ]  # fmt: skip


def test_all_system_messages_are_said_once_and_in_order(chat_body: Body) -> None:
    heads = [{"role": "system", "content": "Be short."}, {"role": "developer", "content": "Be kind."}]
    body = chat_body() | {"messages": [*heads, *chat_body("x")["messages"]]}
    turns = parse(json.dumps(body).encode(), "captune", CONFIG)[1].messages
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert turns[0]["content"] == [{"type": "text", "text": "Be short.\n\nBe kind."}]


@pytest.mark.parametrize(
    "order, expected", [("tp", "pt"), ("tpp", "ppt"), ("pt", "pt"), ("tptp", "tptp"), ("ptp", "ptp"), ("ttpt", "tpt")]
)
def test_pictures_keep_their_place_among_texts(order: str, expected: str, chat_body: Body) -> None:
    """Only pictures behind all of the words go in front of them, as the models were trained."""
    shown = with_url(png_url(encoded((9, 9))))["messages"][0]["content"][0]
    content = [{"type": "text", "text": "x"} if kind == "t" else shown for kind in order]
    body = chat_body() | {"messages": [{"role": "user", "content": content}]}
    found = parse(json.dumps(body).encode(), "captune", CONFIG)[1].messages[0]["content"]
    assert "".join("t" if part["type"] == "text" else "p" for part in found) == expected


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; x=y"])
def test_only_json_is_read(kind: str) -> None:
    require_json("application/json; charset=utf-8")
    with pytest.raises(ApiError, match="application/json"):
        require_json(kind)


def test_plain_text_content_and_missing_limits(chat_body: Body) -> None:
    body = chat_body() | {"messages": [{"role": "user", "content": "hello"}], "max_tokens": None}
    _, request = parse(json.dumps(body).encode(), "captune", CONFIG)
    assert request.messages == [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert request.max_tokens == CONFIG.max_new_tokens
