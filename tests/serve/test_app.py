"""The HTTP contract over a real Ray Serve: answers, refusals, full batches, a whole evaluation through the endpoint."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from pipelines.errors import UserError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.stage import run, score
from pipelines.modelfiles import model_identity
from serve.config import ServeConfig
from tests.serve import browser

pytestmark = pytest.mark.heavy
BATCH = 8
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def base(ray_cluster: None, tiny_model: Path) -> Iterator[str]:
    from serve.app import start, stop

    config = ServeConfig(max_batch_size=BATCH, max_new_tokens=32, batch_wait_s=0.05, max_image_pixels=1_000_000)
    yield start(tiny_model, config, port=0)
    stop()


@pytest.fixture(scope="module")
def http(base: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base, trust_env=False, timeout=60) as client:
        yield client


def text(response: httpx.Response) -> str:
    """What the model said."""
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_models_and_health(http: httpx.Client) -> None:
    assert http.get("/health").status_code == http.get("/healthz").status_code == 200
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["captune"]


def test_the_service_says_which_model_answers(
    http: httpx.Client, tiny_model: Path, chat_body: Callable[..., dict[str, Any]]
) -> None:
    """An evaluation must be able to tell this directory from any other, before it asks and with every answer."""
    identity = model_identity(tiny_model)
    assert [model["identity"] for model in http.get("/v1/models").json()["data"]] == [identity]
    answer = http.post("/v1/chat/completions", json=chat_body("What?", max_tokens=1)).json()
    assert answer["system_fingerprint"] == identity


def test_an_answer_has_openai_shape_and_true_token_counts(
    http: httpx.Client, chat_body: Callable[..., dict[str, Any]], picture: Callable[[int], bytes]
) -> None:
    response = http.post("/v1/chat/completions", json=chat_body("What?", picture(0), max_tokens=3))
    assert response.status_code == 200, response.text
    said = response.json()
    assert said["object"] == "chat.completion" and said["model"] == "captune"
    assert said["choices"][0]["message"]["role"] == "assistant"
    assert said["choices"][0]["finish_reason"] in ("stop", "length")
    usage = said["usage"]
    assert usage["completion_tokens"] <= 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    text_only = http.post("/v1/chat/completions", json=chat_body("What?", max_tokens=3)).json()["usage"]
    assert usage["prompt_tokens"] - text_only["prompt_tokens"] == 17, "sixteen visual tokens and a newline"


def test_the_picture_reaches_the_model(
    http: httpx.Client, chat_body: Callable[..., dict[str, Any]], picture: Callable[[int], bytes]
) -> None:
    said = {text(http.post("/v1/chat/completions", json=chat_body("What?", picture(seed)))) for seed in range(4)}
    assert len(said) > 1, "four different pictures, one answer: the pictures are ignored"


def test_refusals_over_http_are_openai_errors(http: httpx.Client, chat_body: Callable[..., dict[str, Any]]) -> None:
    """One of each way through the stack; the full table is in test_api.py."""
    cases = [
        (http.post("/v1/chat/completions", content=b"{not json", headers=JSON), 400, "JSON"),
        (http.post("/v1/chat/completions", json=chat_body(model="gpt-9")), 404, "gpt-9"),
        (http.post("/v1/chat/completions", json=chat_body(tools=[{}])), 400, "tools"),
        (http.post("/v1/chat/completions", json=chat_body("x" * 600)), 400, "context"),
        (http.post("/v1/chat/completions", content=json.dumps(chat_body()).encode()), 415, "application/json"),
        (http.get("/v1/nothing"), 404, "/v1/nothing"),
        (http.get("/v1/chat/completions"), 405, "Method"),
    ]
    for response, status, words in cases:
        assert response.status_code == status, response.text
        assert words in response.json()["error"]["message"]


def test_batches_fill_and_answers_do_not_depend_on_them(
    base: str, http: httpx.Client, chat_body: Callable[..., dict[str, Any]], picture: Callable[[int], bytes]
) -> None:
    """32 clients that each wait for their answer before asking again, as an evaluation does, and some bad requests."""
    bodies = [
        chat_body(f"Question {i}?" * (1 + i % 3), *[picture(i)] * (i % 3 > 0), max_tokens=4 + i % 5) for i in range(96)
    ]
    bad = chat_body("bad")
    url = {"url": "data:image/png;base64,aGVsbG8="}
    bad["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": url})

    async def ask() -> list[httpx.Response]:
        queue = iter(enumerate(bodies))
        answers: list[Any] = [None] * len(bodies)

        async def client(session: httpx.AsyncClient) -> None:
            for index, body in queue:
                answers[index] = await session.post("/v1/chat/completions", json=body)
                if index % 10 == 0:
                    assert (await session.post("/v1/chat/completions", json=bad)).status_code == 400

        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=60, limits=limits) as session:
            await asyncio.gather(*(client(session) for _ in range(32)))
        return answers

    before = http.get("/stats").json()
    together = [text(answer) for answer in asyncio.run(ask())]
    after = http.get("/stats").json()
    requests, batches = (after[key] - before[key] for key in ("requests", "batches"))
    assert requests == len(bodies)
    assert str(BATCH) in after["batch_sizes"] and max(map(int, after["batch_sizes"])) == BATCH
    assert requests / batches >= BATCH / 2, f"batches hardly fill: {before} -> {after}"
    assert [text(http.post("/v1/chat/completions", json=body)) for body in bodies[::8]] == together[::8]


def test_a_whole_evaluation_through_the_endpoint(
    base: str, tmp_path: Path, picture: Callable[[int], bytes], tiny_model: Path
) -> None:
    """Questions in, official files and scores out; a broken picture is one error, and all that is asked again."""
    images = tmp_path / "images"
    images.mkdir()
    entries = []
    for number in range(20):
        (images / f"img{number}.jpg").write_bytes(picture(number) if number != 7 else b"no picture")
        answers = [f"word{number}"] * 10
        entries.append(
            {"question_id": number, "image_id": f"img{number}", "question": f"What is {number}?", "answers": answers}
        )
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps({"data": entries}))
    config = EvaluateConfig(
        annotations=str(annotations), images=str(images), concurrency=8, max_new_tokens=4, max_error_share=0.05
    )
    manifest = run(tmp_path / "out", config, base)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (manifest["count"], manifest["errors"], len(scores["questions"])) == (20, 1, 20)
    assert "not an image" in scores["questions"][7]["error"]
    assert manifest["truncated"] > 0 and manifest["model"] == model_identity(tiny_model)
    assert scores["answered_by"]["system_fingerprint"] == scores["answered_by"]["identity"] == scores["model"]
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 20
    again = run(tmp_path / "out", config, base)
    assert (again["accuracy"], again["errors"]) == (manifest["accuracy"], 1)
    for file in ("predictions.jsonl", "predictions_llava.jsonl", "predictions_official.json"):
        assert score("textvqa", annotations, tmp_path / "out" / file)["accuracy"] == scores["accuracy"]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_asks_in_a_browser_on_a_phone(
    base: str,
    http: httpx.Client,
    chat_body: Callable[..., dict[str, Any]],
    picture: Callable[[int], bytes],
    tmp_path: Path,
) -> None:
    """A picture is dropped and asked about, twice; the answers are those of the API, nothing is asked of anybody else,
    and nothing is wider than the screen.
    """
    shown = picture(3)
    (tmp_path / "a.jpg").write_bytes(shown)

    async def use() -> tuple[list[str], list[str], int, str]:
        async with browser.page(f"{base}/", 390, 780) as tab:
            await tab.until("document.getElementById('model').textContent === 'captune' && model")
            await tab.drop(tmp_path / "a.jpg", 150, 300)
            await tab.until("document.querySelectorAll('#shown img').length")
            said = []
            for number, question in enumerate(("What?", "Why?"), start=1):
                await tab.run(f"text.value = '{question}'; send()")
                await tab.until(f"document.querySelectorAll('article[data-done]').length === {number}")
                said.append(
                    await tab.run("[...document.querySelectorAll('article.assistant span')].at(-1).textContent")
                )
            note = await tab.run("document.querySelector('article.assistant small').textContent")
            await tab.screenshot(tmp_path / "page.png")
            return said, tab.asked, await tab.run("document.documentElement.scrollWidth"), note

    said, asked, width, note = asyncio.run(use())
    first = chat_body("What?", shown, max_tokens=32)
    expected = text(http.post("/v1/chat/completions", json=first))
    turns = [*first["messages"], {"role": "assistant", "content": expected}, {"role": "user", "content": "Why?"}]
    assert said == [expected, text(http.post("/v1/chat/completions", json=first | {"messages": turns}))]
    assert width <= 390 and note.startswith("captune · ") and "tokens" in note
    assert all(url.startswith((base, "data:", "blob:")) for url in asked) and len(asked) >= 4, asked


def test_two_applications_share_the_port(
    ray_cluster: None, base: str, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """The second answers with an unmerged adapter, and says so; an adapter of another model is refused here."""
    from serve.app import start, stop

    config = ServeConfig(max_batch_size=2, cpus_per_replica=0.5)
    place: dict[str, Any] = {"name": "other", "route_prefix": "/other", "port": 0}
    other = start(tiny_model, config, adapter=tiny_adapter, **place)
    try:
        assert other == base + "/other"
        listed = httpx.get(other + "/v1/models", trust_env=False).json()["data"][0]
        assert listed["id"] == "other" and listed["identity"].startswith(f"{model_identity(tiny_model)}+")
        assert httpx.get(base + "/v1/models", trust_env=False).json()["data"][0]["id"] == "captune"
    finally:
        stop("other")
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.language_model.norm.weight"] += 0.01
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="was trained on another model than"):
        start(copy, config, adapter=tiny_adapter, **place)


def test_a_model_that_no_replica_can_load_is_refused_here(base: str, tiny_model: Path, tmp_path: Path) -> None:
    """A tensor short, a torn tokenizer: one sentence instead of three replicas' tracebacks."""
    from serve.app import start

    torn = Path(shutil.copytree(tiny_model, tmp_path / "torn"))
    (torn / "tokenizer.json").write_text("{}")
    short = Path(shutil.copytree(tiny_model, tmp_path / "short"))
    tensors = load_file(short / "model.safetensors")
    tensors.pop("model.uni_key.norm.weight")
    save_file(tensors, short / "model.safetensors", metadata={"format": "pt"})
    for directory, message in ((torn, "its processor cannot be loaded"), (short, "1 missing: model.uni_key.norm")):
        with pytest.raises(UserError, match=message):
            start(directory, ServeConfig(), name="fourth", route_prefix="/fourth", port=0)


def test_another_port_while_serve_runs_is_refused(base: str, tiny_model: Path) -> None:
    from serve.app import start

    with pytest.raises(UserError, match="already runs on port"):
        start(tiny_model, ServeConfig(), name="third", route_prefix="/third", port=1)
