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
from pipelines.evaluate import service
from pipelines.evaluate.client import answered
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.stage import Served, read_scores, run, score
from pipelines.modelfiles import model_identity
from ray_jobs import cli

Benchmark = Callable[..., tuple[Path, Path]]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FIRST_PAUSE_S", 0.01)


def config(files: tuple[Path, Path], **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(annotations=str(files[0]), images=str(files[1]), **{"concurrency": 8, "retries": 3} | changes)


def command(files: tuple[Path, Path], endpoint: Any, output: Path, *more: str) -> int:
    """Status of `captune evaluate --endpoint`."""
    argv = ["evaluate", "--annotations", files[0], "--images", files[1], "--endpoint", endpoint.url, "--output", output]
    return cli.main([*map(str, argv), "--evaluate.retries", "3", *more])


def test_all_questions_are_asked_many_at_once_and_scored(tmp_path: Path, benchmark: Benchmark, endpoint: Any) -> None:
    endpoint.pause_s = 0.1
    files = benchmark(30)
    manifest = run(tmp_path / "out", config(files, ocr_tokens=True), endpoint.url + "/v1")
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
        "kind": "",
        "prediction": "Word3.",
        "answers": ["word3"] * 10,
        "score": 1.0,
        "error": None,
        "truncated": False,
    }
    line = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[3])
    hint = "Reference OCR token: word3, STOP"
    prompt = f"What is 3?\n{hint}\nAnswer the question using a single word or phrase."
    answer = {"prompt": prompt, "text": "Word3.", "error": None, "truncated": False}
    assert line == {"question_id": 103, "image_id": "pic3", **answer}
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
    settings = config(benchmark(12), request_timeout_s=0.7, max_error_share=0.25)
    manifest = run(tmp_path / "out", settings, endpoint.url)
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
    run(tmp_path / "whole", config(files), endpoint.url)
    endpoint.asked.clear()
    endpoint.pause_s = 0.1
    program = (
        "from pathlib import Path; from pipelines.evaluate.stage import run; "
        "from pipelines.evaluate.config import EvaluateConfig; import sys; "
        "run(Path(sys.argv[1]), EvaluateConfig(annotations=sys.argv[2], images=sys.argv[3], concurrency=4, retries=3), "
        "sys.argv[4])"
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
    before = set(answered(journal))
    assert 8 <= len(before) < 40 and not (out / "MANIFEST.json").exists()
    with journal.open("a") as stream:
        stream.write('{"id": "139", "te')  # as if the kill had struck inside a write
    endpoint.asked.clear()
    endpoint.pause_s = 0.0
    manifest = run(out, config(files), endpoint.url)
    assert manifest["count"] == 40 and sum(endpoint.asked.values()) == 40 - len(before)
    assert read_scores(out)["questions"] == read_scores(tmp_path / "whole")["questions"]
    assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()


def test_an_endpoint_that_goes_away_keeps_the_answers(
    tmp_path: Path, benchmark: Benchmark, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    files = benchmark(8)
    with pytest.raises(UserError, match="OpenAI-compatible endpoint"):
        run(tmp_path / "a", config(files), endpoint.url + "/nowhere")
    with pytest.raises(WorkFailed, match=r"connection failed.*tried 2 times"):
        run(tmp_path / "a", config(files, retries=1), "http://127.0.0.1:9")
    with pytest.raises(UserError, match="not an endpoint"):
        run(tmp_path / "a", config(files), "localhost:8000")
    endpoint.faults = {"What is 2?": ["away"] * 3, "What is 5?": ["away"] * 4}
    assert command(files, endpoint, tmp_path / "b", "--evaluate.concurrency", "1") == 1
    assert "5 answers of this run are kept; run the same command again" in capsys.readouterr().err
    assert command(files, endpoint, tmp_path / "b") == 0
    assert sum(endpoint.asked.values()) == 8 + 3 + 4, "a proxy without its service is asked again, answers are not"
    endpoint.faults = {"What is 2?": [404]}
    assert command(files, endpoint, tmp_path / "c") == 2, "the service itself says that it has no such model"
    assert "HTTP 404: played 404" in capsys.readouterr().err


def test_the_whole_request_has_a_deadline(tmp_path: Path, benchmark: Benchmark, endpoint: Any) -> None:
    """An endpoint that sends a byte now and then is as late as one that sends none."""
    files = benchmark(3)
    endpoint.faults = {"What is 1?": ["drip"]}
    started = time.monotonic()
    assert command(files, endpoint, tmp_path / "out", "--evaluate.request_timeout_s", "0.5") == 0
    assert endpoint.asked["What is 1?"] == 2 and time.monotonic() - started < 2.5


def test_failed_requests_are_failed_work_and_are_asked_again(
    tmp_path: Path, benchmark: Benchmark, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = benchmark(60), tmp_path / "out"
    endpoint.faults = {f"What is {number}?": [400] for number in range(1, 60)}
    assert command(files, endpoint, out) == 1
    said = capsys.readouterr().err
    assert "59 of 60 questions have no answer" in said and "HTTP 400: played 400 (59 times)" in said
    assert not (out / "MANIFEST.json").exists() and not (out / "scores.json").exists()
    endpoint.faults = {"What is 7?": [400]}
    assert command(files, endpoint, out, "--evaluate.max_error_share", "0.02") == 0
    assert "98.33 % of 60 questions" in capsys.readouterr().out and read_scores(out)["errors"] == 1
    endpoint.asked.clear()
    assert command(files, endpoint, out, "--json") == 0, "a finished evaluation asks its failed questions again"
    result = json.loads(capsys.readouterr().out)
    assert (result["accuracy"], result["errors"]) == (1.0, 0) and dict(endpoint.asked) == {"What is 7?": 1}
    assert command(files, endpoint, out) == 0 and sum(endpoint.asked.values()) == 1


def test_an_endpoint_that_only_fails_is_not_asked_to_the_end(
    tmp_path: Path, benchmark: Benchmark, endpoint: Any
) -> None:
    endpoint.faults = {f"What is {number}?": [400] for number in range(200)}
    with pytest.raises(WorkFailed, match="20 requests in a row failed; HTTP 400"):
        run(tmp_path / "out", config(benchmark(200), concurrency=4), endpoint.url)
    assert sum(endpoint.asked.values()) < 30


def test_answers_that_are_cut_off_are_counted(
    tmp_path: Path, benchmark: Benchmark, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = benchmark(5), tmp_path / "out"
    endpoint.faults = {"What is 1?": ["cut"], "What is 3?": ["cut"]}
    assert command(files, endpoint, out) == 0
    assert (
        "100.00 % of 5 questions (reference OCR tokens were not in the prompt); cut off at the limit of 16 tokens: 2"
        in (capsys.readouterr().out)
    )
    scores = read_scores(out)
    assert scores["truncated"] == 2 and [row["truncated"] for row in scores["questions"]] == [False, True] * 2 + [False]
    for file in ("predictions.jsonl", "predictions_llava.jsonl"):
        assert score("textvqa", files[0], out / file)["truncated"] == 2


def test_a_key_comes_from_the_environment(
    tmp_path: Path, benchmark: Benchmark, endpoint: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    files, endpoint.key = benchmark(3), "sk-test"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert command(files, endpoint, tmp_path / "out") == 2
    assert "HTTP 401: no such key; a key is taken from the environment's OPENAI_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test\n")
    assert command(files, endpoint, tmp_path / "out") == 0
    monkeypatch.setenv("OPENAI_API_KEY", "sk\ntest")
    assert command(files, endpoint, tmp_path / "other") == 2
    assert "test" not in capsys.readouterr().err.split("OPENAI_API_KEY")[1]


def test_two_models_never_share_an_evaluation(tmp_path: Path, benchmark: Benchmark, endpoint: Any, capsys: Any) -> None:
    """Of a service that publishes no identity the name, the address and all that it says of the model count."""
    files, out = benchmark(3), tmp_path / "out"
    endpoint.models = [{"id": "base", "root": "/m/base"}, {"id": "enhanced", "root": "/m/enhanced"}]
    assert command(files, endpoint, out) == 2
    assert "set evaluate.model to one of: base, enhanced" in capsys.readouterr().err
    assert command(files, endpoint, out, "--evaluate.model", "base") == 0
    who = read_scores(out)["answered_by"]
    assert who == {"name": "base", "endpoint": endpoint.url + "/v1", "identity": None, "system_fingerprint": None}
    assert command(files, endpoint, out, "--evaluate.model", "enhanced") == 2
    assert "what changed: model.entry.id, model.entry.root, model.name" in capsys.readouterr().err
    endpoint.models[0]["root"] = "/m/another"
    assert command(files, endpoint, out, "--evaluate.model", "base") == 2
    assert endpoint.bodies[-1]["model"] == "base" and len(endpoint.bodies) == 3


def test_captunes_own_service_is_known_by_its_models_identity(
    tmp_path: Path, benchmark: Benchmark, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Replaced in the middle: no answer of the other model is kept, and the first one continues, at any address."""
    files, out = benchmark(12), tmp_path / "out"
    endpoint.is_captune("a" * 32)
    endpoint.faults = {"What is 7?": ["another model"]}
    assert command(files, endpoint, out, "--evaluate.concurrency", "1") == 1
    said = capsys.readouterr().err
    assert "another model answers now" in said and "a" * 32 in said and "b" * 32 in said
    assert len(answered(out / "journal.jsonl")) == 7
    assert command(files, endpoint, out) == 2
    assert "what changed: model" in capsys.readouterr().err
    endpoint.is_captune("a" * 32)
    endpoint.models[0]["id"] = "another name"
    endpoint.url = endpoint.url.replace("127.0.0.1", "localhost")
    assert command(files, endpoint, out) == 0
    scores = read_scores(out)
    assert (
        scores["model"] == scores["answered_by"]["identity"] == scores["answered_by"]["system_fingerprint"] == "a" * 32
    )
    assert scores["answered_by"]["name"] == "another name" and scores["accuracy"] == 1


def test_a_model_replaced_without_a_word_is_noticed_at_the_end(
    tmp_path: Path, benchmark: Benchmark, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = benchmark(4), tmp_path / "out"
    endpoint.models = [{"id": "stub", "root": "/models/one"}]
    endpoint.faults = {"What is 1?": ["another root"]}
    assert command(files, endpoint, out) == 1
    assert "none of this run's answers are kept" in capsys.readouterr().err
    assert not answered(out / "journal.jsonl") and not (out / "MANIFEST.json").exists()


def test_a_served_model_is_known_without_being_served(tmp_path: Path, benchmark: Benchmark, endpoint: Any) -> None:
    files, started = benchmark(3), []
    one, two = tmp_path / "one", tmp_path / "two"
    for model in (one, two):
        model.mkdir()
        (model / "config.json").write_text(model.name)
        (model / "model.safetensors").write_bytes(b"weights")

    @contextmanager
    def service() -> Iterator[str]:
        started.append("started")
        yield endpoint.url
        started.append("stopped")

    endpoint.is_captune(model_identity(one))
    first = run(tmp_path / "out", config(files), Served(one, service()))
    assert run(tmp_path / "out", config(files, concurrency=2), Served(one, service())) == first
    assert started == ["started", "stopped"], "a finished evaluation starts no service"
    assert read_scores(tmp_path / "out")["answered_by"]["name"] == str(one)
    with pytest.raises(UserError, match="what changed: model"):
        run(tmp_path / "out", config(files), Served(two, service()))
    with pytest.raises(WorkFailed, match="serves model"):
        run(tmp_path / "other", config(files), Served(two, service()))
    assert run(tmp_path / "out", config(files), endpoint.url) == first, "the same model, served elsewhere"


@pytest.mark.parametrize("name", ["../secret", "{outside}/secret", "deep/../../secret"])
def test_no_picture_outside_of_the_directory_is_sent(
    tmp_path: Path, benchmark: Benchmark, endpoint: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"private")
    files = benchmark(2, image_id=name.format(outside=tmp_path))
    assert command(files, endpoint, tmp_path / "out") == 2
    assert "outside of this directory" in capsys.readouterr().err and not endpoint.bodies


def test_what_the_user_got_wrong_is_named(tmp_path: Path, benchmark: Benchmark, endpoint: Any) -> None:
    files = benchmark(3)

    def refuse(match: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=match):
            run(tmp_path / "out", config(files, **changes), endpoint.url)

    refuse(r"evaluate\.benchmark", benchmark="mmlu")
    refuse("has no model 'other'.*stub", model="other")
    (files[1] / "pic2.jpg").unlink()
    refuse(r"1 picture\(s\).*pic2\.jpg")
    for bad, match in ((("", files[1]), r"evaluate\.annotations"), ((files[0], "no/where"), r"evaluate\.images")):
        settings = EvaluateConfig(annotations=str(bad[0]), images=str(bad[1]))
        with pytest.raises(UserError, match=match):
            run(tmp_path / "out", settings, endpoint.url)
