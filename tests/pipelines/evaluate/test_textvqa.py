"""TextVQA's files: what is read, what is refused, and that the original evaluation script reads what we write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.evaluate.benchmark import Prediction
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.stage import score
from pipelines.evaluate.textvqa import load, prompt, write_predictions
from ray_jobs import cli

Benchmark = Callable[..., tuple[Path, Path]]


def test_prompts_are_those_that_published_scores_were_measured_with() -> None:
    """As in `llava_textvqa_val_v051_ocr.jsonl`: a capital, which the annotations lack."""
    instruction = "Answer the question using a single word or phrase."
    asked = "what does IBM say?"
    assert prompt(asked) == f"What does IBM say?\n{instruction}"
    assert prompt(asked, ["A", "b c"]) == f"What does IBM say?\nReference OCR token: A, b c\n{instruction}"
    assert prompt(asked, []) == f"What does IBM say?\nReference OCR token: \n{instruction}"


def test_predictions_as_editors_and_accidents_leave_them(
    tmp_path: Path, benchmark: Benchmark, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte order mark is read; what is no text is refused by its name, wherever a file is named."""
    annotations, _ = benchmark(3)
    lines = "".join(json.dumps({"question_id": 100 + n, "text": f"word{n}"}) + "\n" for n in range(3))
    (tmp_path / "bom.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "utf16.jsonl").write_text(lines, encoding="utf-16")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    files = ["--annotations", str(annotations), "--predictions"]
    assert cli.main(["score", *files, str(tmp_path / "bom.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1
    for name, words in (("utf16.jsonl", "not a text file in UTF-8"), ("deep.jsonl", "not valid JSON")):
        assert cli.main(["score", *files, str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert name in said and words in said
    assert cli.main(["score", "--annotations", str(tmp_path / "utf16.jsonl"), "--predictions", "x"]) == 2
    assert "utf16.jsonl: not a text file" in capsys.readouterr().err


def test_ocr_tokens_from_the_rosetta_file(tmp_path: Path, benchmark: Benchmark) -> None:
    annotations, _ = benchmark(2)
    data = json.loads(annotations.read_text())
    for entry in data["data"]:
        del entry["ocr_tokens"]
    annotations.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"question_id 100 has no 'ocr_tokens'.*evaluate\.ocr"):
        load(annotations, ocr_tokens=True)
    rosetta = tmp_path / "rosetta.json"
    rosetta.write_text(json.dumps({"data": [{"image_id": f"pic{n}", "ocr_tokens": [f"R{n}"]} for n in range(2)]}))
    assert "token: R1\n" in load(annotations, ocr_tokens=True, ocr=rosetta)[1].prompt
    assert "token" not in load(annotations)[1].prompt


@pytest.mark.parametrize(
    "content, match",
    [
        ("{", "not valid JSON"),
        ("[]", "TextVQA_0.5.1 layout"),
        ('{"data": []}', "TextVQA_0.5.1 layout"),
        ('{"data": [{"question": "q", "image_id": "i"}]}', r"data\[0\]: lacks 'question_id'"),
        (
            '{"data": [{"question_id": 7, "question": "q", "image_id": "i", "answers": ["a"]}]}',
            "question_id 7 has 1 answers",
        ),
    ],
)
def test_annotations_that_are_none(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=match):
        load(tmp_path / "a.json")


def test_an_id_twice_is_refused(benchmark: Benchmark) -> None:
    annotations, _ = benchmark(2, question_id=5)
    with pytest.raises(UserError, match="question_id 5 occurs twice"):
        load(annotations)


@pytest.mark.parametrize(
    "rows, match",
    [
        ([(100, "a"), (101, "b")], "1 of 3 questions have no answer: 102"),
        ([(100, "a"), (101, "b"), (102, "c"), (103, "d")], "103 is no question"),
        ([(100, "a"), (101, "b"), (101, "c")], "101 is answered twice"),
        ([(100, "a"), (101, 5), (102, "c")], "answer 2: the answer must be text"),
    ],
)
def test_predictions_must_answer_every_question_once(
    tmp_path: Path, benchmark: Benchmark, rows: list[tuple[int, Any]], match: str
) -> None:
    annotations, _ = benchmark(3)
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([{"question_id": key, "answer": text} for key, text in rows]))
    with pytest.raises(UserError, match=match):
        score("textvqa", annotations, path)


def test_a_failed_answer_scores_nothing_even_if_its_empty_text_would(tmp_path: Path, benchmark: Benchmark) -> None:
    annotations, _ = benchmark(2, answers=["the"] * 10)
    questions = load(annotations)
    predictions = {question.id: Prediction(question.id, "", None) for question in questions}
    predictions["101"] = Prediction("101", "", "HTTP 500")
    write_predictions(tmp_path, EvaluateConfig(), questions, predictions, "m")
    for file in ("predictions.jsonl", "predictions_llava.jsonl"):
        scores = score("textvqa", annotations, tmp_path / file)
        assert [row["score"] for row in scores["questions"]] == [1.0, 0.0] and scores["errors"] == 1


@pytest.mark.parametrize("ocr_tokens", [False, True])
def test_the_original_evaluation_script_reads_our_file(tmp_path: Path, benchmark: Benchmark, ocr_tokens: bool) -> None:
    """MGM's `eval_textvqa.py`, unchanged, on `predictions_llava.jsonl` prints our accuracy."""
    clone = os.environ.get("CAPTUNE_MGM", "")
    if not clone:
        pytest.skip("CAPTUNE_MGM does not name a clone of dvlab-research/MGM: no reference to compare with")
    annotations, _ = benchmark(30)
    data = json.loads(annotations.read_text())
    for number, entry in enumerate(data["data"]):
        entry["answers"] = ["Stop"] * (number % 11) + ["go, now"] * (10 - number % 11)
    annotations.write_text(json.dumps(data))
    questions = load(annotations, ocr_tokens=ocr_tokens)
    write_predictions(
        tmp_path, EvaluateConfig(), questions, {q.id: Prediction(q.id, "the stop.") for q in questions}, "m"
    )
    package = tmp_path / "reference" / "mgm" / "eval"
    package.mkdir(parents=True)
    for file in ("m4c_evaluator.py", "eval_textvqa.py"):
        show = ["git", "-C", clone, "show", f"HEAD:mgm/eval/{file}"]
        (package / file).write_text(subprocess.run(show, check=True, capture_output=True, text=True).stdout)
    command = [sys.executable, "-m", "mgm.eval.eval_textvqa", "--annotation-file", str(annotations)]
    command += ["--result-file", str(tmp_path / "predictions_llava.jsonl")]
    said = subprocess.run(command, cwd=tmp_path / "reference", check=True, capture_output=True, text=True).stdout
    ours = score("textvqa", annotations, tmp_path / "predictions.jsonl")
    assert "Samples: 30\n" in said and f"Accuracy: {100 * ours['accuracy']:.2f}%" in said
