"""MMBench: the published TSV, LLaVA's prompt, and circular scores equal to VLMEvalKit's recorded ones."""

from __future__ import annotations

import base64
import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from pipelines.evaluate import mmbench
from pipelines.evaluate.benchmark import Prediction
from pipelines.evaluate.config import EvaluateConfig
from ray_jobs import cli

RECORDED = json.loads(Path(__file__).with_name("reference_mmbench.json").read_text())
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]


def picture(color: str = "red") -> str:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(stream, "JPEG")
    return base64.b64encode(stream.getvalue()).decode()


def row(index: int, options: list[str], answer: str, **more: str) -> dict[str, str]:
    cells = dict(zip("ABCD", options, strict=False))
    return {"index": str(index), "question": "What is it?", "answer": answer, "image": picture(), **cells} | more


def write(path: Path, rows: list[dict[str, str]], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, columns, restval="", extrasaction="ignore", delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return path


def test_letters_are_found_as_the_reference_finds_them() -> None:
    """Some 300 answers: marks, articles that look like options, both letters, texts, refusals."""
    for said, options, letter in RECORDED["answers"]:
        assert mmbench.chosen(said, options) == letter, (said, options)


def test_circular_scores_are_the_reference_s(tmp_path: Path) -> None:
    """Sixty questions of two to four options, overall and by both kinds of category."""
    rows, said, hits = [], {}, [group["hit"] for group in RECORDED["groups"]]
    for group in RECORDED["groups"]:
        kinds = {"category": group["category"], "l2-category": group["l2"]}
        for index, options, answer, text in group["copies"]:
            rows.append(row(index, options, answer, **kinds))
            said[str(index)] = Prediction(str(index), text)
    rows.sort(key=lambda each: int(each["index"]))  # as published: first all questions, then their copies
    questions = mmbench.questions(EvaluateConfig(annotations=str(write(tmp_path / "dev.tsv", rows))))
    scores = mmbench.score(questions, said)
    assert scores == hits and sum(scores) / len(scores) == pytest.approx(RECORDED["report"]["Overall"], abs=1e-12)
    found = mmbench.figures(questions, said)
    assert found == pytest.approx({family: RECORDED["report"][family] for family in found}, abs=1e-12)


def evaluate(annotations: Path, endpoint: Any, output: Path, *more: str) -> dict[str, Any]:
    argv = ["evaluate", "--benchmark", "mmbench", "--annotations", annotations, "--endpoint", endpoint.url]
    assert cli.main([*map(str, argv), "--output", str(output), *more]) == 0
    return dict(json.loads((output / "scores.json").read_text()))


def test_mmbench_is_asked_with_its_pictures_and_in_every_order(tmp_path: Path, endpoint: Any, capsys: Any) -> None:
    """Always `A`: every question is right in one order, so none counts; a single row counts by itself."""
    rows = [
        row(1, ["cat", "dog"], "A", hint="Look well.", category="ocr", **{"l2-category": "fp"}),
        row(2, ["one", "None", "three"], "A", image=picture("blue"), category="color", **{"l2-category": "cp"}),
        row(1000001, ["dog", "cat"], "B", hint="Look well.", image="1"),
    ]
    rows[1]["B"] = "two"
    annotations = write(tmp_path / "dev.tsv", rows)
    endpoint.says = "A."
    scores = evaluate(annotations, endpoint, tmp_path / "out")
    assert scores["accuracy"] == 0.5 and scores["count"] == 2 and len(endpoint.bodies) == 3
    assert scores["figures"] == {"cp": 1.0, "fp": 0.0} and scores["kinds"]["ocr"] == {"accuracy": 0.0, "count": 1}
    assert scores["questions"][0]["prediction"] == "A. | A." and scores["questions"][0]["answers"] == ["A"]
    asked = {body["messages"][0]["content"][1]["text"]: body["messages"][0]["content"][0] for body in endpoint.bodies}
    prompt = "Look well.\nWhat is it?\nA. dog\nB. cat\n" + mmbench.INSTRUCTION
    assert asked[prompt]["image_url"]["url"] == f"data:image/jpeg;base64,{picture()}"
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2  # each once
    argv = ["score", "--benchmark", "mmbench", "--annotations", str(annotations), "--predictions"]
    capsys.readouterr()
    assert cli.main([*argv, str(tmp_path / "out" / "predictions.jsonl")]) == 0
    assert "MMBench: 50.00 % of 2 questions" in capsys.readouterr().out
    assert evaluate(annotations, endpoint, tmp_path / "one", "--evaluate.limit", "1")["count"] == 1
    assert len(endpoint.bodies) == 5  # the question and its copy

    (tmp_path / "report").mkdir()
    for arm, says in (("original", "A."), ("enhanced", "cat")):
        endpoint.says = says
        evaluate(annotations, endpoint, tmp_path / "run" / arm / "predictions" / "mmbench")
    places = [str(tmp_path / "run" / arm / "predictions" / "mmbench") for arm in ("original", "enhanced")]
    assert cli.main(["compare", *places, "--output", str(tmp_path / "run")]) == 0
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "MMBench" in page and "nopicture" not in page.partition("</style>")[2] and "A. cat\nB. dog" in page


def test_the_test_split_gives_the_sheet_that_the_site_takes(tmp_path: Path, endpoint: Any) -> None:
    """LLaVA's columns, a line for every row, formulas and control characters as plain text; and no score."""
    columns = [name for name in COLUMNS if name != "answer"] + ["comment"]
    annotations = write(tmp_path / "test.tsv", [row(1, ["cat", "<dog>"], "")], columns)
    endpoint.says = "=B\x07 & A"
    scores = evaluate(annotations, endpoint, tmp_path / "out")
    assert scores["accuracy"] is None and "mmbench_submission.xlsx is for" in scores["withheld"]
    with zipfile.ZipFile(tmp_path / "out" / "mmbench_submission.xlsx") as archive:
        tree = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    cells = [["".join(cell.itertext()) for cell in line] for line in tree[0]]
    assert cells == [
        ["index", "question", "A", "B", "C", "D", "prediction"],
        ["1", "What is it?", "cat", "<dog>", "", "", "=B & A"],
    ]


def test_bad_rows_are_refused_with_file_and_row(tmp_path: Path, capsys: Any) -> None:
    good = row(1, ["cat", "dog"], "A")
    path = tmp_path / "dev.tsv"

    def refusal(*rows: dict[str, str], columns: list[str] = COLUMNS, cut: int = 0) -> str:
        write(path, list(rows), columns)
        path.write_text(path.read_text()[: -cut or None])
        argv = ["evaluate", "--benchmark", "mmbench", "--annotations", str(path), "--endpoint", "http://127.0.0.1:9"]
        assert cli.main([*argv, "--output", str(tmp_path / "out")]) == 2
        return str(capsys.readouterr().err)

    assert f"{path}: lacks the column(s) image" in refusal(good, columns=[c for c in COLUMNS if c != "image"])
    assert f"{path}: row 2: has " in (said := refusal(good, good | {"index": "2"}, cut=200)) and "cut off" in said
    assert f"{path}: index 1: the answer is 'C', and the options are A, B" in refusal(good | {"answer": "C"})
    assert f"{path}: index 1: the picture is not valid base64" in refusal(good | {"image": "?" * 80})
    assert f"{path}: index 1: the picture is of no format" in refusal(good | {"image": "QUJD" * 20})
    assert f"{path}: index 1: image is '7', neither" in refusal(good | {"image": "7"})
    assert f"{path}: index 1000002: a rotated copy of question 2" in refusal(good, good | {"index": "1000002"})
    assert f"{path}: row 2: index 1 occurs twice" in refusal(good, good)
    assert f"{path}: row 1: index is 'x', not a whole number" in refusal(good | {"index": "x"})
    assert "question_id 2 has no answers, and others have some" in refusal(good, good | {"index": "2", "answer": ""})
    assert f"{path}: holds no questions" in refusal()
