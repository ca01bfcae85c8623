"""The endpoint as companies run it: asked by OpenAI's own client, with API keys, two replicas and an audit log, while
others abuse it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import yaml

from pipelines.errors import UserError
from serve import keys
from serve.config import ServeConfig

pytestmark = pytest.mark.heavy
LIMIT = 3
Data = Callable[[bytes], str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guarded")


@pytest.fixture(scope="module")
def secrets(place: Path) -> dict[str, str]:
    """Keys by name, made as the README says."""
    file = place / "keys.yaml"
    made = {name: keys.add(file, name, LIMIT if name == "bob" else 0) for name in ("alice", "bob", "carol", "dora")}
    with pytest.raises(UserError, match="'bob' has a key already"):
        keys.add(file, "bob")
    assert not any(key in file.read_text() for key in made.values())
    return made


@pytest.fixture(scope="module")
def tls(place: Path) -> ssl.SSLContext:
    """A certificate of this machine's own address, and a client's trust in it."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=captune",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", place / "key.pem", "-out", place / "certificate.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return ssl.create_default_context(cafile=str(place / "certificate.pem"))


@pytest.fixture(scope="module")
def base(
    ray_cluster: None, tiny_model: Path, place: Path, secrets: dict[str, str], tls: ssl.SSLContext
) -> Iterator[str]:
    from serve.app import start, stop

    config = ServeConfig(
        replicas=2, cpus_per_replica=0.5, max_batch_size=4, max_new_tokens=48, max_queued_requests=4,
        max_body_bytes=400_000, body_timeout_s=2.0, keys=str(place / "keys.yaml"), audit=str(place / "audit"),
        tls_certificate=str(place / "certificate.pem"), tls_key=str(place / "key.pem"),
    )  # fmt: skip
    with pytest.raises(UserError, match="are no pair"):
        start(tiny_model, replace(config, tls_key=config.tls_certificate), port=0)
    found = start(tiny_model, config, port=0)
    assert found.startswith("https://127.0.0.1:")
    yield found
    stop()


@pytest.fixture(scope="module")
def client_of(base: str, tls: ssl.SSLContext) -> Callable[[str], openai.OpenAI]:
    def make(key: str) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(trust_env=False, verify=tls)
        return openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, http_client=http)

    return make


@pytest.fixture(scope="module")
def client(client_of: Callable[[str], openai.OpenAI], secrets: dict[str, str]) -> Iterator[openai.OpenAI]:
    with client_of(secrets["alice"]) as found:
        yield found


@pytest.fixture(scope="module")
def web(base: str, tls: ssl.SSLContext, secrets: dict[str, str]) -> Callable[[], httpx.AsyncClient]:
    """Connections without OpenAI's client."""
    header = {"authorization": f"Bearer {secrets['alice']}"}
    limits = httpx.Limits(max_connections=100)
    return lambda: httpx.AsyncClient(
        base_url=base, headers=header, trust_env=False, verify=tls, timeout=90, limits=limits
    )


def lines(place: Path) -> dict[str, dict[str, Any]]:
    """The audit log by request id."""
    found = [json.loads(line) for file in (place / "audit").glob("*.jsonl") for line in file.read_text().splitlines()]
    return {entry["request_id"]: entry for entry in found}


USER: list[Any] = [{"role": "user", "content": "draw"}]


def test_chat_completions(client: openai.OpenAI) -> None:
    """The client's README: a completion, a stream of it, the same as pieces, several at once."""
    ask: dict[str, Any] = {"model": "captune", "messages": USER, "temperature": 0}
    whole = client.chat.completions.create(**ask, max_tokens=4096)
    said = whole.choices[0]
    assert said.message.role == "assistant" and said.finish_reason in ("stop", "length") and said.message.content
    assert whole.usage and whole.usage.completion_tokens <= 48
    stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == [] and len(chunks) > 3
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == said.message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == [said.finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    with client.chat.completions.stream(**ask) as events:
        assert events.get_final_completion().choices[0].message.content == said.message.content
    stop = str(said.message.content)[3:5]
    cut = client.chat.completions.create(**ask, stop=stop).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == str(said.message.content).split(stop)[0].strip()


def test_several_answers_and_their_probabilities(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "captune", "messages": USER, "max_tokens": 6, "seed": 7, "logprobs": True}
    found = client.chat.completions.create(**ask, n=3, top_logprobs=2)
    texts = [choice.message.content for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2] and len(set(texts)) > 1
    again = client.chat.completions.create(**(ask | {"seed": 8}))
    assert again.choices[0].message.content == texts[1], "the n-th answer is that of the n-th seed"
    for choice in found.choices:
        assert choice.logprobs and choice.logprobs.content
        said = "".join(token.token for token in choice.logprobs.content).strip()
        assert said == str(choice.message.content).rstrip("\ufffd").strip(), "but for half a character at the end"
        assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in choice.logprobs.content)
    pieces: dict[int, str] = {0: "", 1: "", 2: ""}
    tokens = 0
    for chunk in client.chat.completions.create(**ask, n=3, top_logprobs=2, stream=True):
        for one in chunk.choices:
            pieces[one.index] += one.delta.content or ""
            tokens += len((one.logprobs and one.logprobs.content) or [])
    assert list(pieces.values()) == texts
    assert tokens == sum(len(choice.logprobs.content) for choice in found.choices)  # type: ignore[union-attr,arg-type]


def test_vision_and_a_conversation_that_goes_on(
    client: openai.OpenAI, picture: Callable[[int], bytes], data_url: Data
) -> None:
    """Words first, as in OpenAI's guide; the answer goes back as the client dumps it; neutral extras."""
    content = [
        {"type": "text", "text": "What is in this image?"},
        {"type": "image_url", "image_url": {"url": data_url(picture(1)), "detail": "high"}},
    ]
    messages: list[Any] = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": content}]
    first = client.chat.completions.create(model="captune", messages=messages, max_tokens=5, tools=[], n=1)
    messages += [first.choices[0].message.model_dump(), {"role": "user", "content": "Why?"}]
    second = client.chat.completions.create(
        model="captune", messages=messages, response_format={"type": "text"}, extra_body={"top_k": 5}, max_tokens=5
    )
    assert second.usage and first.usage and second.usage.prompt_tokens > first.usage.prompt_tokens


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["captune"]
    assert client.models.retrieve("captune").owned_by == "captune"
    with pytest.raises(openai.NotFoundError, match="'gpt-9' does not exist"):
        client.models.retrieve("gpt-9")


def test_refusals_are_the_clients_own_errors(client: openai.OpenAI) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(model="gpt-9", messages=USER)
    assert unknown.value.code == "model_not_found"
    for words in ("x" * 600, "word " * 20_000):
        with pytest.raises(openai.APIStatusError) as long:
            ask(model="captune", messages=[{"role": "user", "content": words}])
        assert long.value.code == "context_length_exceeded" and long.value.status_code in (400, 413)
    with pytest.raises(openai.BadRequestError, match="tools"):
        ask(model="captune", messages=USER, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="pictures are never fetched"):
        far: Any = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
        ask(model="captune", messages=[{"role": "user", "content": [far]}], stream=True)


def test_who_may_ask(
    base: str,
    tls: ssl.SSLContext,
    client_of: Callable[[str], openai.OpenAI],
    secrets: dict[str, str],
    place: Path,
) -> None:
    """No key, a wrong one, one that asks too often, one that is disabled, and one that is taken back at work."""
    with httpx.Client(base_url=base, trust_env=False, timeout=20, verify=tls) as http:
        assert http.get("/health").status_code == http.head("/health").status_code == 200
        assert http.get("/-/healthz").status_code == 200
        bare = http.get("/v1/models")
        assert bare.status_code == 401 and bare.json()["error"]["code"] == "invalid_api_key"
        assert "www-authenticate" in bare.headers
    with pytest.raises(openai.AuthenticationError):
        client_of("sk-guessed").models.list()
    bob = client_of(secrets["bob"])
    for _ in range(LIMIT):
        bob.models.list()
    with pytest.raises(openai.RateLimitError) as often:
        bob.models.list()
    assert 0 < int(often.value.response.headers["retry-after"]) <= 61
    carol, dora = (client_of(secrets[name]) for name in ("carol", "dora"))
    carol.models.list()
    dora.models.list()
    file = place / "keys.yaml"
    known = yaml.safe_load(file.read_text())
    known["carol"]["disabled"] = True
    del known["dora"]
    file.write_text(yaml.safe_dump(known))
    time.sleep(2.5)
    for _ in range(4):  # both replicas
        with pytest.raises(openai.PermissionDeniedError):
            carol.models.list()
        with pytest.raises(openai.AuthenticationError):
            dora.models.list()
    refused = [entry for entry in lines(place).values() if entry["status"] in (401, 403, 429)]
    assert {entry["status"] for entry in refused} == {401, 403, 429}


def test_the_audit_log_says_who_asked_what(client: openai.OpenAI, place: Path) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="captune", messages=USER, max_tokens=3, extra_headers={"x-request-id": "mine-1", "x-captune-key": "root"}
    )
    assert answer.headers["x-request-id"] == "mine-1" and "x-captune-audited" not in answer.headers
    for _ in client.chat.completions.create(
        model="captune", messages=USER, max_tokens=3, stream=True, extra_headers={"x-request-id": "mine-2"}
    ):
        pass
    time.sleep(0.5)
    found = lines(place)
    for name in ("mine-1", "mine-2"):
        entry = found[name]
        assert (entry["key"], entry["status"], entry["model"]) == ("alice", 200, "captune")
        assert entry["prompt_tokens"] > 0 and entry["request_bytes"] > 50 and "contents" not in entry
    assert found["mine-1"]["completion_tokens"] == answer.parse().usage.completion_tokens  # type: ignore[union-attr]
    assert not any('"draw"' in file.read_text() for file in (place / "audit").iterdir())


def raw(base: str, tls: ssl.SSLContext, key: str, head: str, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """A hand-written request, and all that comes back."""
    url = httpx.URL(base)
    plain = socket.create_connection((str(url.host), int(url.port or 443)), timeout=20)
    with tls.wrap_socket(plain, server_hostname=str(url.host)) as wire:
        lead = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
        wire.sendall(f"{lead}content-type: application/json\r\n{head}\r\n\r\n".encode())
        for piece in pieces:
            wire.sendall(piece)
            time.sleep(pause_s)
        said = b""
        while more := wire.recv(65536):
            said += more
    return said


def test_large_and_slow_bodies_hold_no_place(
    base: str, tls: ssl.SSLContext, client: openai.OpenAI, secrets: dict[str, str]
) -> None:
    """Forty clients that never finish their body, more than both replicas have places; an ordinary request is answered
    at once, and each of them is told why it was not.
    """
    key = secrets["alice"]
    slow: list[bytes] = []
    crowd = [
        threading.Thread(target=lambda: slow.append(raw(base, tls, key, "content-length: 1000", b"{", pause_s=0.1)))
        for _ in range(40)
    ]
    for one in crowd:
        one.start()
    time.sleep(0.3)
    began = time.monotonic()
    assert httpx.get(f"{base}/health", trust_env=False, verify=tls, timeout=5).status_code == 200
    client.chat.completions.create(model="captune", messages=USER, max_tokens=2)
    assert time.monotonic() - began < 1.5, "slow bodies hold places"
    for one in crowd:
        one.join()
    assert all(b" 408 " in said and b'"code":"timeout"' in said for said in slow) and len(slow) == 40
    told = raw(base, tls, key, "content-length: 99999999")
    assert b" 413 " in told and b"body_too_large" in told, "refused before a byte of it came"
    chunk = b"186a0\r\n" + b"x" * 100_000 + b"\r\n"
    untold = raw(base, tls, key, "transfer-encoding: chunked", *[chunk] * 5)
    assert b" 413 " in untold


def test_a_full_endpoint_says_so_in_openais_words_and_its_health_answers(
    web: Callable[[], httpx.AsyncClient],
) -> None:
    body = {"model": "captune", "messages": USER, "max_tokens": 48, "temperature": 2.0}

    async def flood() -> list[httpx.Response]:
        async with web() as http:
            asked = [asyncio.create_task(http.post("/v1/chat/completions", json=body)) for _ in range(80)]
            await asyncio.sleep(0.2)
            began = time.monotonic()
            assert (await http.get("/health")).status_code == 200
            assert time.monotonic() - began < 2
            return await asyncio.gather(*asked)

    replies = asyncio.run(flood())
    refused = [reply for reply in replies if reply.status_code != 200]
    assert refused and {reply.status_code for reply in refused} == {429}
    assert all(r.json()["error"]["type"] == "rate_limit_error" and r.headers["retry-after"] for r in refused)
    assert len(replies) - len(refused) >= 24, "two replicas have places for twelve each"


def test_clients_that_leave_cost_nothing_more(client: openai.OpenAI) -> None:
    """Streams that are dropped after their first event free their places."""
    for _ in range(30):
        with client.chat.completions.create(model="captune", messages=USER, stream=True, max_tokens=48) as stream:
            next(iter(stream))
    began = time.monotonic()
    client.chat.completions.create(model="captune", messages=USER, max_tokens=2)
    assert time.monotonic() - began < 10


def test_a_dying_replica_loses_no_request(web: Callable[[], httpx.AsyncClient]) -> None:
    """What it had in hand is answered by the other, with the answer that it would have given."""
    body = {"model": "captune", "messages": USER, "max_tokens": 48, "temperature": 1, "seed": 5}

    async def ask() -> list[httpx.Response]:
        async with web() as http:
            asked = [asyncio.create_task(http.post("/v1/chat/completions", json=body)) for _ in range(8)]
            await asyncio.sleep(0.05)
            victim = next(
                actor["name"]
                for actor in ray.util.list_named_actors(all_namespaces=True)
                if actor["name"].startswith("SERVE_REPLICA::")
            )
            ray.kill(ray.get_actor(victim, namespace="serve"))
            return await asyncio.gather(*asked)

    replies = asyncio.run(ask())
    assert [reply.status_code for reply in replies] == [200] * 8, [reply.text for reply in replies]
    assert len({reply.json()["choices"][0]["message"]["content"] for reply in replies}) == 1
