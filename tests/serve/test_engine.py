"""The engine without Ray: a batch answers what its requests would get alone, and no request can hurt another."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from serve.engine import Answer, Engine, Request

Picture = Callable[[int], bytes]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    torch.set_num_threads(1)
    return Engine(tiny_model, device="cpu")


def request(text: str, *images: bytes, **settings: Any) -> Request:
    pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
    return Request([{"role": "user", "content": content}], pictures, **settings)


def mixed(picture: Picture) -> list[Request]:
    """None, one and two pictures; short and long prompts; greedy and drawn; every limit from 1 to 9."""
    return [
        request(
            "Why? " * (1 + i % 4),
            *[picture(i + k) for k in range(i % 3)],
            max_tokens=1 + i % 9,
            temperature=float(i % 2),
            seed=i,
        )
        for i in range(12)
    ]


def test_a_batch_answers_like_its_requests_alone(engine: Engine, picture: Picture) -> None:
    requests = mixed(picture)
    together = engine.answer(requests)
    assert together == [engine.answer([one])[0] for one in requests]
    assert together[::-1] == engine.answer(requests[::-1])
    assert len({answer.text for answer in together}) > 6, (
        "the model says the same to everything; this test proves nothing"
    )
    for one, answer in zip(requests, together, strict=True):
        assert answer.error is None and 1 <= answer.completion_tokens <= one.max_tokens
        assert answer.finish_reason == "stop" or answer.completion_tokens == one.max_tokens


def test_an_adapter_answers_unmerged_as_it_does_merged(
    engine: Engine, tiny_model: Path, tiny_adapter: Path, picture: Picture, tmp_path: Path
) -> None:
    """LoRA and the trained projector, in a batch and alone; the base alone says other things."""
    from pipelines.adapters import merge
    from pipelines.adapters.config import MergeConfig

    merge.run(tiny_model, tiny_adapter, tmp_path / "merged", MergeConfig())
    requests = [request("What is it?", picture(i), max_tokens=8) for i in range(3)] + [request("Why?", max_tokens=8)]
    unmerged = Engine(tiny_model, adapter=tiny_adapter, device="cpu")
    answers = unmerged.answer(requests)
    assert answers == Engine(tmp_path / "merged", device="cpu").answer(requests)
    assert answers == [unmerged.answer([one])[0] for one in requests]
    assert answers != engine.answer(requests)


def test_the_likelihood_of_an_answer_is_that_of_its_tokens_and_its_end(engine: Engine, picture: Picture) -> None:
    """Added up token by token, each in a pass of its own, and in a batch the same as alone. What the model itself says
    is likelier than what it might have said.
    """
    requests = [request("What is it? " * (1 + i), picture(i), max_tokens=6) for i in range(4)]
    answers = ["a", "red bus", "stop it", "x"]
    together = engine.likelihoods(requests, answers)
    alone = [engine.likelihoods([one], [answer])[0] for one, answer in zip(requests, answers, strict=True)]
    assert together == pytest.approx(alone, abs=1e-4)
    end = engine.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for one, answer, found in zip(requests, answers, alone, strict=True):
        inputs, expected = dict(engine.prepare(one).inputs), 0.0
        for token in [*engine.tokenizer(answer, add_special_tokens=False).input_ids, end]:
            with torch.inference_mode():
                logits_V = engine.model(**inputs, use_cache=False).logits[0, -1].double()
            expected += float(torch.log_softmax(logits_V, dim=-1)[token])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert found == pytest.approx(expected, abs=1e-4) and found < 0
    with pytest.raises(ValueError, match="over the context"):
        engine.likelihoods([request("a" * 100_000)], ["b"])


def test_pictures_and_their_order_matter(engine: Engine, picture: Picture) -> None:
    one, other, swapped = engine.answer(
        [request("?", picture(1), picture(2), max_tokens=8), request("?", picture(3), picture(2), max_tokens=8)]
        + [request("?", picture(2), picture(1), max_tokens=8)]
    )
    assert len({one.text, other.text, swapped.text}) == 3


def test_one_bad_request_does_not_hurt_the_batch(engine: Engine, picture: Picture) -> None:
    """Too long, too long with its answer, a picture marker smuggled into the text, a picture part without its
    picture.
    """
    good = [request("fine", picture(0), max_tokens=5), request("also fine", max_tokens=5)]
    lost = request("x", picture(0))
    lost.images.clear()
    greedy = request("what does it say?", max_tokens=510)
    answers = engine.answer([good[0], request("long " * 200), request("<image>"), lost, good[1], greedy])
    assert [answers[0], answers[4]] == engine.answer(good)
    assert "over the context of 512" in str(answers[1].error)
    assert "max_tokens 510 it exceeds the model's context of 512" in str(answers[5].error)
    assert "<image>" in str(answers[2].error)
    assert answers[3].error is not None


def test_drawing_follows_the_softmax(engine: Engine) -> None:
    """First tokens of many seeds have the frequencies that the temperature says; the same seed says the same."""
    prompt = engine.prepare(request("draw", max_tokens=1))
    with torch.inference_mode():
        logits = engine.model(**prompt.inputs).logits[0, -1].double()
    expected = torch.softmax(logits / 3, -1).topk(3)
    prepared = [engine.prepare(request("draw", max_tokens=1, temperature=3.0, seed=seed)) for seed in range(600)]
    rows: list[list[int]] = []
    original = engine._read
    engine._read = lambda prepared, row: rows.append(row) or Answer()  # type: ignore[method-assign,func-returns-value]
    try:
        engine.generate(prepared)
        engine.generate(prepared[:50])
    finally:
        engine._read = original  # type: ignore[method-assign]
    drawn, again = rows[:600], rows[600:]
    assert drawn[:50] == again
    for probability, token in zip(expected.values.tolist(), expected.indices.tolist(), strict=True):
        found = sum(row[0] == token for row in drawn) / len(drawn)
        assert abs(found - probability) < 5 * (probability * (1 - probability) / len(drawn)) ** 0.5


def test_a_batch_that_does_not_fit_is_halved(engine: Engine, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = mixed(picture)[:6]
    expected = engine.answer(requests)
    generate = engine.model.generate

    def small_device(**inputs: Any) -> torch.Tensor:
        if inputs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError
        return generate(**inputs)  # type: ignore[no-any-return]

    monkeypatch.setattr(engine.model, "generate", small_device)
    assert engine.answer(requests) == expected
