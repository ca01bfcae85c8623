"""Asking a benchmark through HTTP: refusals, broken connections, kills, and what ends up in the files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError, WorkFailed
from pipelines.evaluate import client
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.stage import read_scores, run, score

Benchmark = Callable[..., tuple[Path, Path]]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.01)


def config(files: tuple[Path, Path], **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(annotations=str(files[0]), images=str(files[1]), **{"concurrency": 8, "retries": 3} | changes)


def test_all_questions_are_asked_many_at_once_and_scored(tmp_path: Path, benchmark: Benchmark, endpoint: Any) -> None:
    endpoint.pause_s = 0.1
    files = benchmark(30)
    manifest = run(tmp_path / "out", config(files, ocr_tokens=True), endpoint=endpoint.url + "/v1", model_identity="m")
    assert (manifest["accuracy"], manifest["count"], manifest["errors"]) == (1.0, 30, 0)
    assert manifest["rows_in"] == manifest["rows_out"] == 30
    assert 4 < endpoint.most_in_flight <= 8
    assert set(endpoint.asked.values()) == {1}
    body = endpoint.bodies[0]
    assert body["temperature"] == 0 and body["max_tokens"] == 16 and body["model"] == "stub"
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    scores = read_scores(tmp_path / "out")
    assert scores["ocr_tokens"] is True and scores["questions_per_second"] > 0
    assert scores["questions"][3] == {
        "question_id": "103",
        "image_id": "pic3",
        "question": "What is 3?",
        "prediction": "Word3.",
        "answers": ["word3"] * 10,
        "score": 1.0,
        "error": None,
    }
    line = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[3])
    hint = "Reference OCR token: word3, STOP"
    prompt = f"What is 3?\n{hint}\nAnswer the question using a single word or phrase."
    assert line == {"question_id": 103, "image_id": "pic3", "prompt": prompt, "text": "Word3.", "error": None}
    official = json.loads((tmp_path / "out" / "predictions_official.json").read_text())
    assert official[3] == {"question_id": 103, "answer": "Word3."}
    for file in ("predictions.jsonl", "predictions_llava.jsonl", "predictions_official.json"):
        assert score("textvqa", files[0], tmp_path / "out" / file)["questions"] == scores["questions"]


def test_refusals_are_retried_and_failures_are_counted(tmp_path: Path, benchmark: Benchmark, endpoint: Any) -> None:
    endpoint.faults = {
        "What is 0?": [429, 503, 429],
        "What is 1?": [400],
        "What is 2?": [503] * 9,
        "What is 3?": ["garbage"],
        "What is 4?": ["hang"],
    }
    settings = config(benchmark(12), request_timeout_s=0.7)
    manifest = run(tmp_path / "out", settings, endpoint=endpoint.url, model_identity="m")
    rows = read_scores(tmp_path / "out")["questions"]
    assert [row["error"] for row in rows[:5]] == [
        None,
        "HTTP 400: played 400",
        "HTTP 503: played 503",
        "the endpoint's answer is no chat completion",
        None,
    ]
    assert endpoint.asked["What is 0?"] == endpoint.asked["What is 2?"] == 4 and endpoint.asked["What is 1?"] == 1
    assert manifest["errors"] == 3 and manifest["accuracy"] == pytest.approx(9 / 12)


def test_a_killed_evaluation_continues(tmp_path: Path, benchmark: Benchmark, endpoint: Any) -> None:
    """Kill -9 in the middle: what was answered is not asked again, and the scores are those of an undisturbed run."""
    files = benchmark(40)
    run(tmp_path / "whole", config(files), endpoint=endpoint.url, model_identity="m")
    endpoint.asked.clear()
    endpoint.pause_s = 0.1
    program = (
        "from pathlib import Path; from pipelines.evaluate.stage import run; "
        "from pipelines.evaluate.config import EvaluateConfig; import sys; "
        "run(Path(sys.argv[1]), EvaluateConfig(annotations=sys.argv[2], images=sys.argv[3], concurrency=4, retries=3), "
        "endpoint=sys.argv[4], model_identity='m')"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, str(out), str(files[0]), str(files[1]), endpoint.url]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3], stderr=subprocess.DEVNULL)
    journal = out / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 8) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answered = set(client.read_journal(journal))
    assert 8 <= len(answered) < 40 and not (out / "MANIFEST.json").exists()
    with journal.open("a") as stream:
        stream.write('{"id": "139", "te')  # as if the kill had struck inside a write
    endpoint.asked.clear()
    endpoint.pause_s = 0.0
    manifest = run(out, config(files), endpoint=endpoint.url, model_identity="m")
    assert manifest["count"] == 40 and sum(endpoint.asked.values()) == 40 - len(answered)
    assert read_scores(out)["questions"] == read_scores(tmp_path / "whole")["questions"]
    assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()


def test_an_endpoint_that_goes_away_keeps_the_answers(tmp_path: Path, benchmark: Benchmark, endpoint: Any) -> None:
    files = benchmark(5)
    with pytest.raises(UserError, match="OpenAI-compatible endpoint"):
        run(tmp_path / "a", config(files), endpoint=endpoint.url + "/nowhere", model_identity="m")
    with pytest.raises(WorkFailed, match="run the same command again"):
        run(tmp_path / "b", config(files, retries=1), endpoint="http://127.0.0.1:9", model_identity="m")
    endpoint.faults = {f"What is {number}?": [400] for number in range(5)}
    with pytest.raises(WorkFailed, match=r"answered none of 5 questions.*played 400"):
        run(tmp_path / "c", config(files), endpoint=endpoint.url, model_identity="m")
    assert run(tmp_path / "c", config(files), endpoint=endpoint.url, model_identity="m")["errors"] == 0


def test_another_model_does_not_mix_with_an_old_output(tmp_path: Path, benchmark: Benchmark, endpoint: Any) -> None:
    files = benchmark(3)
    started = []

    @contextmanager
    def service() -> Iterator[str]:
        started.append(endpoint.url)
        yield endpoint.url
        started.append("stopped")

    first = run(tmp_path / "out", config(files), endpoint=service, model_identity="one")
    assert run(tmp_path / "out", config(files), endpoint=service, model_identity="one") == first
    assert started == [endpoint.url, "stopped"], "a finished evaluation starts no service"
    assert run(tmp_path / "out", config(files, concurrency=2), endpoint="nowhere", model_identity="one") == first
    with pytest.raises(UserError, match="what changed: model"):
        run(tmp_path / "out", config(files), endpoint=endpoint.url, model_identity="two")


def test_what_the_user_got_wrong_is_named(tmp_path: Path, benchmark: Benchmark, endpoint: Any) -> None:
    files = benchmark(3)

    def refuse(match: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=match):
            run(tmp_path / "out", config(files, **changes), endpoint=endpoint.url, model_identity="m")

    refuse(r"evaluate\.benchmark", benchmark="mmlu")
    refuse("has no model 'other'.*stub", model="other")
    (files[1] / "pic2.jpg").unlink()
    refuse(r"1 picture\(s\).*pic2\.jpg")
    for bad, match in ((("", files[1]), r"evaluate\.annotations"), ((files[0], "no/where"), r"evaluate\.images")):
        settings = EvaluateConfig(annotations=str(bad[0]), images=str(bad[1]))
        with pytest.raises(UserError, match=match):
            run(tmp_path / "out", settings, endpoint=endpoint.url, model_identity="m")
